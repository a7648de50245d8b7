"""The state of mcore's DistributedOptimizer: each data-parallel rank writes, and reads, the range that it holds.

A rank holds runs of elements of flattened parameters. A run of a matrix is at most three boxes (the end of a row, whole
rows, the beginning of a row), and the checkpoint's format takes boxes of any size: no layout of the ranks shows in it,
and nothing is gathered. Names and shapes are those of mcore's ``fully_reshardable`` format. mcore itself gathers it on
one rank, 12 bytes a parameter (as much on every rank that reads it), and where there is more than one bucket (tied
embeddings over pipeline stages, ``overlap_grad_reduce``) saves parameters with their neighbours' moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megarl.checkpoint.huggingface import CheckpointError

KEYS = ("param", "exp_avg", "exp_avg_sq")
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins and how long it is in each dimension
Entry = ShardedTensor | ShardedTensorFactory


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements ``start`` to ``stop`` of a row-major tensor as boxes in their order, each one run of elements."""
    if start >= stop:
        return
    row = math.prod(shape[1:])

    def within(index: int, begin: int, end: int) -> Iterator[Box]:
        for offset, size in boxes(shape[1:], begin, end):
            yield (index, *offset), (1, *size)

    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        yield from within(last, start - last * row, stop - last * row)
        return
    if start % row:
        yield from within(first - 1, start % row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if stop % row:
        yield from within(last, 0, stop % row)


def _pieces(entry: Entry, shape: torch.Size) -> list[tuple[int, ShardedTensor]]:
    """What a checkpoint holds of a parameter of ``shape``: pieces of its first dimension and where each begins."""
    if isinstance(entry, ShardedTensor):
        return [(0, entry)]
    made = entry.build_fn(entry.key, torch.empty(shape, device="meta"), entry.replica_id, None)
    row = math.prod(shape[1:])
    pieces = []
    for piece in nested_values(made):
        if piece.data.shape[1:] != shape[1:] or not piece.data.is_contiguous():
            raise CheckpointError(f"the optimizer's state of {entry.key} is not stored in pieces of its rows")
        pieces.append((piece.data.storage_offset() // row, piece))
    return pieces


def _sharded(
    key: str, pieces: list[tuple[int, ShardedTensor]], shape: torch.Size, start: int, state: Tensor
) -> list[ShardedTensor]:
    """The run ``state`` from element ``start`` of a parameter's state ``key``, in its order."""
    result, at = [], 0
    for offset, size in boxes(shape, start, start + len(state)):
        box = state[at : at + math.prod(size)].view(size)
        at += box.numel()
        for begin, piece in pieces:
            low, high = max(offset[0], begin), min(offset[0] + size[0], begin + piece.local_shape[0])
            if low >= high:
                continue
            lead = piece.prepend_axis_num
            data = box[low - offset[0] : high - offset[0]][(None,) * lead]
            within = (*[0] * lead, low - begin, *offset[1:])
            result.append(
                replace(
                    piece,
                    key=f"optimizer.state.{key}.{piece.key}",
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_offset=tuple(map(sum, zip(piece.global_offset, within, strict=True))),
                    axis_fragmentations=None,  # boxes of any size
                    prepend_axis_num=0,
                )
            )
    return result


def _runs(optimizer: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, int, int]]:
    """Of each parameter that this rank holds some of, the first element and the one after the last."""
    for ranges_by_dtype in optimizer.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, where in bucket["param_map"].items():
                    yield parameter, where["param"].start, where["param"].end


def _held_state(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool, metadata: dict[str, Any]
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Stands in for ``sharded_param_state_fully_reshardable``."""
    entries = {entry.data: entry for entry in nested_values(model_state) if isinstance(entry, Entry)}
    result = {}
    for number, (parameter, start, stop) in enumerate(_runs(optimizer)):
        if is_loading:
            tensors = {key: torch.empty(stop - start) for key in KEYS}
        elif not optimizer.optimizer.state:
            raise CheckpointError("the optimizer has no state yet: save after its first step, or without it")
        else:
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        entry = entries[parameter]
        # no other data-parallel rank holds these elements
        own = replace(entry, replica_id=(*entry.replica_id[:2], optimizer.distributed_optimizer_instance_id))
        pieces = _pieces(own, parameter.shape)
        result[number] = {key: _sharded(key, pieces, parameter.shape, start, tensors[key]) for key in KEYS}
    return result


@torch.no_grad()
def _take_over(optimizer: DistributedOptimizer, state: dict[int, dict[str, list[Tensor]]]) -> None:
    """Stands in for ``load_parameter_state_from_fully_reshardable``."""
    for number, (parameter, _, _) in enumerate(_runs(optimizer)):
        tensors = {key: torch.cat([box.flatten() for box in state[number][key]]) for key in KEYS}
        optimizer._set_main_param_and_optimizer_states(parameter, tensors)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


# what mcore's HybridDeviceOptimizer keeps in its parameter groups beside Adam's numbers
_SETTINGS = (
    "offload_fraction",
    "cpu_optimizer_cls",
    "gpu_optimizer_cls",
    "param_update_in_fp32",
    "pin_cpu_grads",
    "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d",
    "fused",
)


def _groups(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups in an optimizer's ``state``, of the one that it wraps or of each of several in a chain."""
    if "param_groups" in state:
        return state["param_groups"]
    inner = [state["optimizer"]] if "optimizer" in state else state.values()
    return [group for one in inner for group in _groups(one)]


def without_settings(state: dict[str, Any]) -> None:
    """Take the settings of ``optimizer_cpu_offload`` out of a checkpoint's ``state``: they are the run's, not its."""
    for group in _groups(state):
        for name in _SETTINGS:
            group.pop(name, None)


def with_settings(state: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Put the settings that ``optimizer`` has, if it is offloaded, into a checkpoint's ``state``."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for group in _groups(state):
                group.update({name: part.optimizer.defaults[name] for name in _SETTINGS})


@contextmanager
def held_ranges(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within this context ``optimizer`` saves and loads the range of its state that this rank holds, and no more."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    distributed = [part for part in chained if isinstance(part, DistributedOptimizer)]
    for part in distributed:
        part.sharded_param_state_fully_reshardable = partial(_held_state, part)
        part.load_parameter_state_from_fully_reshardable = partial(_take_over, part)
    try:
        yield
    finally:
        for part in distributed:
            del part.sharded_param_state_fully_reshardable, part.load_parameter_state_from_fully_reshardable
