"""The work of the vision tower is shared by ranks: every gradient is that of one rank, also of a skewed batch."""

from __future__ import annotations

import pytest

from megarl.config import ModelConfig
from tests.models.parity import assert_near, check_logits, joined, run
from tests.models.qwen_vl import Qwen25VL
from tests.models.reference import reference

# By turns of four ranks, or of two: all images in one bin and one of them in another bin too, in one bin alone, in none
SKEWED = [[3, 5], [0], [4], [5, 2], [0], [6, 1], [4], [0], [4], [0], [0], [4]]


# beside those of tests/workers/test_vision_sharing.py
LAYOUTS = ["dp4", "pp2_vpp2_dp2", "cp2", "cp2_pp2", "tp2_sp_cp2"]


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    return reference(Qwen25VL(), "deep_tied", tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def one_rank(pool, ref):
    return joined(run(pool, ref, "tp1", SKEWED), "gradients", ref.directory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_a_skewed_batch_are_those_of_one_rank(pool, ref, one_rank, layout):
    results = run(pool, ref, layout, SKEWED)
    check_logits(results, ref, SKEWED)
    assert_near(joined(results, "gradients", ref.directory), one_rank, 1e-5)


def test_recompute_changes_nothing(pool, ref, one_rank):
    results = run(pool, ref, "dp2", SKEWED, ModelConfig(recompute="full"))
    assert_near(joined(results, "gradients", ref.directory), one_rank, 1e-5)


@pytest.mark.parametrize("freeze", [["vision_tower"], ["vision_tower", "projector"], ["decoder"]])
def test_frozen_parts_change_no_other_gradient(pool, ref, one_rank, freeze):
    gradients = joined(run(pool, ref, "dp2", SKEWED, ModelConfig(freeze=freeze)), "gradients", ref.directory)
    assert_near(gradients, {name: gradient for name, gradient in one_rank.items() if name in gradients}, 1e-5)
    assert gradients
