"""Every family from Megatron-Core modules equals transformers, whole and on every parallel layout."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from megarl.config import ModelConfig
from tests.models.families import FAMILIES
from tests.models.parity import (
    DEEP_LAYOUTS,
    EXPERT_LAYOUTS,
    LAYOUTS,
    MICROBATCHES,
    assert_near,
    check_logits,
    differences,
    has_no_gradient,
    joined,
    logit_differences,
    run,
)
from tests.models.reference import reference, rounded_references
from tests.models.text import LONG_CONFIGS

LLAVA_LAYOUTS = ("tp2", "tp2_sp", "pp2", "tp2_pp2", "dp2", "cp2")
SOME_LAYOUTS = ("tp2_sp", "pp2", "tp2_sp_pp2", "tp2_dp2")
CASES = [  # one family at every layout, the others where they differ: benchmarks/parity.py runs each at all of them
    *((family, name, "tp1") for family, case in FAMILIES.items() for name in case.names),
    *(("qwen2_5_vl", "gqa2_tied", layout) for layout in LAYOUTS if layout != "tp1"),
    *(("qwen2_5_vl", "gqa4_untied", layout) for layout in SOME_LAYOUTS),
    *(("qwen3_vl", "seed0", layout) for layout in SOME_LAYOUTS),
    ("qwen2_vl", "seed0", "tp2_sp_pp2"),
    *(("text", name, layout) for name in FAMILIES["text"].names for layout in ("tp2_sp", "tp2_pp2")),
    *(("text", name, "tp1") for name in LONG_CONFIGS),
    *(("text", name, "tp2_sp") for name in ("yarn", "longrope_partial_tied")),
    # fewer groups of keys and values than ranks, with a norm of keys, with biases, as the files fuse them
    *(("text", name, "tp4") for name in ("qwen3_narrow_heads", "phi3_fused")),
    *(("text", "qwen2_untied", "tp4_sp"), ("qwen2_5_vl", "yarn", "tp4_sp")),
    ("text", "six_heads", "tp3_sp"),  # a padded vocabulary that 3 does not divide
    *(("qwen2_5_vl", "deep_tied", layout) for layout in DEEP_LAYOUTS),
    *(("qwen3_vl", "seed1", layout) for layout in ("cp2", "tp2_sp_cp2", "pp2_vpp2", "pp2_uneven")),
    ("text", "qwen3_narrow_heads", "cp2_pp2"),
    *(("qwen3_vl_moe", "mixed", layout) for layout in ("tp2_sp", "ep2_cp2", "ep4_tp2_sp_dp2")),
    *(("qwen3_moe", name, "ep2_tp2_sp") for name in ("sparse", "mixed")),
    ("qwen3_moe", "seed0", "ep2_tp2_sp_pp2"),
    *(("qwen3_vl_moe", "seed0", layout) for layout in ("ep2_pp2_dp2", "ep2_tp2_sp_pp2_vpp2")),
    *(("llava", "clip_llama", layout) for layout in LLAVA_LAYOUTS),
    ("llava", "dinov2_mistral", "tp2_sp"),
    *(("llava_onevision", "onevision_siglip_qwen2", layout) for layout in ("tp2_sp", "pp2", "cp2")),
]
SLOW = [("qwen3_vl_moe", name, layout) for name in ("sparse", "seed1") for layout in EXPERT_LAYOUTS]
SLOW.remove(("qwen3_vl_moe", "sparse", "ep2_tp2_sp_pp2_vpp2"))  # its first two layers see the tower: they stay together


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """``references(family, name)``: a tiny model and what transformers says about it, made once."""
    return cache(lambda family, name: reference(FAMILIES[family], name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize(
    ("family", "name", "layout"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_equals_transformers(pool, references, family, name, layout):
    ref = references(family, name)
    results = run(pool, ref, layout)
    check_logits(results, ref, MICROBATCHES)
    assert_near(joined(results, "gradients", ref.directory), ref.gradients)
    updated = joined(results, "updated", ref.directory)
    assert_near(updated, ref.updated)
    assert all(torch.equal(updated[name], ref.updated[name]) for name in set(ref.updated) - set(ref.gradients))


ROUNDED = [
    ("text", "qwen3_narrow_heads", "tp2_sp"),
    ("qwen2_vl", "seed0", "tp2_sp"),
    ("qwen2_5_vl", "gqa2_tied", "tp2_sp"),
    ("qwen3_vl", "seed1", "tp1"),
    ("llava", "clip_llama", "tp2_sp"),
    ("llava_next", "next_siglip_llama", "tp1"),
]


@pytest.mark.parametrize(("family", "name", "layout"), ROUNDED)
def test_bfloat16_is_at_most_twice_as_far_from_float32_as_transformers(pool, tmp_path, family, name, layout):
    """The logits, and the gradient of each parameter however small."""
    exact, rounded = rounded_references(FAMILIES[family], name, tmp_path)
    results = run(pool, exact, layout, model=ModelConfig(dtype="bfloat16"))
    assert {tensor.dtype for tensor in results[0]["updated"].values()} == {torch.bfloat16}
    ours = differences(joined(results, "gradients", exact.directory), exact.gradients)
    theirs = [differences(reference.gradients, exact.gradients) for reference in rounded]
    for key, difference in ours.items():
        largest = max(errors[key] for errors in theirs)
        assert has_no_gradient(key) or difference <= 2 * largest, f"{key}: {difference:.1e}, transformers {largest:.1e}"
    for indices, difference in zip(MICROBATCHES, logit_differences(results, exact, MICROBATCHES), strict=True):
        expected = torch.cat([exact.logits[i] for i in indices])
        found = (torch.cat([reference.logits[i].float() for i in indices]) for reference in rounded)
        assert difference <= 2 * max(float((logits - expected).norm() / expected.norm()) for logits in found), indices
