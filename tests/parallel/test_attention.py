"""Packed attention equals attention on each sequence alone, for any mixture of lengths."""

import pytest
import torch

from megarl.parallel.attention import packed_sequences, sdpa_packed

LENGTHS = [
    [1],
    [5, 5, 5],
    [1, 2, 3, 17, 16, 64, 33, 4, 4],
    [7, 0, 3],  # an empty sequence
    [128, 1, 1, 127],
]


def naive(query, key, value, cu_seqlens, *, scale, causal):
    """Softmax attention written out, sequence by sequence: [T, H, D]."""
    outputs = []
    group = query.shape[1] // key.shape[1]
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (
            query[start:end],
            key[start:end].repeat_interleave(group, 1),
            value[start:end].repeat_interleave(group, 1),
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_equals_naive(lengths, causal, heads, groups):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = [torch.randn(sum(lengths), h, 8, dtype=torch.float64) for h in (heads, groups, groups)]
    weight = torch.randn(sum(lengths), heads, 8, dtype=torch.float64)
    results = []
    for function, sequences in ((naive, cu_seqlens), (sdpa_packed, packed_sequences(cu_seqlens).layout)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = function(*leaves, sequences, scale=0.3, causal=causal)
        (output * weight).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_padding_is_less_than_half():
    lengths = [3, 100, 65, 9, 1, 130, 250]
    layout = packed_sequences(torch.tensor([0, *lengths]).cumsum(0).int()).layout
    assert sum(bucket.rows.numel() for bucket in layout.buckets) < 2 * sum(lengths)
