"""FLOPs of a model against a count by hand, and what devices promise."""

from __future__ import annotations

import pytest

from megarl.utils.flops import forward_flops, promised_flops, training_flops


def test_a_layer_counted_by_hand():
    """Two sequences of 3 and 5 tokens; hidden 8, two heads of 4 and one of keys and values, gated MLP of 16."""
    qkv, out, mlp = 8 * (2 + 1 + 1) * 4, 2 * 4 * 8, 3 * 8 * 16
    products = 2 * (3 + 5) * (qkv + out + mlp)
    scores = 2 * 2 * (9 + 25) * 4  # q k: a multiplication and an addition, two heads, all pairs, four channels
    weighted = scores  # and as many to weigh the values
    found = forward_flops(weights=qkv + out + mlp, tokens=8, attention=1 * 2 * 4, squares=9 + 25)
    assert found == products + scores + weighted == 9216 + 544 * 2
    assert training_flops(found) == 3 * found


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_promise(name, flops):
    assert promised_flops(name) == flops
