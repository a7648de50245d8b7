"""Weights to engines anywhere: a process group of one trainer rank and every engine rank, one broadcast a bucket.

Rank 0 is the trainer; engines take the ranks from 1. torch has no public way to make a group whose members have
different default groups, so this mirrors ``sglang.srt.utils.init_custom_process_group``, which the engines call.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _new_process_group_helper, _world


@dataclass
class BucketLayout:
    """What an engine must know before it can receive a bucket."""

    names: list[str]  # of the checkpoint files
    dtypes: list[str]  # "bfloat16", ...
    shapes: list[list[int]]


def layout(named_tensors: list[tuple[str, Tensor]]) -> BucketLayout:
    """Describe a bucket; all of its tensors must have one dtype."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in named_tensors]
    for (name, _), dtype in zip(named_tensors, dtypes, strict=True):
        if dtype != dtypes[0]:
            raise ValueError(f"{name} is {dtype} in a bucket of {dtypes[0]}: a broadcast bucket has one dtype")
    return BucketLayout(
        [name for name, _ in named_tensors], dtypes, [list(tensor.shape) for _, tensor in named_tensors]
    )


def create_group(
    master_address: str, master_port: int, *, world_size: int, backend: str, group_name: str, timeout_s: float = 600.0
) -> dist.ProcessGroup:
    """Join, as rank 0, the group that the engines join in ``init_broadcast``; returns when all have come.

    ``backend`` is gloo or nccl. The engines must be asked first, without waiting for them.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(master_address, master_port, world_size, is_master=True, timeout=timeout)
    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(group_name, store),
        group_name=group_name,
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


@dataclass
class Broadcast:
    """A bucket on its way: its memory must live until ``wait`` returned."""

    flat: Tensor
    work: dist.Work

    def wait(self) -> None:
        """Return when the bucket was sent; on CUDA the current stream waits, not the host."""
        self.work.wait()


def broadcast_bucket(named_tensors: list[tuple[str, Tensor]], group: dist.ProcessGroup) -> Broadcast:
    """Begin to send tensors of one dtype and device to all engines, which must have been told their ``layout``."""
    flat = torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in named_tensors])
    return Broadcast(flat, dist.broadcast(flat, src=0, group=group, async_op=True))


def destroy_group(group: dist.ProcessGroup) -> None:
    """Leave the group."""
    dist.destroy_process_group(group)


def abort_group(group: dist.ProcessGroup) -> None:
    """Leave the group without its other members; a collective of NCCL's that waits for them ends on the device."""
    if dist.get_backend(group) == "nccl":
        group.abort()
    dist.destroy_process_group(group)
