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


@pytest.mark.parametrize("decode", [True, False])
def test_it_takes_the_place_of_sglangs_loop(decode):
    """The same call to SGLang's backend and to ours, as ``forward_decode`` and ``forward_extend`` make it."""
    torch.manual_seed(0)
    seq_lens = torch.tensor([5, 1, 9, 4])
    query_lens = torch.ones_like(seq_lens) if decode else torch.tensor([5, 1, 3, 2])
    k_cache, v_cache = torch.randn(2, 40, 2, 8)
    req_to_token, pool = torch.zeros(6, 16, dtype=torch.int64), torch.tensor([4, 0, 5, 2])
    req_to_token[pool, :9] = torch.randperm(40)[: 4 * 9].view(4, 9)
    query = torch.randn(int(query_lens.sum()), 4, 8)
    where = (k_cache, v_cache, req_to_token, pool, seq_lens)
    options = {"scaling": 0.3, "enable_gqa": True, "is_cross_attn": False, "sliding_window_size": None}
    outputs = []
    for backend in (cpu_attention.TorchNativeAttnBackend, cpu_attention.BatchedTorchAttention):
        attention = backend.__new__(backend)  # the constructor wants a whole model
        output = torch.empty_like(query)
        if decode:
            attention._run_sdpa_forward_decode(query, output, *where, None, causal=False, **options)
        else:
            extend = (seq_lens - query_lens, query_lens, None)
            attention._run_sdpa_forward_extend(query, output, *where, *extend, causal=True, **options)
        outputs.append(output)
    torch.testing.assert_close(*outputs)
