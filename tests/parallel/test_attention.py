"""Packed attention equals attention on each sequence alone, for any mixture of lengths."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask

from megarl.parallel import flex
from megarl.parallel.attention import TorchAttention, packed_sequences, sdpa_packed
from megarl.parallel.flex import flex_packed

from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

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
    for function, sequences in ((naive, cu_seqlens), (sdpa_packed, packed_sequences(cu_seqlens).whole)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = function(*leaves, sequences, scale=0.3, causal=causal)
        (output * weight).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_layer_attends_with_the_scale_that_its_configuration_says(scale):
    """None: by the size of a head."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, kv_channels=8, attention_dropout=0.0
    )
    groups = SimpleNamespace(cp=None)
    layer = TorchAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=groups)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    q, k, v = (torch.randn(12, 4, 8, dtype=torch.float64) for _ in range(3))
    output = layer(q, k, v, None, packed_seq_params=packed_sequences(cu_seqlens))
    expected = naive(q, k, v, cu_seqlens, scale=scale or 8**-0.5, causal=True)
    torch.testing.assert_close(output, expected.flatten(1))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 3, 1, 2, 5, 4]])
def test_a_sequence_behind_a_parent_attends_to_it(order):
    """Parents 0 and 3, children 1, 2 (of 0) and 4 (of 3), and 5 alone; in any order in which they are packed."""
    torch.manual_seed(0)
    lengths, family = [7, 3, 5, 12, 2, 9], {1: 0, 2: 0, 4: 3}
    pieces = {i: [torch.randn(n, h, 8, dtype=torch.float64) for h in (6, 2, 2)] for i, n in enumerate(lengths)}
    weights = {i: torch.randn(n, 6, 8, dtype=torch.float64) for i, n in enumerate(lengths)}
    leaves = [t.requires_grad_() for piece in pieces.values() for t in piece]
    loss = 0.0
    for i in pieces:  # each with its parent's tokens in front, the parent's part not counted again
        line = [family[i], i] if i in family else [i]
        q, k, v = (torch.cat(parts) for parts in zip(*(pieces[j] for j in line), strict=True))
        output = naive(q, k, v, torch.tensor([0, len(q)]), scale=0.3, causal=True)
        loss = loss + (output[-lengths[i] :] * weights[i]).sum()
    expected = torch.autograd.grad(loss, leaves)
    cu_seqlens = torch.tensor([0, *(lengths[i] for i in order)]).cumsum(0).int()
    parents = torch.tensor([order.index(family[i]) if i in family else -1 for i in order])
    q, k, v = (torch.cat(parts) for parts in zip(*(pieces[i] for i in order), strict=True))
    output = sdpa_packed(q, k, v, packed_sequences(cu_seqlens, parents).whole, scale=0.3, causal=True)
    ours = torch.autograd.grad((output * torch.cat([weights[i] for i in order])).sum(), leaves)
    for theirs, mine in zip(expected, ours, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_padding_is_less_than_half():
    lengths = [3, 100, 65, 9, 1, 130, 250]
    layout = packed_sequences(torch.tensor([0, *lengths]).cumsum(0).int()).whole
    assert sum(bucket.rows.numel() for bucket in layout.buckets) < 2 * sum(lengths)


@pytest.mark.parametrize(("causal", "parents"), [(True, None), (False, None), (True, [-1, 0, -1, 0, 2, -1])])
def test_flex_equals_sdpa(causal, parents):
    """Forward only: torch computes no gradient of it on a CPU."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 7, 3, 90, 5, 2, 33]).cumsum(0).int()
    packed = packed_sequences(cu_seqlens, None if parents is None else torch.tensor(parents))
    query, key, value = (torch.randn(140, heads, 16) for heads in (6, 2, 2))
    expected = sdpa_packed(query, key, value, packed.whole, scale=0.3, causal=causal)
    torch.testing.assert_close(flex_packed(query, key, value, packed.flex(causal), scale=0.3), expected)


PACKS = [  # lengths, parents
    ([7, 3, 90, 5, 2, 33], None),
    ([200, 300, 1, 90], [-1, 0, 0, -1]),
    ([700], None),
    ([64] * 20, [-1, *[0] * 9, -1, *[10] * 9]),
    ([513, 0, 2], None),
]


@pytest.mark.parametrize("causal", [True, False])
def test_flex_knows_which_blocks_are_seen(causal):
    for lengths, parents in PACKS:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        parents = None if parents is None or not causal else torch.tensor(parents)
        mask = packed_sequences(cu_seqlens, parents).flex(causal)
        size = mask.seq_lengths[0]
        assert size == -(-sum(lengths) // flex.BLOCK) * flex.BLOCK
        dense = create_mask(mask.mask_mod, None, None, size, size, "cpu")[0, 0]
        blocks = dense.view(size // flex.BLOCK, flex.BLOCK, -1, flex.BLOCK)
        sparse = [
            {(row, column) for row in range(len(number)) for column in order[row, : number[row]].tolist()}
            for number, order in (
                (mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0]),
                (mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]),
            )
        ]
        parts, wholes = sparse
        assert not parts & wholes
        assert parts | wholes == {tuple(pair) for pair in blocks.any(3).any(1).nonzero().tolist()}
        assert wholes <= {tuple(pair) for pair in blocks.all(3).all(1).nonzero().tolist()}
        assert wholes or size < 3 * flex.BLOCK or max(lengths) < 2 * flex.BLOCK


def test_flex_is_compiled_for_all_packs_at_once(monkeypatch):
    counter = CompileCounter()
    compiled = flex.compiled(backend=counter)
    monkeypatch.setattr(flex, "_kernel", lambda: compiled)
    for lengths, parents in PACKS:
        torch.manual_seed(0)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = packed_sequences(cu_seqlens, None if parents is None else torch.tensor(parents))
        query, key, value = (torch.randn(sum(lengths), heads, 16) for heads in (6, 2, 2))
        expected = sdpa_packed(query, key, value, packed.whole, scale=0.3, causal=True)
        torch.testing.assert_close(flex_packed(query, key, value, packed.flex(True), scale=0.3), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("parents", [None, [-1, 0, 0]])
def test_packs_are_planned_on_the_host(parents):
    """A tensor on the meta device has no numbers to read."""
    cu_seqlens, device = torch.tensor([0, 5, 8, 12]).int(), torch.device("meta")
    packed = packed_sequences(cu_seqlens, None if parents is None else torch.tensor(parents), device=device)
    assert packed.cu_seqlens_q.device == packed.places.device == packed.order.device == device
    assert packed.cu_seqlens_q_padded.tolist() == [0, 12]  # mcore's own rotation asks for its numbers in every layer
    assert {bucket.rows.device for bucket in packed.whole.buckets} == {device}
    assert packed.flex(True).kv_indices.device == device
    fused = packed_sequences(cu_seqlens, device=device, fused_rope=True)
    assert fused.cu_seqlens_q_padded.device == fused.cu_seqlens_kv_padded.device == device
