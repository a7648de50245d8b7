"""The state of mcore's DistributedOptimizer, gathered from the data-parallel ranks that share it.

mcore 0.16 concatenates gathered buckets without the padding between them and then looks parameters up at their padded
offsets. With more than one bucket (tied embeddings over pipeline stages, ``overlap_grad_reduce``) every later parameter
is saved with its neighbours' moments, without an error. The gathering here keeps the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megarl.checkpoint.huggingface import CheckpointError

KEYS = ("param", "exp_avg", "exp_avg_sq")
PIECE = 8 << 20  # elements that a rank sends at a time

# the only optimizer format of mcore 0.16 that loads at another layout and for float32 parameters, gathered on the first
# data-parallel rank
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def _gather(shard: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """Write the shards of all ranks end to end to ``whole`` [n shard] on the CPU of the first rank of ``group``.

    Piece by piece: a bucket may be as large as the model, for which the device has no room.
    """
    first = dist.get_process_group_ranks(group)[0]
    for start in range(0, len(shard), PIECE):
        piece = shard[start : start + PIECE]
        pieces = [torch.empty_like(piece) for _ in range(group.size())] if group.rank() == 0 else None
        dist.gather(piece, pieces, dst=first, group=group)
        for rank, theirs in enumerate(pieces or []):
            whole[rank * len(shard) + start :][: len(theirs)] = theirs


def _parameter_state(
    optimizer: DistributedOptimizer,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> dict[int, Any] | None:
    """Stands in for ``get_parameter_state_dp_zero``: for each buffer its state [padded buffer], float32 on the CPU."""
    group = optimizer.data_parallel_group
    state: dict[int, Any] = {}
    for number, buckets_by_dtype in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[number]
        ((dtype, buckets),) = buckets_by_dtype.items()
        holds = return_on_all_ranks or group.rank() == 0
        whole = {key: torch.zeros(buffer.numel if holds else 0) for key in KEYS}
        offset = 0
        for bucket, ranges in zip(buffer.buckets, [] if empty_data else buckets, strict=not empty_data):
            size = bucket.grad_data.numel()
            shards = {key: torch.zeros(size // group.size(), device=bucket.grad_data.device) for key in KEYS}
            if ranges["param_map"] and not optimizer.optimizer.state:
                raise CheckpointError("the optimizer has no state yet: save after its first step, or without it")
            for parameter, where in ranges["param_map"].items():
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                for key in KEYS:
                    shards[key][where["gbuf_local"].start : where["gbuf_local"].end].copy_(tensors[key])
            for key in KEYS:
                _gather(shards[key], whole[key][offset : offset + size], group)
            offset += size
        state[number] = {dtype: whole}
    return state if return_on_all_ranks or group.rank() == 0 else None


@contextmanager
def padded_buckets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While it lasts, ``optimizer.sharded_state_dict`` gathers with ``_parameter_state``."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    distributed = [part for part in chained if isinstance(part, DistributedOptimizer)]
    for part in distributed:
        part.get_parameter_state_dp_zero = partial(_parameter_state, part)
    try:
        yield
    finally:
        for part in distributed:
            del part.get_parameter_state_dp_zero
