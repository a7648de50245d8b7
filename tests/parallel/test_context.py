"""Attention that ranks share gives what one rank gives, forward and backward, however they exchange tokens."""

import re

import pytest
import torch

from megarl.parallel.attention import packed_sequences, sdpa_packed
from megarl.parallel.context import gathered_places, local_positions
from tests.parallel.test_attention import naive

LENGTHS = [16, 40, 8, 64, 16]  # multiples of 2 x 4


def test_chunks_are_dealt_zigzag():
    cu_seqlens = torch.tensor([0, 8, 8, 12], dtype=torch.int32)
    assert local_positions(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_positions(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert local_positions(cu_seqlens, 1, 0).tolist() == list(range(12))
    assert gathered_places(cu_seqlens, 2).tolist() == [0, 1, 6, 7, 8, 11, 2, 3, 4, 5, 9, 10]


def exchange(comm: str, lengths: list[int], heads: int, kv_heads: int) -> list[float]:
    """On a rank: the largest differences of output and gradients of query, key and value from the naive ones."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megarl.config import ParallelConfig
    from megarl.parallel import groups
    from megarl.parallel.attention import TorchAttention

    size = torch.distributed.get_world_size()
    groups.initialize(ParallelConfig(context_parallel_size=size), seed=0)
    collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    config = TransformerConfig(
        num_layers=1, hidden_size=8 * heads, num_attention_heads=heads, kv_channels=8, attention_dropout=0.0
    )
    layer = TorchAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type=comm, pg_collection=collection)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = (
        torch.randn(sum(lengths), h, 8, dtype=torch.float64, generator=generator)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    whole = [t.clone().requires_grad_() for t in (query, key, value)]
    expected = naive(*whole, cu_seqlens, scale=8**-0.5, causal=True)
    (expected * weight).sum().backward()
    here = local_positions(cu_seqlens, size, collection.cp.rank())
    part = [t[here].requires_grad_() for t in (query, key, value)]
    output = layer(*part, None, packed_seq_params=packed_sequences(cu_seqlens, cp_group=collection.cp))
    (output * weight[here].flatten(1)).sum().backward()
    pairs = [(output, expected[here].flatten(1)), *((p.grad, w.grad[here]) for p, w in zip(part, whole, strict=True))]
    return [float((ours - theirs).abs().max()) for ours, theirs in pairs]


@pytest.mark.parametrize("comm", ["all_gather", "a2a", "p2p"])
@pytest.mark.parametrize(("size", "lengths"), [(2, [4, 20, 8, 36]), (4, LENGTHS), (3, [12, 6, 18]), (2, [8, 8])])
def test_shared_attention_equals_whole(pool, comm, size, lengths):
    heads, kv_heads = (6, 3) if size == 3 else (8, 4)
    for differences in pool.run(exchange, size, comm, lengths, heads, kv_heads):
        assert max(differences) < 1e-12


def sums(values: list[float]) -> tuple[float, float]:
    import torch.distributed as dist

    from megarl.parallel.context import sum_over

    mine = torch.tensor(values[dist.get_rank()], dtype=torch.float64, requires_grad=True)
    total = sum_over(mine, dist.group.WORLD)
    loss = (total * (1 + dist.get_rank())).square()  # every rank makes something else of the total
    loss.backward()
    return float(total.detach()), float(mine.grad)


def test_a_sum_over_ranks_has_the_gradient_of_all_losses(pool):
    # d/dx of (x + y)^2 + (2 x + 2 y)^2
    assert pool.run(sums, 2, [1.5, -0.25]) == [(1.25, 12.5), (1.25, 12.5)]


class _TwoRanks:
    def __init__(self, rank: int = 0) -> None:
        self._rank = rank

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("rank", [0, 1])
def test_a_varlen_kernel_is_told_the_same_as_padded_batches(rank):
    """Its arguments, read as the kernels read them: queries and keys of an entry end at the same place."""
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 20, 8, 36]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = packed_sequences(cu_seqlens, cp_group=_TwoRanks(rank))
    query, key, value = (torch.randn(n, 2, 8, dtype=torch.float64, generator=generator) for n in (34, 68, 68))
    varlen, outputs = packed.chunk_varlen, []
    for entry in range(len(varlen.cu_seqlens_q) - 1):
        q = query[varlen.cu_seqlens_q[entry] : varlen.cu_seqlens_q[entry + 1]]
        at = varlen.keys[varlen.cu_seqlens_kv[entry] : varlen.cu_seqlens_kv[entry + 1]]
        scores = torch.einsum("qhd,khd->hqk", q, key[at]) * 0.3
        hidden = torch.ones(len(q), len(at), dtype=torch.bool).triu(1 + len(at) - len(q))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[at]))
    padded = sdpa_packed(query, key, value, packed.chunk_layout, scale=0.3, causal=True)
    torch.testing.assert_close(torch.cat(outputs), padded)
    assert (varlen.max_seqlen_q, varlen.max_seqlen_kv) == (9, 36 if rank == 0 else 27)


def test_what_cannot_be_cut_is_refused():
    cu_seqlens = torch.tensor([0, 8, 14], dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("a sequence of 6 tokens cannot be cut into 2 x 2 chunks")):
        packed_sequences(cu_seqlens, cp_group=_TwoRanks())
    with pytest.raises(ValueError, match="shared prompt"):
        packed_sequences(cu_seqlens[:2], torch.tensor([-1]), cp_group=_TwoRanks())
