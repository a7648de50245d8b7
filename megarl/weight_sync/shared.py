"""Weights to an engine on the same machine: one flat tensor in shared memory or behind a CUDA IPC handle.

The payload is what SGLang's ``flattened_bucket`` loader unpickles in its scheduler, written without importing SGLang;
nobody in between opens it, because a CUDA IPC tensor cannot be shared a second time.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

_ALIGNMENT = 16  # bytes; a view as a wider dtype must start at a multiple of its size
_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor


class _CudaHandle:
    """A CUDA tensor pickled as its IPC handle, the device by UUID: indices differ between processes."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        rebuild, arguments = reduce_tensor(self._tensor)
        uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
        return rebuild, (*arguments[:_DEVICE_ARGUMENT], uuid, *arguments[_DEVICE_ARGUMENT + 1 :])


def share_bucket(named_tensors: list[tuple[str, Tensor]], num_consumers: int) -> list[bytes]:
    """Copy tensors of one device into one flat tensor and return ``num_consumers`` payloads of a few kB.

    Each payload may be opened once: by one tensor-parallel rank of one engine. Names are those of the checkpoint files.
    The memory lives until all payloads were opened and closed.
    """
    if not named_tensors:
        raise ValueError("a bucket of weights must hold at least one tensor")
    metadata, end = [], 0
    for name, tensor in named_tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        metadata.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
            )
        )
    flat = torch.empty(end, dtype=torch.uint8, device=named_tensors[0][1].device)
    for place, (_, tensor) in zip(metadata, named_tensors, strict=True):
        flat[place.start_idx : place.end_idx].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)  # the reader does not wait for our stream
    else:
        torch.multiprocessing.set_sharing_strategy("file_system")  # descriptors cannot pass between Ray actors
    handle = _CudaHandle(flat) if flat.is_cuda else flat
    return [
        bytes(ForkingPickler.dumps({"flattened_tensor": handle, "metadata": metadata})) for _ in range(num_consumers)
    ]
