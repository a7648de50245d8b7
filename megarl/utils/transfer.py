"""Tensors on their way from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the host, on ``device``, without a wait for what the device has still to do.

    A copy from memory that is not pinned waits for everything that is queued before it, also with ``non_blocking``.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)
