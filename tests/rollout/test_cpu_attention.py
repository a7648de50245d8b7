"""Attention of the CPU engine: batched against one sequence at a time, segments against a mask."""

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


def tower(kind, **options):
    return kind(head_dim=8, num_heads=4, num_kv_heads=4, softmax_scale=0.3, **{"flatten_batch": True, **options})


@pytest.mark.parametrize("lengths", [[9], [4, 4, 4], [6, 1, 3, 6, 16, 3, 1, 6], [5, 0, 5]])
def test_segments_equal_the_masked_form_without_a_mask(monkeypatch, lengths):
    """Images and windows of a batch; one call for each length that there is."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v = torch.randn(3, sum(lengths), 4, 8)
    expected = tower(cpu_attention.VisionSdpaAttention)(q, k, v, 1, cu_seqlens)
    calls, attend = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **options):
        calls.append((query.shape[0], query.shape[2], attn_mask))
        return attend(query, key, value, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    torch.testing.assert_close(tower(cpu_attention.SegmentedVisionAttention)(q, k, v, 1, cu_seqlens), expected)
    assert calls == [(lengths.count(n), n, None) for n in sorted(set(lengths))]


@pytest.mark.parametrize("asked", ["a mask", "no segments", "a batch", "a softmax of its own"])
def test_what_segments_cannot_say_is_left_to_sglang(asked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 4, 8)
    mask = torch.ones(12, 12, dtype=torch.bool).tril() if asked == "a mask" else None
    cu_seqlens = None if asked == "no segments" else torch.tensor([0, 6, 12], dtype=torch.int32)
    batch = 2 if asked == "a batch" else 1
    options = {"flatten_batch": batch == 1, "softmax_in_single_precision": asked == "a softmax of its own"}
    kinds = cpu_attention.VisionSdpaAttention, cpu_attention.SegmentedVisionAttention
    outputs = (tower(kind, **options)(q, k, v, batch, cu_seqlens, mask) for kind in kinds)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)  # the same code, so the same bits


@pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA has SGLang's own")
def test_scheduler_processes_have_both(monkeypatch):
    from megarl.rollout import sglang_process as process

    backends, towers = process.attention_registry.ATTENTION_BACKENDS, process.vision.QKV_BACKEND_IMPL
    for registry, name in ((backends, "torch_native"), (towers, "sdpa")):
        monkeypatch.setitem(registry, name, None)
    for holder, names in (
        (process.scheduler, ("Scheduler", "run_scheduler_process")),
        (process.model_runner, ("WeightChecker", "LoRAManager")),
        (process.cpu_shims, ("unpin", "choose_experts_in_torch")),
    ):
        for name in names:
            put = getattr(holder, name) if isinstance(getattr(holder, name), type) else lambda *args: None
            monkeypatch.setattr(holder, name, put)
    process.run_scheduler_process()
    assert backends["torch_native"] is cpu_attention.BatchedTorchAttention
    assert towers["sdpa"] is cpu_attention.SegmentedVisionAttention
