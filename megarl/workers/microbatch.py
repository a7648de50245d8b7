"""A microbatch on its rank: the packed streams as tensors, images as pixels, actions as rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megarl.algorithms.selections import action_uniforms
from megarl.models.common.vision import VisionInputs
from megarl.parallel.context import local_positions
from megarl.types import Media, PackedBatch
from megarl.workers.pixels import Pixels


@dataclass
class MicroBatch:
    """What a rank needs of a ``PackedBatch``: T tokens, and the N of its actions that context parallelism gives it.

    What a pass is planned by stays on the host (the tokens, where sequences end, grids and sizes of images), so that
    nothing has to be read back from the device; all else is there.
    """

    tokens: Tensor  # [1, T] int64, on the host
    position_ids: Tensor  # [3 or 1, 1, T] int64
    cu_seqlens: Tensor  # [S + 1] int32, on the host
    parents: Tensor | None  # [S] int32, on the host, see PackedBatch; None: no sequence has one
    vision: VisionInputs | None  # None: no rank shows an image, or past the first stage
    rows: Tensor  # [N] int64, places among this rank's tokens whose next token is an action
    places: Tensor  # [N] int64, these actions among the ``num_actions`` of the whole microbatch
    num_actions: int
    targets: Tensor  # [N] int64
    loss_weights: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    rollout_logprobs: Tensor  # [N] float32
    sequence_ids: Tensor  # [N] int64
    num_sequences: int
    uniform: Tensor  # [N] float64, see Actions
    expert_mask: Tensor  # [N] bool
    values: Tensor | None = None  # [N] float32, at the step's start; None: there is no critic
    returns: Tensor | None = None  # [N] float32
    old_logprobs: Tensor | None = None  # [N] float32, by PolicyWorker.estimate or score
    ref_logprobs: Tensor | None = None  # [N] float32, by PolicyWorker.score
    selected: Tensor | None = None  # [N] bool, by PolicyWorker.score
    pixels: Pixels | None = None  # of ``vision``, as long as they are not there; None: nothing is decoded

    def shown(self) -> VisionInputs | None:
        """``vision`` with its pixels on the device, from where they go with the pass; see ``Pixels``."""
        return self.vision if self.pixels is None else replace(self.vision, pixel_values=self.pixels.on_device())


def to_device(
    batch: PackedBatch,
    *,
    device: torch.device,
    decode: Callable[[Media], Pixels] | None,
    vision_group: ProcessGroup,
    cp_size: int = 1,
    cp_rank: int = 0,
    step: int = 0,
) -> MicroBatch:
    """Move ``batch`` to ``device``.

    ``decode`` takes images to be decoded and is None on stages without a vision tower; ``vision_group``: the data- and
    context-parallel ranks, which share the images of a microbatch. ``step``: of the run, for random numbers.
    """

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def here_of(stream: np.ndarray | None) -> Tensor | None:
        return None if stream is None else tensor(stream[places])

    vision = pixels = None
    if decode is not None and (share := batch.vision[cp_rank]) is not None:
        pixels = decode(share.media)
        vision = VisionInputs(
            pixel_values=torch.empty(0, pixels.step.processor.patch_dim),
            grids=torch.from_numpy(share.media.grids),
            sizes=torch.from_numpy(share.media.sizes),
            index=torch.from_numpy(share.index),
            exchange=share.exchange,
            group=vision_group,
            videos=torch.from_numpy(share.media.is_video),
        )
    here = local_positions(torch.from_numpy(batch.cu_seqlens), cp_size, cp_rank).numpy()
    rows = np.flatnonzero(batch.is_action[here])
    actions = here[rows]
    places = (np.cumsum(batch.is_action) - 1)[actions]  # of this rank's actions among all of the batch
    targets = batch.labels[actions].astype(np.int64)
    identity = (batch.position_ids[0, actions].astype(np.int64), targets)
    identity += (batch.rollout_logprobs[places], batch.advantages[places])
    return MicroBatch(
        tokens=torch.from_numpy(batch.tokens).long()[None],
        position_ids=tensor(batch.position_ids.astype(np.int64))[:, None],
        cu_seqlens=torch.from_numpy(batch.cu_seqlens),
        parents=torch.from_numpy(batch.parents) if (batch.parents >= 0).any() else None,
        vision=vision,
        rows=tensor(rows),
        places=tensor(places),
        num_actions=batch.num_actions,
        targets=tensor(targets),
        loss_weights=here_of(batch.loss_weights),
        advantages=here_of(batch.advantages),
        rollout_logprobs=here_of(batch.rollout_logprobs),
        sequence_ids=tensor(batch.sequence_ids[actions]),
        num_sequences=len(batch.lengths),
        expert_mask=here_of(batch.expert_mask),
        uniform=tensor(action_uniforms(*identity, step)),
        values=here_of(batch.values),
        returns=here_of(batch.returns),
        old_logprobs=here_of(batch.old_logprobs),
        pixels=pixels,
    )
