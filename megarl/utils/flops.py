"""Floating-point operations of training, and what a device promises: how well a step uses the hardware (MFU)."""

from __future__ import annotations

# FLOP/s of dense bfloat16 products by a part of the device's name, the longer names first (NVIDIA's data sheets)
PROMISED = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}


def promised_flops(device_name: str) -> float | None:
    """FLOP/s that a device promises for dense bfloat16; None: it is not in the table."""
    return next((flops for name, flops in PROMISED.items() if name in device_name), None)


def forward_flops(*, weights: float, tokens: float, attention: float = 0.0, squares: float = 0.0) -> float:
    """FLOPs of a forward pass, a multiplication and an addition counted as two.

    ``weights``: numbers of the matrices that each of ``tokens`` is multiplied with; ``attention``: layers x heads x
    channels of a head; ``squares``: the sum of squared lengths of sequences. As verl counts, causal attention is not
    halved.
    """
    return 2.0 * weights * tokens + 4.0 * attention * squares


def training_flops(forward: float) -> float:
    """Of a forward and a backward pass, recomputation not counted."""
    return 3.0 * forward
