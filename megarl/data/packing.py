"""From samples to microbatches: who goes into which bin, and how a bin is laid out.

The shift between a token that is read and the token that is predicted happens here and nowhere else.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megarl.config import RunConfig
from megarl.data.processors import Processor
from megarl.types import Media, PackedBatch, Sample

PositionIds = Callable[[np.ndarray, np.ndarray], np.ndarray]  # tokens [L], grids [I, 3] -> [3 or 1, L]


@dataclass(frozen=True)
class Packing:
    """What a bin may hold and how its sequences are aligned."""

    max_tokens: int
    max_patches: int
    multiple: int  # sequence lengths are padded to it, so that sequence parallelism can split a bin
    position_ids: PositionIds
    pad_token_id: int = 0

    @classmethod
    def of(cls, config: RunConfig, processor: Processor) -> Packing:
        """How a run lays out its bins."""
        parallel = config.parallel
        return cls(
            max_tokens=config.trainer.max_tokens_per_microbatch,
            max_patches=config.trainer.max_patches_per_microbatch,
            multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
            position_ids=processor.position_ids,
            pad_token_id=processor.eos_token_ids[0],
        )

    def length(self, sample: Sample) -> int:
        """Tokens that ``sample`` takes up in a bin."""
        return -(-(len(sample.tokens) - 1) // self.multiple) * self.multiple


def pack(samples: Sequence[Sample], packing: Packing) -> PackedBatch:
    """Lay ``samples`` end to end; none of them gives a bin of padding that weighs nothing."""
    multiple, parts, bounds = packing.multiple, [], [0]
    for index, sample in enumerate(samples):
        pad = packing.length(sample) - (len(sample.tokens) - 1)
        tokens = np.pad(sample.tokens.astype(np.int64), (0, pad), constant_values=packing.pad_token_id)
        position_ids = packing.position_ids(tokens[:-1], sample.media.grids)

        def shifted(stream: np.ndarray | None, pad: int = pad, length: int = len(sample.tokens)) -> np.ndarray:
            stream = np.zeros(length, np.float32) if stream is None else stream
            return np.pad(stream[1:].astype(np.float32), (0, pad))

        parts.append(
            (
                tokens[:-1],
                tokens[1:],
                np.full(len(tokens) - 1, index),
                shifted(sample.loss_weights),
                shifted(sample.advantages),
                shifted(sample.rollout_logprobs),
                position_ids,
            )
        )
        bounds.append(bounds[-1] + len(tokens) - 1)
    if not samples:
        padding, zeros = np.full(multiple, packing.pad_token_id), np.zeros(multiple, np.float32)
        no_images = np.zeros((0, 3), np.int64)
        positions = packing.position_ids(padding, no_images)
        parts, bounds = (
            [(padding, padding, np.zeros(multiple, np.int64), zeros, zeros, zeros, positions)],
            [0, multiple],
        )
    tokens, labels, sequence_ids, loss_weights, advantages, rollout_logprobs, position_ids = (
        np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)
    )
    media = Media(
        [image for sample in samples for image in sample.media.images],
        np.concatenate([np.zeros((0, 3), np.int64)] + [sample.media.grids for sample in samples]),
    )
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=np.array(bounds, np.int32),
        sequence_ids=sequence_ids,
        loss_weights=loss_weights,
        advantages=advantages,
        rollout_logprobs=rollout_logprobs,
        media=media,
    )


def pack_bins(samples: Sequence[Sample], packing: Packing, data_parallel_size: int) -> list[list[PackedBatch]]:
    """``[data_parallel_size][num_microbatches]`` of ``samples``."""
    bins = assign_to_bins(samples, packing, data_parallel_size)
    return [[pack([samples[i] for i in indices], packing) for indices in rank] for rank in bins]


def assign_to_bins(samples: Sequence[Sample], packing: Packing, data_parallel_size: int) -> list[list[list[int]]]:
    """Deal sample indices to ``[data_parallel_size][num_microbatches]`` bins, as evenly as it goes.

    Every rank gets the same number of bins, some of them possibly empty. A group stays together where it can, since a
    bin runs the vision tower once for each distinct image. The fullest bin is as small as that order allows.
    """
    lengths = [packing.length(sample) for sample in samples]
    for sample, length in zip(samples, lengths, strict=True):
        if length > packing.max_tokens or sample.media.num_patches > packing.max_patches:
            raise ValueError(
                f"{sample.prompt.id}: {length} tokens and {sample.media.num_patches} patches do not fit a "
                f"microbatch of trainer.max_tokens_per_microbatch={packing.max_tokens} and "
                f"trainer.max_patches_per_microbatch={packing.max_patches}"
            )
    order = sorted(range(len(samples)), key=lambda i: (samples[i].group_id, i))
    count = max(1, len(_fill(samples, lengths, order, packing, packing.max_tokens)))
    count = -(-count // data_parallel_size) * data_parallel_size
    caps = range(max(lengths, default=1), packing.max_tokens + 1)
    fits = bisect.bisect_left(caps, True, key=lambda cap: len(_fill(samples, lengths, order, packing, cap)) <= count)
    bins = _fill(samples, lengths, order, packing, caps[fits])
    bins += [[] for _ in range(count - len(bins))]
    return [bins[rank::data_parallel_size] for rank in range(data_parallel_size)]


def _fill(
    samples: Sequence[Sample], lengths: list[int], order: list[int], packing: Packing, max_tokens: int
) -> list[list[int]]:
    """Bins of at most ``max_tokens`` and ``packing.max_patches``, filled one after the other in ``order``."""
    bins, load, patches = [], max_tokens, {}
    for i in order:
        media = samples[i].media
        distinct = patches | {image: grid.prod() for image, grid in zip(media.images, media.grids, strict=True)}
        if load + lengths[i] > max_tokens or sum(distinct.values()) > packing.max_patches:
            bins.append([])
            load = 0
            distinct = {image: grid.prod() for image, grid in zip(media.images, media.grids, strict=True)}
        bins[-1].append(i)
        load, patches = load + lengths[i], distinct
    return bins
