"""Every family from Megatron-Core modules equals transformers, whole and on every parallel layout."""

from __future__ import annotations

from functools import cache

import pytest

from tests.models.families import FAMILIES
from tests.models.parity import (
    DEEP_LAYOUTS,
    EXPERT_LAYOUTS,
    LAYOUTS,
    MICROBATCHES,
    assert_near,
    check_logits,
    joined,
    run,
)
from tests.models.reference import reference
from tests.models.text import LONG_CONFIGS

LLAVA_LAYOUTS = ("tp2", "tp2_sp", "pp2", "tp2_pp2", "dp2", "cp2")
CASES = [
    *((family, name, "tp1") for family, case in FAMILIES.items() for name in case.names),
    *(("qwen2_5_vl", name, layout) for name in ("gqa2_tied", "gqa4_untied") for layout in LAYOUTS if layout != "tp1"),
    *((family, "seed0", layout) for family in ("qwen2_vl", "qwen3_vl") for layout in LAYOUTS if layout != "tp1"),
    *(("text", name, layout) for name in FAMILIES["text"].names for layout in ("tp2_sp", "pp2", "tp2_pp2")),
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
    *(("llava_onevision", "onevision_siglip_qwen2", layout) for layout in LLAVA_LAYOUTS),
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
    assert_near(joined(results, "updated", ref.directory), ref.updated)
