"""Transformer Engine's attention over ``PackedSequences``; importing this needs Transformer Engine."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarl.parallel.attention import PackedSequences


class PackedTEAttention(TEDotProductAttention):
    """Core attention of a layer spec; it exchanges tokens by ``cp_comm_type`` itself, cut as ``context.py`` says."""

    def forward(self, *args: Any, packed_seq_params: PackedSequences, **kwargs: Any) -> Tensor:
        """``TEDotProductAttention.forward``, told of the sequences instead of the one that mcore rotates."""
        p = packed_seq_params
        assert p.parents is None
        sequences = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=p.cu_seqlens_q,
            cu_seqlens_kv=p.cu_seqlens_kv,
            # padding behind a sequence counts as its own, where causal attention does not look
            cu_seqlens_q_padded=p.cu_seqlens_q if p.size > 1 else None,
            cu_seqlens_kv_padded=p.cu_seqlens_kv if p.size > 1 else None,
            max_seqlen_q=p.max_seqlen_q,
            max_seqlen_kv=p.max_seqlen_kv,
        )
        return super().forward(*args, packed_seq_params=sequences, **kwargs)
