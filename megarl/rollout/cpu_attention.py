"""Attention of SGLang's CPU path: a decoder's over all sequences of a batch at once, a vision tower's image by image.

SGLang's ``torch_native`` backend calls ``scaled_dot_product_attention`` sequence by sequence, which costs more than the
rest of a decoding step when they are short. This one gathers the batch's keys and values, padded, and calls it once.
Its vision attention on CPU calls it once with a mask over all patches of all images together, whose cost grows with
the square of their number. This one calls it without a mask, once for all segments (images, windows) of a length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.rollout import cpu_shims

cpu_shims.install()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402
from sglang.srt.layers.attention.vision import VisionSdpaAttention  # noqa: E402

_MAX_SCORES = 1 << 26  # of one call: more are computed in several


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    query_lens: Tensor,
    seq_lens: Tensor,
    scale: float | None,
) -> Tensor:
    """Causal attention of the last tokens of S sequences to all of theirs.

    query: [T, H, D], ``query_lens`` [S] tokens of each sequence end to end. k_cache, v_cache: [slots, Hk, D].
    slots: [S, max(seq_lens)], where the tokens of each sequence lie in the caches. Returns [T, H, D].
    """
    width, longest = int(query_lens.max()), slots.shape[1]
    columns = torch.arange(width)
    inside = columns < query_lens[:, None]  # [S, width]
    padded = query.new_zeros(*inside.shape, *query.shape[1:])
    padded[inside] = query
    last = (seq_lens - query_lens)[:, None] + columns  # [S, width], the last token that each query sees
    mask = torch.arange(longest) <= last[..., None]  # [S, width, longest]
    outputs = []
    for part in torch.arange(len(slots)).split(max(1, _MAX_SCORES // (width * longest * query.shape[1]))):
        q, k, v = (t.transpose(1, 2) for t in (padded[part], k_cache[slots[part]], v_cache[slots[part]]))
        output = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), mask[part, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs)[inside]


class BatchedTorchAttention(TorchNativeAttnBackend):
    """``torch_native`` without the loop, where attention is causal and there is neither an encoder nor a window."""

    def _run_sdpa_forward_decode(self, *args: Any, **options: Any) -> Tensor:
        output = _batched(args, options, torch.ones_like(args[6]), is_causal=True)
        return super()._run_sdpa_forward_decode(*args, **options) if output is None else output

    def _run_sdpa_forward_extend(self, *args: Any, **options: Any) -> Tensor:
        output = _batched(args, options, args[8], is_causal=options["causal"])
        return super()._run_sdpa_forward_extend(*args, **options) if output is None else output


def _batched(args: tuple[Any, ...], options: dict[str, Any], query_lens: Tensor, *, is_causal: bool) -> Tensor | None:
    """The output of SGLang's ``_run_sdpa_forward_*`` with these arguments, or None where this module has no say."""
    query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens = args[:7]
    encoder_lens = args[-1]
    if encoder_lens is not None or options["sliding_window_size"] is not None or not is_causal:
        return None
    slots = req_to_token[req_pool_indices, : seq_lens.max()]
    return output.copy_(paged_attention(query, k_cache, v_cache, slots, query_lens, seq_lens, options["scaling"]))


def segmented_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Attention within each of the segments that lie end to end, all tokens of one to all of it.

    query, key, value: [T, H, D]. cu_seqlens: [S + 1], from 0 to T. Returns [T, H, D].
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    output = torch.empty_like(query)
    for length in lengths.unique():
        rows = starts[lengths == length, None] + torch.arange(length)  # [segments of this length, length]
        q, k, v = (t[rows].transpose(1, 2) for t in (query, key, value))
        output[rows] = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return output


class SegmentedVisionAttention(VisionSdpaAttention):
    """``sdpa`` without its mask, where segments lie end to end and nothing else is asked for."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bsz: int,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """q: [T, H, D]; k, v: [T, Hk, D]. Returns [T, H, D]; called by SGLang's ``VisionAttention``."""
        is_plain = self.flatten_batch and not self.softmax_in_single_precision and not self.dropout
        if cu_seqlens is None or attention_mask is not None or not is_plain:
            return super().forward(q, k, v, bsz, cu_seqlens, attention_mask, **options)
        return segmented_attention(q, k, v, cu_seqlens, self.scale)
