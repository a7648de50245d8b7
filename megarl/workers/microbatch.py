"""A microbatch on its rank: the packed streams as tensors, images as pixels, actions as rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarl.types import Media, PackedBatch


@dataclass
class MicroBatch:
    """What a pipeline stage needs of a ``PackedBatch``: T tokens, of which N are actions."""

    tokens: Tensor  # [1, T] int64
    position_ids: Tensor  # [3, 1, T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    parents: Tensor | None  # [S] int32, see PackedBatch; None: no sequence has one
    pixel_values: Tensor | None  # [P, E] float32 of the distinct images; None without images or past the first stage
    grids: Tensor | None  # [I, 3] int64 of the distinct images
    image_index: Tensor | None  # [J] int64, which distinct image each of the J placeholders shows
    rows: Tensor  # [N] int64, positions whose next token is an action
    targets: Tensor  # [N] int64
    loss_weights: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    rollout_logprobs: Tensor  # [N] float32
    sequence_ids: Tensor  # [N] int64
    num_sequences: int
    old_logprobs: Tensor | None = None  # [N] float32, by PolicyWorker.score
    ref_logprobs: Tensor | None = None  # [N] float32, by PolicyWorker.score


def to_device(
    batch: PackedBatch, *, device: torch.device, pixel_values: Callable[[Media], Tensor] | None
) -> MicroBatch:
    """Move ``batch`` to ``device``; ``pixel_values`` decodes images and is None on stages that have no vision tower."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    pixels = grids = image_index = None
    if pixel_values is not None and batch.media.images:
        first = {}
        index = [first.setdefault(image, len(first)) for image in batch.media.images]
        seen = [index.index(i) for i in range(len(first))]
        distinct = Media([batch.media.images[i] for i in seen], batch.media.grids[seen])
        pixels, grids = pixel_values(distinct).to(device), tensor(distinct.grids)
        image_index = torch.tensor(index, device=device)
    rows = np.flatnonzero(batch.loss_weights)
    return MicroBatch(
        tokens=tensor(batch.tokens)[None],
        position_ids=tensor(batch.position_ids)[:, None],
        cu_seqlens=tensor(batch.cu_seqlens),
        parents=tensor(batch.parents) if (batch.parents >= 0).any() else None,
        pixel_values=pixels,
        grids=grids,
        image_index=image_index,
        rows=tensor(rows),
        targets=tensor(batch.labels[rows]),
        loss_weights=tensor(batch.loss_weights[rows]),
        advantages=tensor(batch.advantages[rows]),
        rollout_logprobs=tensor(batch.rollout_logprobs[rows]),
        sequence_ids=tensor(batch.sequence_ids[rows]),
        num_sequences=len(batch.cu_seqlens) - 1,
    )
