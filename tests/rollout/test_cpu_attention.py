"""Batched attention of the CPU engine against one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F

from megarl.rollout import cpu_attention


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("max_scores", [1 << 26, 1])
def test_a_batch_equals_its_sequences(monkeypatch, decode, max_scores):
    monkeypatch.setattr(cpu_attention, "_MAX_SCORES", max_scores)
    torch.manual_seed(0)
    seq_lens = torch.tensor([5, 1, 9, 4])
    query_lens = torch.ones_like(seq_lens) if decode else torch.tensor([5, 1, 3, 2])
    k_cache, v_cache = torch.randn(2, 40, 2, 8)
    slots = torch.randperm(40)[: 4 * 9].view(4, 9)
    query = torch.randn(int(query_lens.sum()), 4, 8)
    output = cpu_attention.paged_attention(query, k_cache, v_cache, slots, query_lens, seq_lens, 0.3)
    expected = []
    for index, (q, length) in enumerate(zip(query.split(query_lens.tolist()), seq_lens.tolist(), strict=True)):
        k, v = (cache[slots[index, :length]].transpose(0, 1).repeat_interleave(2, 0) for cache in (k_cache, v_cache))
        mask = torch.ones(len(q), length, dtype=torch.bool).tril(length - len(q))
        expected.append(F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask, scale=0.3).transpose(0, 1))
    torch.testing.assert_close(output, torch.cat(expected))
