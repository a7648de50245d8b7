"""Activations that are computed again in the backward pass are the same: not a bit of any gradient changes."""

from functools import cache

import pytest
import torch

from megarl.config import ModelConfig
from tests.models.families import FAMILIES
from tests.models.parity import joined, run
from tests.models.reference import reference

EVERYTHING = ["core_attn", "layernorm", "mlp"]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return cache(lambda family, name: reference(FAMILIES[family], name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize(
    ("family", "name", "layout", "recompute", "modules", "times"),
    [
        ("qwen2_5_vl", "gqa4_untied", "tp2_pp2", "full", [], 2),
        ("qwen3_vl", "seed1", "tp2_sp_pp2", "full", [], 2),
        ("llava", "dinov2_mistral", "tp2", "full", [], 2),
        ("qwen2_5_vl", "gqa4_untied", "tp1", "selective", ["core_attn"], 2),
        ("qwen2_5_vl", "gqa4_untied", "tp1", "selective", ["layernorm"], 1),
        ("qwen2_5_vl", "gqa4_untied", "tp1", "selective", ["mlp"], 1),
        ("qwen3_vl", "seed1", "tp2_sp_pp2", "selective", EVERYTHING, 2),
        ("qwen3_vl_moe", "mixed", "ep2_tp2_sp", "selective", EVERYTHING, 2),
    ],
)
def test_recompute_changes_nothing(pool, references, family, name, layout, recompute, modules, times):
    """``times``: how often attention is computed."""
    ref = references(family, name)
    kept = run(pool, ref, layout)
    recomputed = run(pool, ref, layout, model=ModelConfig(recompute=recompute, recompute_modules=modules))
    for first, second in zip(kept, recomputed, strict=True):
        assert first["attentions"]
        assert second["attentions"] == sorted(first["attentions"] * times)
    ours, plain = (joined(results, "gradients", ref.directory) for results in (recomputed, kept))
    assert [name for name in plain if not torch.equal(ours[name], plain[name])] == []
