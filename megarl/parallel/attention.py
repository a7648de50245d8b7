"""Attention over packed sequences, and the norm that sequence parallelism needs, as parts of a Megatron-Core layer.

Megatron-Core's own attention takes no packed sequences without Transformer Engine. ``TorchAttention`` does, with torch
alone: ``varlen_attn`` on a GPU, and elsewhere padded calls of ``scaled_dot_product_attention`` on groups of sequences
of like length, so that the cost is the sum of L^2 and not T^2.

Shapes: T packed tokens, S sequences, L tokens of a sequence, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient is summed over tensor-parallel ranks when they hold different tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=None if config.use_cpu_initialization else "cuda"
        )
        self.weight.sequence_parallel = config.sequence_parallel  # read by mcore's finalize_model_grads


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm of a vision tower, where every tensor-parallel rank holds all tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert not config.sequence_parallel
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=None if config.use_cpu_initialization else "cuda"
        )


@dataclass
class _Bucket:
    rows: Tensor  # [S, L] int64, tokens of S sequences of at most L; beyond a sequence's end, any valid token
    mask: Tensor | None  # [S, 1, 1, L] bool, True on tokens; None: all have L
    context: Tensor | None  # [S, C + L] int64, the parents' tokens and then ``rows``; None: without parents
    visible: Tensor | None  # [S, 1, L, C + L] bool, what of the context each token attends to


class SequenceLayout:
    """How packed sequences are gathered into padded batches and back; made once a pack, shared by all layers."""

    def __init__(self, cu_seqlens: Tensor, parents: Tensor | None = None) -> None:
        bounds = list(pairwise(cu_seqlens.tolist()))
        before = [(0, 0)] * len(bounds) if parents is None else [bounds[p] if p >= 0 else (0, 0) for p in parents]
        spans = [
            (start, end - start, first, last - first)
            for (start, end), (first, last) in zip(bounds, before, strict=True)
            if end > start
        ]
        self.num_tokens = bounds[-1][1]
        self.uniform = None  # the length of all sequences
        self.buckets: list[_Bucket] = []
        if parents is None and len({length for _, length, *_ in spans}) == 1:
            self.uniform = spans[0][1]
            return
        groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for span in spans:
            groups.setdefault(((span[1] - 1).bit_length(), span[3].bit_length()), []).append(span)
        restore = torch.empty(self.num_tokens, dtype=torch.int64)
        offset = 0
        for members in groups.values():
            starts, lengths, firsts, counts = torch.tensor(members).unsqueeze(-1).unbind(1)  # [S, 1] each
            width, longest = int(lengths.max()), int(counts.max())
            columns = torch.arange(width)
            inside = columns < lengths
            rows = starts + torch.minimum(columns, lengths - 1)
            restore[rows[inside]] = offset + torch.arange(rows.numel()).view_as(rows)[inside]
            offset += rows.numel()
            mask = None if bool(inside.all()) else inside[:, None, None].to(cu_seqlens.device)
            context = visible = None
            if longest:
                ahead = torch.arange(longest)
                context = torch.cat([firsts + torch.minimum(ahead, counts - 1), rows], dim=1).to(cu_seqlens.device)
                seen = (ahead < counts)[:, None].expand(-1, width, -1)
                causal = (columns <= columns[:, None]).expand(len(members), -1, -1)
                visible = torch.cat([seen, causal], dim=2)[:, None].to(cu_seqlens.device)
            self.buckets.append(_Bucket(rows.to(cu_seqlens.device), mask, context, visible))
        self.restore = restore.to(cu_seqlens.device)  # [T], place of each token in the concatenated buckets


@dataclass
class PackedSequences(PackedSeqParams):
    """``PackedSeqParams`` that also know shared prompts, and keep what our attention derives from them."""

    parents: Tensor | None = None

    @cached_property
    def layout(self) -> SequenceLayout:
        return SequenceLayout(self.cu_seqlens_q, self.parents)


def packed_sequences(
    cu_seqlens: Tensor, parents: Tensor | None = None, *, transformer_impl: str = "local"
) -> PackedSeqParams:
    """Describe T tokens packed end to end to a Megatron-Core layer; cu_seqlens: [S + 1] int32 from 0 to T.

    parents: [S] int32, the sequence whose tokens each one also attends to, as if they stood before it, or -1; a parent
    has no parent. Rotary frequencies passed beside it are per token ([T, 1, 1, D]).
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    whole = {}
    if transformer_impl == "local":
        # mcore applies rotary frequencies sequence by sequence along *_padded; ours are per token: one slice does
        whole = dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), cu_seqlens[[0, -1]])
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        parents=parents,
        **whole,
    )


def sdpa_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, *, scale: float, causal: bool
) -> Tensor:
    """Attention within each sequence: query [T, H, D], key and value [T, Hk, D] -> [T, H, D]."""
    if layout.uniform is not None:
        q, k, v = (t.unflatten(0, (-1, layout.uniform)) for t in (query, key, value))
        return _sdpa(q, k, v, None, scale, causal).flatten(0, 1)
    outputs = []
    for bucket in layout.buckets:
        if bucket.context is not None:
            assert causal
            q, k, v = query[bucket.rows], key[bucket.context], value[bucket.context]
            outputs.append(_sdpa(q, k, v, bucket.visible, scale, False).flatten(0, 1))
            continue
        q, k, v = (t[bucket.rows] for t in (query, key, value))
        # padding is behind the tokens, where causal attention does not look
        outputs.append(_sdpa(q, k, v, None if causal else bucket.mask, scale, causal).flatten(0, 1))
    return torch.cat(outputs)[layout.restore]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    # [S, L, H, D] in and out
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


def varlen_packed(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, *, scale: float, causal: bool
) -> Tensor:
    """``sdpa_packed`` with torch's flash attention: CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn  # needs the flash kernels of a CUDA build

    return varlen_attn(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )


class TorchAttention(MegatronModule):
    """Core attention of a layer spec for packed (thd) sequences; backend: ``model.attention_backend``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout={dropout}: the local attention has none")
        self.attn_mask_type = attn_mask_type
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [T, Hk, D] -> [T, H * D], each sequence attending to itself."""
        assert packed_seq_params is not None
        assert attention_mask is None
        assert attention_bias is None
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        varlen = self.backend == "varlen"
        if self.backend == "auto":
            flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
            varlen = flash and packed_seq_params.parents is None
        if varlen:
            output = varlen_packed(query, key, value, packed_seq_params, scale=self.scale, causal=causal)
        else:
            layout = packed_seq_params.layout
            output = sdpa_packed(query, key, value, layout, scale=self.scale, causal=causal)
        return output.flatten(1)
