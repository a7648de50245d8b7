"""From samples to microbatches: who goes into which bin, and how a bin is laid out.

The shift between a token that is read and the token that is predicted happens here and nowhere else.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megarl.config import ParallelConfig, RunConfig
from megarl.data.processors import Processor
from megarl.data.sharing import Encoding, share_images
from megarl.types import Media, PackedBatch, Sample, Streams, TokenPayload

PositionIds = Callable[[np.ndarray, Media], np.ndarray]  # tokens [L] -> [3 or 1, L]


@dataclass(frozen=True)
class Packing:
    """What a bin may hold and how its sequences are aligned."""

    max_tokens: int
    max_patches: int
    multiple: int  # a bin's length is padded to it, so that ranks can split it
    position_ids: PositionIds
    encoding: Encoding
    pad_token_id: int = 0
    share_prompts: bool = False  # lay out a prompt once for all of its samples in a bin
    sequence_multiple: int = 1  # each sequence's length is padded to it, so that context parallelism can cut it
    num_bins_multiple: int = 1  # of the bins of a data-parallel rank, as an interleaved pipeline wants them
    estimates: tuple[str, ...] = ()  # streams besides those that every run has: old_logprobs, values, returns

    @classmethod
    def of(cls, config: RunConfig, processor: Processor) -> Packing:
        """How a run lays out its bins."""
        parallel = config.parallel
        multiple, sequence_multiple = multiples(parallel)
        return cls(
            max_tokens=config.trainer.max_tokens_per_microbatch,
            max_patches=config.trainer.max_patches_per_microbatch,
            multiple=multiple,
            sequence_multiple=sequence_multiple,
            num_bins_multiple=parallel.pipeline_model_parallel_size if parallel.interleaved else 1,
            position_ids=processor.position_ids,
            encoding=Encoding(
                num_tokens=processor.num_tokens,
                cost=processor.encoding_cost,
                max_patches=config.trainer.max_patches_per_microbatch,
                context_parallel_size=parallel.context_parallel_size,
                balance=parallel.balance_vision,
            ),
            pad_token_id=processor.eos_token_ids[0],
            share_prompts=config.trainer.share_prompts,
            estimates=config.estimates,
        )

    def length(self, sample: Sample, previous: Sample | None = None) -> int:
        """Tokens that ``sample`` takes up in a bin, behind ``previous``."""
        shared = self.share_prompts and previous is not None and _prompt(previous) == _prompt(sample)
        return _round_up(len(sample.tokens) - (_prompt_length(sample) if shared else 1), self.sequence_multiple)


def multiples(parallel: ParallelConfig) -> tuple[int, int]:
    """What the lengths of a bin and of each sequence in it are padded to, so that ``parallel`` can cut them."""
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    chunks = 2 if context > 1 else 1  # of a sequence on a rank
    return context * math.lcm(chunks, tensor if parallel.sequence_parallel else 1), context * chunks


def most_tokens(config: RunConfig) -> int:
    """The longest sequence that a microbatch of ``config`` can hold."""
    multiple, sequence_multiple = multiples(config.parallel)
    return config.trainer.max_tokens_per_microbatch // multiple * multiple // sequence_multiple * sequence_multiple


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _prompt_length(sample: Sample) -> int:
    return int(sample.loss_mask.argmax())


def _prompt(sample: Sample) -> tuple[int, int, int]:
    """What samples have in common that begin with the same tokens and show no further images."""
    return id(sample.prompt), id(sample.media), _prompt_length(sample)


@dataclass
class _Segment:
    """Tokens of a sample that are read one after the other: ``start`` to ``stop``, behind those of ``parent``."""

    sample: Sample
    start: int
    stop: int
    media: Media
    parent: int = -1


def _segments(samples: Sequence[Sample], share_prompts: bool) -> list[_Segment]:
    """Samples whole, or a prompt up to its last token and what follows from there in each of its samples."""
    segments: list[_Segment] = []
    for _, members in itertools.groupby(samples, key=_prompt):
        family = list(members)
        last = _prompt_length(family[0]) - 1
        if share_prompts and len(family) > 1 and last > 0:
            parent = len(segments)
            segments.append(_Segment(family[0], 0, last, family[0].media))
            segments += [_Segment(s, last, len(s.tokens) - 1, Media(), parent) for s in family]
        else:
            segments += [_Segment(s, 0, len(s.tokens) - 1, s.media) for s in family]
    return segments


def pack(samples: Sequence[Sample], packing: Packing) -> PackedBatch:
    """``samples`` laid end to end, for a single data-parallel rank."""
    return pack_microbatch([samples], packing)[0]


def pack_microbatch(bins: Sequence[Sequence[Sample]], packing: Packing) -> list[PackedBatch]:
    """The bin of each data-parallel rank, laid out, with its share of the images of all bins."""
    laid_out = [_lay_out(samples, packing) for samples in bins]
    shares = share_images([media for _, media in laid_out], packing.encoding)
    for (batch, _), vision in zip(laid_out, shares, strict=True):
        batch.payload.vision = vision
    return [batch for batch, _ in laid_out]


def _lay_out(samples: Sequence[Sample], packing: Packing) -> tuple[PackedBatch, Media]:
    """``samples`` end to end, and the images they show; none of them gives a bin of padding that weighs nothing."""
    segments, parts = _segments(samples, packing.share_prompts), []
    actions: list[_Actions] = []
    positions: dict[int, np.ndarray] = {}  # by sample
    for segment in segments:
        sample = segment.sample
        if id(sample) not in positions:
            places = packing.position_ids(sample.tokens[:-1].astype(np.int64), sample.media)
            positions[id(sample)] = places.astype(np.int32)
        read, predicted = slice(segment.start, segment.stop), slice(segment.start + 1, segment.stop + 1)
        is_action = sample.loss_mask[predicted]
        part = sample.tokens[read].astype(np.int32), is_action, positions[id(sample)][:, read]
        streams = [sample.loss_weights, sample.advantages, sample.rollout_logprobs, sample.expert_mask]
        streams += [getattr(sample, name) for name in packing.estimates]
        actions.append(np.stack([_stream(values, predicted)[is_action] for values in streams]))
        pad = -len(is_action) % packing.sequence_multiple
        parts.append(_join([part, _padding(pad, packing)]) if pad else part)
    parents = [segment.parent for segment in segments]
    lengths = [segment.stop - segment.start for segment in segments]
    last_labels = [segment.sample.tokens[segment.stop] for segment in segments]
    pad = -sum(len(part[0]) for part in parts) % packing.multiple if parts else packing.multiple
    if pad:
        parts.append(_padding(pad, packing))
        actions.append(np.zeros((4 + len(packing.estimates), 0), np.float32))
        parents.append(-1)
        lengths.append(0)
        last_labels.append(packing.pad_token_id)
    tokens, is_action, position_ids = _join(parts)
    weights, advantages, logprobs, expert_mask, *estimates = np.concatenate(actions, axis=1)
    payload = TokenPayload(
        tokens=tokens,
        last_labels=np.array(last_labels, np.int32),
        position_ids=position_ids,
        cu_seqlens=np.cumsum([0] + [len(part[0]) for part in parts], dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        parents=np.array(parents, np.int32),
        is_action=is_action,
        vision=[],
    )
    streams = Streams(
        loss_weights=weights,
        advantages=advantages,
        rollout_logprobs=logprobs,
        expert_mask=expert_mask.astype(bool),
        **dict(zip(packing.estimates, estimates, strict=True)),
    )
    return PackedBatch(streams, payload), Media.concatenate([segment.media for segment in segments])


_Streams = tuple[np.ndarray, ...]  # tokens, whether they predict an action, position ids
_Actions = np.ndarray  # [4 + K, n] float32: weights, advantages, log-probs, experts, K estimates


def _stream(values: np.ndarray | None, predicted: slice) -> np.ndarray:
    """[n] float32 of what is ``predicted``; zeros where a sample has no such stream."""
    return (
        np.zeros(predicted.stop - predicted.start, np.float32)
        if values is None
        else values[predicted].astype(np.float32)
    )


def _join(parts: Sequence[_Streams]) -> _Streams:
    return tuple(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))


def _padding(length: int, packing: Packing) -> _Streams:
    """Tokens that weigh nothing."""
    tokens = np.full(length, packing.pad_token_id, np.int32)
    places = packing.position_ids(tokens.astype(np.int64), Media()).astype(np.int32)
    return tokens, np.zeros(length, bool), places


def pack_bins(samples: Sequence[Sample], packing: Packing, data_parallel_size: int) -> list[list[PackedBatch]]:
    """``[data_parallel_size][num_microbatches]`` of ``samples``."""
    return pack_assigned(samples, assign_to_bins(samples, packing, data_parallel_size), packing)


def pack_assigned(
    samples: Sequence[Sample], bins: Sequence[Sequence[Sequence[int]]], packing: Packing
) -> list[list[PackedBatch]]:
    """``bins`` of ``assign_to_bins``, laid out."""
    rounds = [
        pack_microbatch([[samples[i] for i in indices] for indices in microbatch], packing)
        for microbatch in zip(*bins, strict=True)
    ]
    return [list(rank) for rank in zip(*rounds, strict=True)]


def by_sample(
    samples: Sequence[Sample], bins: Sequence[Sequence[Sequence[int]]], outputs: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """What ranks say of the actions of ``bins`` of ``assign_to_bins``, [n] for each of ``samples``."""
    results: dict[int, np.ndarray] = {}
    for rank, values_of_rank in zip(bins, outputs, strict=True):
        for indices, values in zip(rank, values_of_rank, strict=True):
            cuts = np.cumsum([samples[i].response_length for i in indices])[:-1]
            results.update(zip(indices, np.split(values, cuts), strict=True) if indices else ())
    return [results[i] for i in range(len(samples))]


def assign_to_bins(samples: Sequence[Sample], packing: Packing, data_parallel_size: int) -> list[list[list[int]]]:
    """Deal sample indices to ``[data_parallel_size][num_microbatches]`` bins, as evenly as it goes.

    Every rank gets the same number of bins, a multiple of ``packing.num_bins_multiple``, some of them possibly empty. A
    group stays in one microbatch where it can, which encodes its images once, or even in one bin when every rank
    encodes what it shows. The fullest bin is as small as that order allows.
    """
    lengths = [packing.length(sample) for sample in samples]
    max_tokens = packing.max_tokens // packing.multiple * packing.multiple
    for sample, length in zip(samples, lengths, strict=True):
        if length > max_tokens or sample.media.num_patches > packing.max_patches:
            raise ValueError(
                f"{sample.prompt.name}: {length} tokens and {sample.media.num_patches} patches do not fit a "
                f"microbatch of trainer.max_tokens_per_microbatch={packing.max_tokens} and "
                f"trainer.max_patches_per_microbatch={packing.max_patches}"
            )
    order = sorted(range(len(samples)), key=lambda i: (samples[i].group_id, i))
    count = max(1, len(_fill(samples, order, packing, max_tokens)))
    count = _round_up(count, data_parallel_size * packing.num_bins_multiple)
    caps = range(max(lengths, default=1), max_tokens + 1)
    fits = bisect.bisect_left(caps, True, key=lambda cap: len(_fill(samples, order, packing, cap)) <= count)
    bins = _fill(samples, order, packing, caps[fits])
    bins += [[] for _ in range(count - len(bins))]
    microbatches = [bins[start : start + data_parallel_size] for start in range(0, count, data_parallel_size)]
    if packing.encoding.balance:
        microbatches = [_even_out(samples, microbatch, packing, max_tokens) for microbatch in microbatches]
    return [list(rank) for rank in zip(*microbatches, strict=True)]


def _even_out(samples: Sequence[Sample], bins: list[list[int]], packing: Packing, max_tokens: int) -> list[list[int]]:
    """The bins of a microbatch with their samples dealt anew, the longest first, if that makes the fullest smaller.

    Ranks that share images wait for each other in every microbatch, and part a group at no cost. A prompt that is laid
    out once stays whole.
    """

    def length(indices: list[int]) -> int:
        previous = [None, *(samples[i] for i in indices)]
        return sum(packing.length(samples[i], before) for i, before in zip(indices, previous, strict=False))

    order = [i for bin in bins for i in bin]
    whole = itertools.groupby(order, key=(lambda i: _prompt(samples[i])) if packing.share_prompts else None)
    units = sorted(([*members] for _, members in whole), key=length, reverse=True)
    dealt: list[list[int]] = [[] for _ in bins]
    loads, patches = [0] * len(bins), [dict[tuple[bytes, bytes, bool], int]() for _ in bins]
    for unit in units:
        size, shown = length(unit), {k: v for i in unit for k, v in _patches(samples[i]).items()}
        for number in sorted(range(len(bins)), key=loads.__getitem__):
            together = patches[number] | shown
            if loads[number] + size <= max_tokens and sum(together.values()) <= packing.max_patches:
                break
        else:
            return bins
        dealt[number] += unit
        loads[number], patches[number] = loads[number] + size, together
    if max(loads) >= max(length(bin) for bin in bins):
        return bins
    place = {i: number for number, i in enumerate(order)}
    return [sorted(bin, key=place.__getitem__) for bin in dealt]


def _patches(sample: Sample) -> dict[tuple[bytes, bytes, bool], int]:
    """By image or video, and grid."""
    return dict(zip(sample.media.keys, sample.media.grids.prod(axis=1).tolist(), strict=True))


def _fill(samples: Sequence[Sample], order: list[int], packing: Packing, max_tokens: int) -> list[list[int]]:
    """Bins of at most ``max_tokens`` and ``packing.max_patches``, filled one after the other in ``order``."""
    bins: list[list[int]] = []
    load, patches, previous = 0, {}, None
    for i in order:
        length, shown = packing.length(samples[i], previous), _patches(samples[i])
        if not bins or load + length > max_tokens or sum((patches | shown).values()) > packing.max_patches:
            bins.append([])
            load, patches, length = 0, {}, packing.length(samples[i])
        bins[-1].append(i)
        load, patches, previous = load + length, patches | shown, samples[i]
    return bins
