"""A selection over all actions of a step, whichever ranks and microbatches hold them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithms.selections import Selection
from megarl.config import AlgorithmConfig
from megarl.workers.microbatch import MicroBatch

from megatron.core import parallel_state  # isort: skip


def mark_selected(microbatches: list[MicroBatch], select: Selection, config: AlgorithmConfig) -> None:
    """Set ``selected`` of this rank's ``microbatches``; every rank of the last pipeline stage calls it."""
    columns = torch.stack(
        [
            torch.cat([getattr(m, name) for m in microbatches]).double()
            for name in ("old_logprobs", "advantages", "uniform")
        ]
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    everything, start = _gather_columns(columns, group)
    mine = select(*everything, config)[start : start + columns.shape[1]]
    for microbatch, selected in zip(microbatches, mine.split([len(m) for m in microbatches]), strict=True):
        microbatch.selected = selected


def _gather_columns(columns: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """The columns [C, n] of all ranks of ``group`` side by side, and where this rank's begin."""
    sizes = torch.empty(group.size(), dtype=torch.int64, device=columns.device)
    dist.all_gather_into_tensor(sizes, torch.tensor([columns.shape[1]], device=columns.device), group=group)
    counts = sizes.tolist()
    padded = columns.new_zeros(columns.shape[0], max(counts))
    padded[:, : columns.shape[1]] = columns
    parts = columns.new_empty(group.size() * padded.numel())
    dist.all_gather_into_tensor(parts, padded.flatten(), group=group)
    parts = parts.view(group.size(), *padded.shape)
    return torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1), sum(counts[: group.rank()])
