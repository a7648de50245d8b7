"""Attention over packed sequences, and the norm that sequence parallelism needs, as parts of a Megatron-Core layer.

Megatron-Core's own attention takes no packed sequences without Transformer Engine. ``TorchAttention`` does, with torch
alone: ``varlen_attn`` on a GPU, and elsewhere padded calls of ``scaled_dot_product_attention`` on groups of sequences
of like length, so that the cost is the sum of L^2 and not T^2. Under context parallelism a rank has its chunks of
every sequence (``parallel/context.py``) and finds the rest by ``parallel.cp_comm_type``.

Shapes: T packed tokens, S sequences, L tokens of a sequence, H heads, D channels of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.parallel import context, groups
from megarl.parallel.flex import BlockMask, block_mask, flex_packed
from megarl.parallel.layout import SequenceLayout, Span, sequence_spans
from megarl.parallel.ring import RingLayouts, ring_attention
from megarl.utils.transfer import send


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient is summed over tensor-parallel ranks when they hold different tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=None if config.use_cpu_initialization else "cuda"
        )
        self.weight.sequence_parallel = config.sequence_parallel  # read by mcore's finalize_model_grads

    def forward(self, x: Tensor) -> Tensor:
        # one node to autograd, though the CPU has no fused kernel: the parts of the input's gradient are summed here,
        # before the residual's is added, as they are when the norm is recomputed, which then changes no bit
        return super().forward(x.view_as(x))


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm of a vision tower, where every tensor-parallel rank holds all tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert not config.sequence_parallel
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=None if config.use_cpu_initialization else "cuda"
        )


@dataclass
class Varlen:
    """The arguments of a varlen kernel; causality is aligned at the ends of queries and keys."""

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    keys: Tensor | None = None  # which keys to lay end to end; None: all, as they are


@dataclass
class PackedSequences(PackedSeqParams):
    """What a Megatron-Core layer is told of a pack, and what our attention derives from it once for all layers.

    To mcore, which rotates queries and keys sequence by sequence, it is one long sequence: the rotary frequencies that
    are passed beside it are per token, [T, 1, 1, D], this rank's tokens only.

    All is planned on the host, which never reads the device: whoever waits for it finds its queue empty.
    """

    bounds: Tensor | None = None  # [S + 1] int32 on the host, what cu_seqlens_q is on the device
    parents: Tensor | None = None  # [S] int32 on the host
    size: int = 1  # of the context-parallel group
    rank: int = 0

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.cu_seqlens_q.device

    @cached_property
    def here(self) -> Tensor:
        """Places in the pack of this rank's tokens: [T / size] int64 on the host."""
        return context.local_positions(self.bounds, self.size, self.rank)

    @cached_property
    def whole(self) -> SequenceLayout:
        """Whole sequences, in the order of the pack."""
        return SequenceLayout(sequence_spans(self.bounds, self.parents), self.device)

    @cached_property
    def _gathered(self) -> Tensor:
        return context.gathered_places(self.bounds, self.size)

    @cached_property
    def places(self) -> Tensor:
        """Places in the pack of the tokens of all ranks, laid end to end: [T] int64."""
        return send(self._gathered, self.device)

    @cached_property
    def order(self) -> Tensor:
        """The inverse of ``places``."""
        return send(self._gathered.argsort(), self.device)

    @cached_property
    def chunks(self) -> list[Span]:
        """This rank's chunks of the sequences as queries, among all keys of the pack."""
        bounds, spans, start = self.bounds.tolist(), [], 0
        for first, last in pairwise(bounds):
            length = (last - first) // (2 * self.size)
            for number in (self.rank, 2 * self.size - 1 - self.rank):
                ahead = number * length
                spans.append(Span(start, length, own=first + ahead, first=first, count=ahead))
                start += length
        return spans

    @cached_property
    def chunk_layout(self) -> SequenceLayout:
        return SequenceLayout(self.chunks, self.device)

    @cached_property
    def ring(self) -> RingLayouts:
        return RingLayouts(self.bounds // self.size, self.device)

    @cached_property
    def varlen(self) -> Varlen:
        """Whole sequences, in the order of the pack."""
        return Varlen(self.cu_seqlens_q, self.cu_seqlens_kv, self.max_seqlen_q, self.max_seqlen_kv)

    def flex(self, causal: bool) -> BlockMask:
        """Whole sequences, in the order of the pack."""
        if causal not in self._flex:
            self._flex[causal] = block_mask(self.bounds, self.parents, causal=causal, device=self.device)
        return self._flex[causal]

    @cached_property
    def _flex(self) -> dict[bool, BlockMask]:
        return {}

    @cached_property
    def chunk_varlen(self) -> Varlen:
        """``chunks`` for a varlen kernel."""
        queries, keys = ([s.length for s in self.chunks], [s.count + s.length for s in self.chunks])
        bounds = [send(torch.tensor([0, *sizes]).cumsum(0).int(), self.device) for sizes in (queries, keys)]
        index = [torch.arange(s.first, s.first + s.count + s.length) for s in self.chunks]
        return Varlen(*bounds, max(queries), max(keys), send(torch.cat(index), self.device))


def packed_sequences(
    cu_seqlens: Tensor,
    parents: Tensor | None = None,
    *,
    device: torch.device | None = None,
    cp_group: dist.ProcessGroup | None = None,
    fused_rope: bool = False,
) -> PackedSequences:
    """Describe T tokens on ``device`` packed end to end to a Megatron-Core layer.

    cu_seqlens: [S + 1] int32 from 0 to T; it and ``parents`` belong on the host, and None for ``device`` means there.
    ``fused_rope``: the layers' ``apply_rope_fusion``, whose kernel reads its sequences on the device.

    parents: [S] int32, the sequence whose tokens each one also attends to, as if they stood before it, or -1; a parent
    has no parent. With ``cp_group`` the layer gets this rank's chunks of the sequences, each a multiple of
    2 * cp_group.size() tokens long (``ValueError`` if not). Rotary frequencies passed beside it are per token.
    """
    size, rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    device = cu_seqlens.device if device is None else device
    bounds, parents = cu_seqlens.cpu(), None if parents is None else parents.cpu()
    lengths = bounds.diff().tolist()
    if size > 1:
        context.check_chunks(lengths, size)
        if parents is not None:
            raise ValueError("sequences that continue a shared prompt cannot be cut for context parallelism")
    longest = max(lengths)
    rotated = bounds[[0, -1]] // size  # mcore's own rotation reads it number by number, twice a layer
    if fused_rope:
        rotated = send(rotated, device)
    on_device = send(bounds, device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=rotated,
        cu_seqlens_kv_padded=rotated,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
        parents=parents,
        size=size,
        rank=rank,
    )


def sdpa_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, *, scale: float, causal: bool
) -> Tensor:
    """Attention within each span: query [T, H, D], key and value [K, Hk, D] -> [T, H, D]."""
    if layout.uniform is not None:
        q, k, v = (t.unflatten(0, (-1, layout.uniform)) for t in (query, key, value))
        return _sdpa(q, k, v, None, scale, causal).flatten(0, 1)
    outputs = []
    for bucket in layout.buckets:
        q, k, v = query[bucket.rows], key[bucket.keys], value[bucket.keys]
        if bucket.visible is not None:
            assert causal
            outputs.append(_sdpa(q, k, v, bucket.visible, scale, False).flatten(0, 1))
            continue
        # padding is behind the tokens, where causal attention does not look
        mask = None if causal or bucket.valid is None else bucket.valid[:, None, None]
        outputs.append(_sdpa(q, k, v, mask, scale, causal).flatten(0, 1))
    return torch.cat(outputs)[layout.restore]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    # [S, L, H, D] in and out
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


def varlen_packed(query: Tensor, key: Tensor, value: Tensor, varlen: Varlen, *, scale: float, causal: bool) -> Tensor:
    """``sdpa_packed`` with torch's flash attention: CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn  # needs the flash kernels of a CUDA build

    if varlen.keys is not None:
        key, value = key[varlen.keys], value[varlen.keys]
    return varlen_attn(
        query,
        key,
        value,
        varlen.cu_seqlens_q,
        varlen.cu_seqlens_kv,
        varlen.max_seqlen_q,
        varlen.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )


class PackedSelfAttention(SelfAttention):
    """Self-attention whose rotary frequencies are those of this rank's tokens, context parallel or not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # read when queries and keys are rotated: mcore would look for this rank's part of the frequencies
        self.pg_collection = copy.copy(self.pg_collection)
        self.pg_collection.cp = groups.solo_group()


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
        assert pg_collection is not None
        self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type
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
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [T, Hk, D] of this rank's tokens -> [T, H * D], sequences apart."""
        assert packed_seq_params is not None
        assert attention_mask is None
        assert attention_bias is None
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if packed_seq_params.size == 1:
            return self._attend(query, key, value, packed_seq_params, causal).flatten(1)
        assert causal
        assert packed_seq_params.size == self.cp_group.size()
        exchange = {"all_gather": self._all_gather, "a2a": self._all_to_all, "p2p": self._ring}[self.cp_comm_type]
        return exchange(query, key, value, packed_seq_params).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, causal: bool) -> Tensor:
        """Whole sequences attend to themselves."""
        if self.backend == "flex":
            return flex_packed(query, key, value, packed.flex(causal), scale=self.scale)
        if self._flash(query) and packed.parents is None:
            return varlen_packed(query, key, value, packed.varlen, scale=self.scale, causal=causal)
        return sdpa_packed(query, key, value, packed.whole, scale=self.scale, causal=causal)

    def _all_gather(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """This rank's queries attend to the keys and values of all ranks."""
        key, value = context.gather(torch.stack([key, value], 1), self.cp_group)[packed.order].unbind(1)
        if self._flash(query):
            return varlen_packed(query, key, value, packed.chunk_varlen, scale=self.scale, causal=True)
        return sdpa_packed(query, key, value, packed.chunk_layout, scale=self.scale, causal=True)

    def _all_to_all(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Whole sequences attend to themselves in this rank's share of the heads (Ulysses, arXiv:2309.14509)."""
        query, key, value = (context.tokens_to_heads(t, self.cp_group)[packed.order] for t in (query, key, value))
        output = self._attend(query, key, value, packed, causal=True)
        return context.heads_to_tokens(output[packed.places], self.cp_group)

    def _ring(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Keys and values go around the ranks, and every rank's queries meet them in turn."""
        return ring_attention(query, key, value, packed.ring, scale=self.scale, group=self.cp_group)

    def _flash(self, query: Tensor) -> bool:
        half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        return self.backend == "varlen" or (self.backend == "auto" and half)
