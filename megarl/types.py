"""The data that flows through a step of training, in the order in which it is made.

Shapes: L tokens of one sample, T tokens of one packed microbatch, S sequences in it, N actions (trained or not),
I images, P patches. A stream has one entry for each thing it describes; nothing here knows a model or an algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
# {"role": str, "content": str | [{"type": "text", "text": str} | {"type": "image"} | {"type": "video"}]}
Message = dict[str, Any]


@dataclass
class Media:
    """The images and videos of one or more sequences, in the order of their placeholders, encoded as they were read."""

    images: list[bytes] = field(default_factory=list)  # I encoded images (PNG, JPEG, ...) or videos
    grids: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 3), np.int64)
    )  # [I, 3] (time or tiles, height, width) in patches
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # [I, 2] (height, width) as read
    seconds: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.float32)
    )  # [I] between a video's patches in time, more than 0; 0 for an image

    def __post_init__(self) -> None:
        lengths = [len(self.images), len(self.grids), len(self.sizes), len(self.seconds)]
        if len(set(lengths)) != 1:
            raise ValueError("images, grids, sizes and seconds of {}, {}, {} and {} media".format(*lengths))

    @property
    def is_video(self) -> np.ndarray:
        """[I] bool."""
        return self.seconds > 0

    @property
    def keys(self) -> list[tuple[bytes, bytes, bool]]:
        """What makes a medium the same as another: the file, its grid, and whether it is shown as a video."""
        grids = (grid.tobytes() for grid in self.grids)
        return list(zip(self.images, grids, self.is_video.tolist(), strict=True))

    @property
    def num_patches(self) -> int:
        return int(self.grids.prod(axis=1).sum())

    def without_files(self) -> Media:
        """For a rank that needs their shapes alone, because another rank decodes them and sends the pixels."""
        return replace(self, images=[b""] * len(self.images))

    def select(self, indices: Sequence[int]) -> Media:
        """Those at ``indices``, in that order."""
        at = np.asarray(indices, np.int64)
        return Media([self.images[i] for i in indices], self.grids[at], self.sizes[at], self.seconds[at])

    @staticmethod
    def concatenate(parts: Sequence[Media]) -> Media:
        """All of ``parts``, one after the other."""
        parts = [Media(), *parts]
        return Media(
            [image for part in parts for image in part.images],
            np.concatenate([part.grids for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.seconds for part in parts]),
        )


@dataclass
class Prompt:
    """One question of a task, before anything has been generated."""

    id: str  # unique and stable: "<task>/<split>/<index>"
    task: str  # key in RunConfig.tasks
    messages: list[Message]  # chat form; every {"type": "image"} takes the next of ``images``, "video" of ``videos``
    images: list[bytes] = field(default_factory=list)  # encoded
    answer: Any = None  # whatever the task's reward compares with (verl: ground_truth)
    target: str | list[str] | None = None  # an expert's response, or several; None: there is none
    metadata: dict[str, Any] = field(default_factory=dict)
    videos: list[bytes] = field(default_factory=list)  # encoded, or frames that ``data.videos.pack_frames`` packed
    where: str = ""  # "file:line" that it was read from; empty: the task made it up

    @property
    def name(self) -> str:
        """What errors call it: where a person finds it."""
        return self.where or self.id

    @property
    def targets(self) -> list[str]:
        """The experts' responses."""
        return [] if self.target is None else [self.target] if isinstance(self.target, str) else list(self.target)


@dataclass(frozen=True)
class Demonstration:
    """What an expert gives to samples of a prompt: an answer, or the beginning of one that the policy goes on from."""

    tokens: np.ndarray  # [n] int32; an answer's last one ends it
    text: str
    whole: bool  # an answer
    num_samples: int = 1  # of the prompt's group


@dataclass
class EncodedPrompt:
    """A prompt as the processor wrote it: what the engine reads and the trainer reads, token for token."""

    prompt: Prompt
    tokens: np.ndarray  # [L] int32, image placeholders expanded to one token a merged patch
    media: Media
    demonstrations: list[Demonstration] = field(default_factory=list)
    loss_mask: np.ndarray | None = None  # [L] bool, an expert's words, for supervised training; None: none are there


@dataclass(kw_only=True)
class Trajectory:
    """One attempt at a prompt: a list of actions and what they earned.

    Streams have one entry an action; entries where ``loss_mask`` is False (the prompt, the words of a tool) are not
    trained.
    """

    prompt: Prompt
    group_id: int  # trajectories of one prompt share it
    loss_mask: np.ndarray  # [N] bool, True where the policy chose
    rollout_logprobs: np.ndarray  # [N] float32 as sampled, 0 where loss_mask is False
    weight_versions: np.ndarray | None = None  # [N] int32, whose weights chose; -1 where none did
    rewards: dict[str, float] = field(default_factory=dict)  # by name, before weighting
    reward: float = 0.0  # earned at the last action
    action_rewards: np.ndarray | None = None  # [N] float32 earned at single actions besides; None: nothing
    greedy_reward: float | None = None  # of a greedy response to the same prompt; None: there was none
    values: np.ndarray | None = None  # [N] float32 expected by a critic; None: there is none
    returns: np.ndarray | None = None  # [N] float32, what the critic is to learn; None: there is none
    old_logprobs: np.ndarray | None = None  # [N] float32 of the policy at the step's start; None: not known here
    ref_logprobs: np.ndarray | None = None  # [N] float32 of the reference; None: not known here
    expert_mask: np.ndarray | None = None  # [N] bool, True where an expert acted; None: nowhere
    keep: bool = True  # False: compared with, but not trained (algorithms.filters)
    advantages: np.ndarray | None = None  # [N] float32, set by algorithms.advantages
    loss_weights: np.ndarray | None = None  # [N] float32, set by algorithms.weights

    @property
    def own_mask(self) -> np.ndarray:
        """[N] bool, True where the policy itself acted."""
        return self.loss_mask if self.expert_mask is None else self.loss_mask & ~self.expert_mask

    @property
    def has_expert(self) -> bool:
        """Whether an expert acted in it."""
        return self.expert_mask is not None and bool(self.expert_mask.any())

    @property
    def is_expert(self) -> bool:
        """Whether the policy did not act in it."""
        return self.has_expert and not self.own_mask.any()


@dataclass(kw_only=True)
class Sample(Trajectory):
    """A trajectory of tokens, prompt included: N = L."""

    tokens: np.ndarray  # [L] int32
    media: Media
    response: str = ""  # the policy's words, decoded
    finish_reason: FinishReason = "stop"

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.loss_mask), len(self.rollout_logprobs)}
        if len(lengths) != 1:
            raise ValueError(f"{self.prompt.name}: per-token streams differ in length: {sorted(lengths)}")

    @property
    def response_length(self) -> int:
        return int(self.loss_mask.sum())


@dataclass
class Exchange:
    """How tokens of images get from the G ranks that encode a microbatch's images to those that show them."""

    sends: np.ndarray  # [M] int64, images encoded here whose tokens leave, by the rank that they go to; also to itself
    send_tokens: np.ndarray  # [G] int64, tokens to each rank
    receive_tokens: np.ndarray  # [G] int64, tokens from each rank
    lengths: np.ndarray  # [R] int64, tokens of each image that arrives, by the rank that it comes from


@dataclass
class VisionShare:
    """What one rank does about the images of a microbatch; ``data.sharing`` plans it for all ranks together."""

    media: Media  # the I images that it encodes, each once
    index: np.ndarray  # [J] int64, which of the R images that arrive (without an exchange: of media) each place shows
    exchange: Exchange | None  # None: every rank shows what it encodes
    cost: float  # of encoding ``media``


@dataclass
class Streams:
    """What is said of the N actions of a microbatch, in order.

    Arrays are numpy on the way to a rank. Reference log-probs, and ``old_logprobs`` that no reward depends on, are made
    on the ranks.
    """

    loss_weights: np.ndarray  # [N] float32
    advantages: np.ndarray  # [N] float32
    rollout_logprobs: np.ndarray  # [N] float32
    expert_mask: np.ndarray  # [N] bool, True where an expert acted
    old_logprobs: np.ndarray | None = None  # [N] float32; None: made on the ranks
    values: np.ndarray | None = None  # [N] float32; None: there is no critic
    returns: np.ndarray | None = None  # [N] float32; None: there is no critic


@dataclass
class TokenPayload:
    """Sequences of T tokens laid end to end, from which a model predicts the actions.

    A prompt that several sequences share may stand there once, as their parent. Position t holds the token that is
    read; where ``is_action`` is set, the token that is predicted from it is an action. Each byte is sent to every rank
    of a replica: integers have 32 bits, and what follows from the rest does not travel.
    """

    tokens: np.ndarray  # [T] int32
    last_labels: np.ndarray  # [S] int32, the token predicted from the last of each sequence; padding where it has none
    position_ids: np.ndarray  # [3, T] int32 (multimodal rotary embedding) or [1, T]
    cu_seqlens: np.ndarray  # [S + 1] int32, padding behind a sequence counted as its own
    lengths: np.ndarray  # [S] int32, tokens of each sequence that are not padding
    parents: np.ndarray  # [S] int32, the sequence whose tokens come before this one's (a shared prompt); -1: none
    is_action: np.ndarray  # [T] bool, False on prompts, tools and padding
    vision: list[VisionShare | None]  # by context-parallel rank; None: no rank shows an image

    @property
    def labels(self) -> np.ndarray:
        """[T] int32, the token that is predicted at each position; padding predicts itself."""
        labels = np.append(self.tokens[1:], self.tokens[:1])
        ends = self.cu_seqlens[:-1] + self.lengths
        labels[ends[self.lengths > 0] - 1] = self.last_labels[self.lengths > 0]
        is_padding = np.arange(len(labels)) >= np.repeat(ends, np.diff(self.cu_seqlens))
        return np.where(is_padding, self.tokens, labels)

    @property
    def sequence_ids(self) -> np.ndarray:
        """[T] int64, index into the S sequences."""
        return np.repeat(np.arange(len(self.lengths)), np.diff(self.cu_seqlens))


@dataclass
class PackedBatch:
    """One microbatch of a data-parallel rank: streams of its actions, and what a model reads to take them."""

    streams: Streams
    payload: TokenPayload

    @property
    def num_actions(self) -> int:
        return len(self.streams.loss_weights)


@dataclass
class Estimates:
    """What models say of the N actions of a microbatch before they are weighed; None: nobody asked."""

    values: np.ndarray | None = None  # [N] float32
    old_logprobs: np.ndarray | None = None  # [N] float32
    ref_logprobs: np.ndarray | None = None  # [N] float32


@dataclass
class Placement:
    """Where the ranks and engines of a run are; ``launch.placement`` decides it, and Ray's options carry it out."""

    kind: str = "split"  # colocated: ranks and engines take turns with the same memory | split: each has its own
    device: str = "cpu"  # cuda | cpu
    rank_options: list[dict[str, Any]] = field(default_factory=list)  # of the actor, one a rank; []: none
    engine_options: list[dict[str, Any]] = field(default_factory=list)  # of the actor, one an engine; []: none
    # [engine][its tensor-parallel rank]: the trainer's rank on the same GPU, which hands it its weights; []: they have
    # no GPU in common
    sources: list[list[int]] = field(default_factory=list)
    gpu_bytes: int | None = None  # memory of the smallest GPU; None: there is none, or it is not known
    lines: list[str] = field(default_factory=list)  # what each node has, for people
