"""What SGLang's receiver makes of a CUDA IPC payload, for the GPUs that its process sees.

    (payload,) = share("GPU-aaaa", ["model.norm.weight"], 1)   # as on a rank whose GPU has that UUID
    open_payload(payload, ["GPU-bbbb", "GPU-aaaa"])            # 1, or raises what SGLang raises

Import it after ``device.install()``; ``jobs.evaluate`` runs code where that is so. The deserialiser is SGLang's own;
the device that it would open is read where torch would call CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megarl.weight_sync import shared
from tests.pretend.mode import Pretend

_DEVICE = 6  # of rebuild_cuda_tensor's arguments
_SHAPE, _DTYPE = 1, 5


def share(gpu: str, names: Sequence[str], num_consumers: int) -> list[bytes]:
    """``share_bucket``'s payloads of bfloat16 tensors [8] on a rank whose GPU has the UUID ``gpu``."""
    with Pretend(), pretended_gpu(gpu):
        tensors = [(name, torch.ones(8, dtype=torch.bfloat16, device="cuda")) for name in names]
        return shared.share_bucket(tensors, num_consumers)


@contextlib.contextmanager
def pretended_gpu(uuid: str) -> Iterator[None]:
    """The current device has ``uuid``, and a tensor on it is reduced to the arguments that it has on CUDA."""
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(uuid=uuid)),
        mock.patch.object(shared, "reduce_tensor", _reduce),
    ):
        yield


def _reduce(tensor: Tensor) -> tuple[Any, tuple]:
    # as torch.multiprocessing.reductions.reduce_tensor gives them for CUDA: the handles are 64 bytes each
    handle, counter, event = b"h" * 64, b"c" * 64, b"e" * 64
    storage = (torch.UntypedStorage, tensor.dtype, 0, handle, tensor.numel() * tensor.element_size(), 0, False)
    arguments = (Tensor, tensor.size(), tensor.stride(), 0, *storage, counter, 0, event, True)
    return reductions.rebuild_cuda_tensor, arguments


def open_payload(payload: bytes, visible: Sequence[str]) -> int:
    """The index among the ``visible`` UUIDs of the device on which SGLang opens ``payload``; raises what it raises."""
    from megarl.rollout import cpu_shims

    cpu_shims.install()  # sglang only after it: it asks for kernels that a CPU does not have
    from sglang.srt.utils import MultiprocessingSerializer, patch_torch

    opened: list[int] = []

    def rebuild(*arguments: Any) -> Tensor:
        opened.append(arguments[_DEVICE])
        return torch.zeros(arguments[_SHAPE], dtype=arguments[_DTYPE])

    def properties(device: int) -> SimpleNamespace:
        return SimpleNamespace(uuid=visible[device])

    with (
        mock.patch.object(torch.cuda, "device_count", return_value=len(visible)),
        mock.patch.object(torch.cuda, "get_device_properties", properties),
        # what its monkey_patch_torch_reductions puts there, and what that calls
        mock.patch.object(reductions, "rebuild_cuda_tensor", patch_torch._rebuild_cuda_tensor_modified),
        mock.patch.object(reductions, "_rebuild_cuda_tensor_original", rebuild, create=True),
    ):
        MultiprocessingSerializer.deserialize(payload)
    (index,) = opened
    return index
