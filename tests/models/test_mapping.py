"""Every mapping is a bijection, whole and in shards, and the tables cover whole checkpoints."""

import pytest
import torch

from megarl.families import family_of
from megarl.models.mapping import (
    QKV,
    Flattened,
    FusedGatedMLP,
    FusedQKV,
    GatedMLP,
    Mapping,
    Unsqueezed,
    Vocab,
    padded_vocab_size,
)
from tests.models.families import FAMILIES


def hf_names(*names: str) -> dict:
    return {"megatron": "m", "hf": names}


CASES = [
    (Mapping(**hf_names("a"), shard_dim=1), {"a": (6, 8)}),
    (Mapping(**hf_names("a"), shard_dim=0, parallelism="expert"), {"a": (4, 3, 2)}),
    (Mapping(**hf_names("a")), {"a": (7,)}),
    (Vocab(**hf_names("a"), vocab_size=130), {"a": (130, 3)}),
    (Vocab(**hf_names("a"), vocab_size=128), {"a": (128, 3)}),
    (QKV(**hf_names("q", "k", "v"), num_heads=8, num_groups=4), {"q": (24, 5), "k": (12, 5), "v": (12, 5)}),
    (QKV(**hf_names("q", "k", "v"), num_heads=4, num_groups=4), {"q": (12,), "k": (12,), "v": (12,)}),
    (FusedQKV(**hf_names("a"), num_heads=4, num_groups=4), {"a": (36, 5)}),
    (FusedQKV(**hf_names("a"), num_heads=8, num_groups=4), {"a": (48, 5)}),
    (GatedMLP(**hf_names("g", "u")), {"g": (8, 3), "u": (8, 3)}),
    (FusedGatedMLP(**hf_names("a")), {"a": (16, 3)}),
    (Unsqueezed(**hf_names("a"), ones=2), {"a": (1, 1, 6)}),
    (Unsqueezed(**hf_names("a"), ones=0), {"a": (5, 6)}),
    (Flattened(**hf_names("a"), kernel=(3, 2, 4, 4)), {"a": (5, 3, 2, 4, 4)}),
]


@pytest.mark.parametrize(("mapping", "shapes"), CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_round_trip(mapping, shapes, size):
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    whole = mapping.to_megatron(tensors)
    joined = mapping.join(mapping.split(whole, size))
    assert torch.equal(joined, whole)
    back = mapping.to_hf(joined)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


def test_qkv_puts_the_queries_of_a_group_before_its_key_and_value():
    mapping = QKV(**hf_names("q", "k", "v"), num_heads=4, num_groups=2)
    whole = mapping.to_megatron({"q": torch.arange(4), "k": torch.tensor([10, 11]), "v": torch.tensor([20, 21])})
    assert whole.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_fused_qkv_puts_a_heads_query_before_its_key_and_value():
    whole = FusedQKV(**hf_names("a"), num_heads=2, num_groups=2).to_megatron(
        {"a": torch.tensor([0, 1, 10, 11, 20, 21])}
    )
    assert whole.tolist() == [0, 10, 20, 1, 11, 21]
    grouped = FusedQKV(**hf_names("a"), num_heads=2, num_groups=1).to_megatron({"a": torch.tensor([0, 1, 10, 20])})
    assert grouped.tolist() == [0, 1, 10, 20]


def test_gated_mlp_gives_each_rank_its_gate_and_its_up():
    mapping = GatedMLP(**hf_names("g", "u"))
    shards = mapping.split(mapping.to_megatron({"g": torch.arange(4), "u": torch.arange(10, 14)}), 2)
    assert [shard.tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_vocab_pads_with_zeros():
    whole = Vocab(**hf_names("a"), vocab_size=3).to_megatron({"a": torch.ones(3, 2)})
    assert whole.shape == (128, 2)
    assert whole.sum() == 6
    assert [padded_vocab_size(n) for n in (1, 128, 129)] == [128, 128, 256]
    assert [padded_vocab_size(100352, size) for size in (1, 2, 4, 5, 7)] == [100352, 100352, 100352, 100480, 100352]


def test_a_dimension_that_cannot_be_split_is_named():
    with pytest.raises(ValueError, match=r"m: dimension 1 of \(6, 9\) cannot be split over 2"):
        CASES[0][0].split(torch.zeros(6, 9), 2)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in FAMILIES[family].names])
def test_a_familys_table_covers_its_checkpoints_and_loses_no_bit(family, name):
    model = FAMILIES[family].model(name)
    known = family_of(model.config)
    output = "lm_head.weight" if model.config.tie_word_embeddings else "none"
    named = FAMILIES[family].published(model.config, dict(model.state_dict()))
    tensors = {key: value for key, value in named.items() if not key.endswith(output)}
    back = {}
    for mapping in known.mappings(model.config):
        whole = mapping.to_megatron(tensors)
        back |= mapping.to_hf(mapping.join(mapping.split(whole, 2)))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor), key
