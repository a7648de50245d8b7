"""Kernels that torch has for CUDA only, written out for CPU and meta tensors, with the conditions the kernels set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tests.pretend.tensors import CudaTensor

aten = torch.ops.aten


def _mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    if left.is_meta:
        return torch.empty(left.shape[0], right.shape[1], dtype=out_dtype, device="meta")
    return left.to(out_dtype) @ right.to(out_dtype)


def _mm_out(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out if out.is_meta else out.copy_(_mm(left, right, out_dtype))


def _addmm_out(total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out if out.is_meta else out.copy_(total + _mm(left, right, out_dtype))


# ---- flash attention over packed sequences: [T, H, D], keys and values [K, Hk, D] ------------------------------------


def _spans(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(q) - 1):
        if q[i + 1] > q[i]:
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _probabilities(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = query @ key.transpose(1, 2) * scale  # [H, L, K]
    if causal:  # aligned at the ends
        length, keys = scores.shape[-2:]
        visible = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1)


def _heads_first(tensor: Tensor, repeats: int = 1) -> Tensor:
    return tensor.float().repeat_interleave(repeats, 1).transpose(0, 1)


def _is_causal(is_causal: bool, window_size: Sequence[int] | None) -> bool:
    return bool(is_causal) or (window_size is not None and tuple(window_size) == (-1, 0))


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert tensor.dtype in (torch.bfloat16, torch.float16), f"varlen_attn: {name} is {tensor.dtype}"
        assert tensor.stride(-1) == 1, f"varlen_attn: the last dimension of {name} is not contiguous"
    assert query.shape[-1] % 8 == 0, f"varlen_attn: head size {query.shape[-1]}"
    assert query.shape[-1] <= 256, f"varlen_attn: head size {query.shape[-1]}"
    assert cu_q.dtype is torch.int32, cu_q.dtype
    assert cu_k.dtype is torch.int32, cu_k.dtype
    log_sums = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    output = torch.empty_like(query) if query.is_meta else torch.zeros_like(query)
    if not query.is_meta:
        scale, causal = scale or query.shape[-1] ** -0.5, _is_causal(is_causal, window_size)
        repeats = query.shape[1] // key.shape[1]
        for own, seen in _spans(cu_q, cu_k):
            p = _probabilities(_heads_first(query[own]), _heads_first(key[seen], repeats), causal, scale)
            output[own] = (p @ _heads_first(value[seen], repeats)).transpose(0, 1).to(output.dtype)
    return output, log_sums, random_state


def _varlen_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    random_state: Tensor,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    if query.is_meta:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grads = [torch.zeros_like(t, dtype=torch.float32) for t in (query, key, value)]
    repeats = query.shape[1] // key.shape[1]
    scale, causal = scale or query.shape[-1] ** -0.5, _is_causal(is_causal, window_size)
    for own, seen in _spans(cu_q, cu_k):
        q, g = _heads_first(query[own]), _heads_first(grad[own])
        k, v = _heads_first(key[seen], repeats), _heads_first(value[seen], repeats)
        p = _probabilities(q, k, causal, scale)
        dp = g @ v.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        grads[0][own] += (ds @ k).transpose(0, 1)
        for total, part in ((grads[1], ds.transpose(1, 2) @ q), (grads[2], p.transpose(1, 2) @ g)):
            total[seen] += part.transpose(0, 1).unflatten(1, (-1, repeats)).sum(2)
    return tuple(g.to(query.dtype) for g in grads)


# ---- RMSNorm: on CUDA aten::_fused_rms_norm is one node of autograd's, elsewhere it is composite ---------------------


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(x.float().pow(2).mean(tuple(range(-len(shape), 0)), keepdim=True) + eps)
    normed = x.float() * scale
    return (normed if weight is None else normed * weight.float()).to(x.dtype), scale


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: Sequence[int], scale: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if x.is_meta:
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
    normed, inside = x.float() * scale, grad.float() if weight is None else grad.float() * weight.float()
    mean = (inside * normed).mean(tuple(range(-len(shape), 0)), keepdim=True)
    leading = tuple(range(x.dim() - len(shape)))
    grad_weight = None if weight is None else (grad.float() * normed).sum(leading).to(weight.dtype)
    return (scale * (inside - normed * mean)).to(x.dtype), grad_weight


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: CudaTensor, shape: tuple[int, ...], weight: CudaTensor | None, eps: float | None
    ) -> CudaTensor:
        output, scale = _rms_norm(x.inner, shape, None if weight is None else weight.inner, eps)
        ctx.save_for_backward(x, weight, CudaTensor(scale))
        ctx.shape = shape
        return CudaTensor(output)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: CudaTensor) -> tuple[CudaTensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        inner = None if weight is None else weight.inner
        grad_x, grad_weight = _rms_norm_backward(grad.inner, x.inner, ctx.shape, scale.inner, inner)
        return CudaTensor(grad_x), None, None if grad_weight is None else CudaTensor(grad_weight), None


_composite_rms_norm = torch.nn.functional.rms_norm


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``torch.nn.functional.rms_norm`` that takes the fused kernel where CUDA does."""
    if isinstance(x, CudaTensor) and (weight is None or weight.dtype == x.dtype):
        return _FusedRMSNorm.apply(x, tuple(normalized_shape), weight, eps)
    return _composite_rms_norm(x, normalized_shape, weight, eps)


STAND_INS: dict[Any, Callable] = {
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm_out,
    aten.addmm.dtype_out: _addmm_out,
    torch.ops.torch_attn._varlen_attn.default: _varlen,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
    aten._fused_sdp_choice.default: lambda *_, **__: 0,  # the mathematical form
}
