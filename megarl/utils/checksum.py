"""A checksum of a tensor that is the same on every device and in every process."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as int64


def tensor_checksum(tensor: Tensor) -> str:
    """Hash the shape, dtype and bits of ``tensor``: a position-weighted 64-bit sum, computed where the tensor lives."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).to(
        torch.int64
    )
    positions = torch.arange(1, len(bits) + 1, device=bits.device, dtype=torch.int64) * _MULTIPLIER
    positions ^= positions >> 29
    value = int(((bits + 1) * (positions | 1)).sum()) & (2**64 - 1)
    return f"{'x'.join(map(str, tensor.shape))}:{str(tensor.dtype).removeprefix('torch.')}:{value:016x}"
