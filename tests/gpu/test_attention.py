"""The attention kernels of a GPU against each sequence alone in float64, at the head sizes of published models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megarl.parallel.attention import packed_sequences, sdpa_packed, varlen_packed
from megarl.parallel.flex import flex_packed
from tests.gpu.processes import DEVICES
from tests.parallel.test_attention import naive

HEAD_SIZES = [64, 72, 80, 128]  # language models, and towers of Qwen2-VL (80), SigLIP (72)
LENGTHS = [1, 130, 17, 64, 257, 33]
HEADS = [(8, 8), (14, 2)]  # and grouped queries, as many to a key as Qwen2.5-VL-7B has
CUDA = "cuda"
TOLERANCE = 1e-2  # relative to the norm, of bfloat16's 8 bits


def tensors(device: str, size: int, heads: int, groups: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output: [T, H, D] in bfloat16."""
    torch.manual_seed(size)
    return [torch.randn(sum(LENGTHS), n, size).bfloat16().to(device) for n in (heads, groups, groups, heads)]


def bounds(device: str) -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)


def with_gradients(function: object, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output of ``function(query, key, value)`` and their gradients, in float64."""
    leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in inputs[:3]]
    output = function(*leaves)
    (output * inputs[3].to(output.dtype)).sum().backward()
    return [t.detach().double().cpu() for t in (output, *(leaf.grad for leaf in leaves))]


def expected(inputs: list[Tensor], causal: bool) -> list[Tensor]:
    inputs = [t.cpu() for t in inputs]
    scale = inputs[0].shape[-1] ** -0.5
    return with_gradients(
        lambda q, k, v: naive(q, k, v, bounds("cpu"), scale=scale, causal=causal), inputs, torch.float64
    )


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for name, mine, other in zip(("output", "query", "key", "value"), ours, theirs, strict=False):
        error = float((mine - other).norm() / other.norm())
        assert error < tolerance, f"{name}: {error:.4f}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_sdpa(device, size, heads, groups, causal):
    inputs, packed = tensors(device, size, heads, groups), packed_sequences(bounds(device))
    ours = with_gradients(lambda q, k, v: sdpa_packed(q, k, v, packed.whole, scale=size**-0.5, causal=causal), inputs)
    assert_near(ours, expected(inputs, causal))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_varlen(size, heads, groups, causal):
    inputs, packed = tensors(CUDA, size, heads, groups), packed_sequences(bounds(CUDA))
    ours = with_gradients(
        lambda q, k, v: varlen_packed(q, k, v, packed.varlen, scale=size**-0.5, causal=causal), inputs
    )
    assert_near(ours, expected(inputs, causal))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 1])
def test_varlen_of_a_context_parallel_rank(rank):
    """Its chunks of the queries see the keys that they may, wherever these lie in the pack."""
    lengths, size = [64, 132, 256], 128
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(CUDA)
    torch.manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), n, size).bfloat16().to(CUDA) for n in (8, 2, 2))
    group = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    packed = packed_sequences(cu_seqlens, cp_group=group)
    whole = naive(*(t.double().cpu() for t in (query, key, value)), cu_seqlens.cpu(), scale=size**-0.5, causal=True)
    here = packed.here.to(CUDA)
    ours = varlen_packed(query[here], key, value, packed.chunk_varlen, scale=size**-0.5, causal=True)
    assert_near([ours.double().cpu()], [whole[here.cpu()]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), HEADS[1:])
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_flex(device, size, heads, groups, causal):
    """Forward only on a CPU, where torch computes no gradient of it."""
    inputs, packed = tensors(device, size, heads, groups), packed_sequences(bounds(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_packed(q, k, v, packed.flex(causal), scale=size**-0.5)

    ours = [attend(*inputs[:3]).double()] if device == "cpu" else with_gradients(attend, inputs)
    assert_near(ours, expected(inputs, causal))


@pytest.mark.gpu
def test_flex_with_shared_prompts():
    parents = torch.tensor([-1, 0, 0, -1, 3, -1])
    inputs, packed = tensors(CUDA, 128, 14, 2), packed_sequences(bounds(CUDA), parents.to(CUDA))
    scale = 128**-0.5
    theirs = with_gradients(
        lambda q, k, v: sdpa_packed(q, k, v, packed.whole, scale=scale, causal=True), inputs, torch.float32
    )
    assert_near(with_gradients(lambda q, k, v: flex_packed(q, k, v, packed.flex(True), scale=scale), inputs), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_transformer_engine(size, heads, groups, causal):
    te = pytest.importorskip("transformer_engine.pytorch")
    inputs, cu_seqlens = tensors(CUDA, size, heads, groups), bounds(CUDA)
    attention = te.DotProductAttention(
        heads, size, num_gqa_groups=groups, qkv_format="thd", attn_mask_type="padding_causal" if causal else "padding"
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(LENGTHS),
            max_seqlen_kv=max(LENGTHS),
        )
        return output.view(q.shape)

    assert_near(with_gradients(attend, inputs), expected(inputs, causal))
