"""Qwen-VL: what the parity of all families (test_parity.py) does not cover."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from megarl.config import ModelConfig, ParallelConfig
from megarl.families import family_of
from megarl.models.common.vision import VisionInputs, interpolated_positions
from tests.models.families import FAMILIES
from tests.models.parity import ALL_LAYOUTS, MICROBATCHES, assert_near, check_logits, joined, packed, run, train
from tests.models.reference import pack, reference

from transformers.vision_utils import get_vision_bilinear_indices_and_weights  # isort: skip  after torchvision_cpu


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """``references(name, family)``: a tiny model and what transformers says about it, made once."""
    return cache(lambda name, family="qwen2_5_vl": reference(FAMILIES[family], name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize(
    ("layout", "microbatches"),
    [
        ("tp1", [[i] for i in range(7)]),  # every sample alone
        ("tp1", [[0, 1, 2, 3, 4, 5, 6]]),  # all in one pack
        ("tp2_sp", [[6, 2, 0], [4], [5, 3, 1]]),  # another order
        ("pp2", [[5], [0], [6, 4, 3, 2, 1]]),
    ],
)
def test_packing_and_order_change_nothing(pool, references, layout, microbatches):
    ref = references("gqa2_tied")
    results = run(pool, ref, layout, microbatches)
    check_logits(results, ref, microbatches)
    assert_near(joined(results, "gradients", ref.directory), ref.gradients)


@pytest.mark.parametrize("layout", ["dp2", "tp2_dp2"])
def test_reduce_scattered_gradients_give_the_same_step(pool, references, layout):
    ref = references("gqa4_untied")
    world_size, parallel = ALL_LAYOUTS[layout]
    batches = packed(ref, MICROBATCHES, parallel)
    results = pool.run(train, world_size, ref.directory, parallel, ModelConfig(), batches, False)
    assert_near(joined(results, "updated", ref.directory), ref.updated)


@pytest.mark.parametrize(("family", "name"), [("qwen2_5_vl", "gqa2_tied"), ("qwen3_vl", "seed0")])
def test_a_batch_of_text_leaves_the_tower_a_gradient_of_zero(pool, references, family, name):
    ref = references(name, family)
    gradients = joined(run(pool, ref, "tp2_sp", [[0, 4]]), "gradients", ref.directory)
    assert set(gradients) == set(ref.gradients)
    for name, gradient in gradients.items():
        assert bool(gradient.any()) != ("visual." in name), name


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_frozen_parts_stay_as_they_are(pool, references, layout):
    ref = references("gqa2_tied")
    results = run(pool, ref, layout, model=ModelConfig(freeze=["vision_tower", "decoder"], recompute="full"))
    gradients = joined(results, "gradients", ref.directory)
    expected = {name: g for name, g in ref.gradients.items() if name.startswith("visual.merger.")}
    assert_near(gradients, expected)
    updated = joined(results, "updated", ref.directory)
    assert_near({name: updated[name] for name in expected}, {name: ref.updated[name] for name in expected})


def test_an_image_shown_twice_is_encoded_once(pool, references):
    ref = references("gqa2_tied")
    batch = pack(ref, [5, 1, 5])
    v = batch.vision
    three, one = (int(ref.samples[i].grids.prod(1).sum()) for i in (5, 1))
    distinct = VisionInputs(
        v.pixel_values[: three + one], v.grids[:4], v.sizes[:4], torch.tensor([0, 1, 2, 3, 0, 1, 2])
    )
    twice, shared = (
        pool.run(train, 1, ref.directory, ParallelConfig(), ModelConfig(), [b])
        for b in (batch, replace(batch, vision=distinct))
    )
    assert_near(joined(shared, "gradients", ref.directory), joined(twice, "gradients", ref.directory), 1e-5)


PP2, VPP = {"pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("model", "parallel", "error", "message"),
    [
        ({}, {"tensor_model_parallel_size": 3}, ValueError, "num_attention_heads=4 cannot be divided by parallel.tens"),
        ({}, {"pipeline_model_parallel_size": 4}, ValueError, "num_hidden_layers=2 cannot be divided by parallel.pi"),
        (
            {},
            {**PP2, VPP: 2},
            ValueError,
            "x parallel.virtual_pipeline_model_parallel_size=4; parallel.pi",
        ),
        (
            {},
            {**PP2, "pipeline_layout": [1, 2]},
            ValueError,
            "holds 3 layers, the model has num_hidden_layers=2",
        ),
        (
            {},
            {"context_parallel_size": 4, "cp_comm_type": "a2a"},
            ValueError,
            "num_key_value_heads=2 cannot be divided by parallel.tensor_model_parallel_size x parallel.contex",
        ),
        ({}, {"expert_model_parallel_size": 2}, ValueError, "expert_model_parallel_size=2: this model has no experts"),
        ({"megatron": {"context_parallel_size": 2}}, {}, ValueError, "say it with parallel.context_parallel_size"),
        (
            {"megatron": {"batch_p2p_comm": True}},
            {**PP2, VPP: 2, "pipeline_layout": [0, 1, 0, 1]},
            ValueError,
            "model.megatron.batch_p2p_comm=True",
        ),
        ({"megatron": {"layernorm_epsilom": 1}}, {}, ValueError, "did you mean model.megatron.layernorm_epsilon?"),
        ({"attention_backend": "varlen"}, {}, ValueError, "model.attention_backend=varlen needs CUDA"),
        ({"attention_backend": "flex"}, {}, ValueError, "model.attention_backend=flex needs CUDA"),
        ({"transformer_impl": "transformer_engine"}, {}, ImportError, "needs the package transformer-engine"),
    ],
)
def test_what_cannot_be_built_says_why(model, parallel, error, message):
    config = FAMILIES["qwen2_5_vl"].config("gqa2_tied")
    family, layout = family_of(config), ParallelConfig(**parallel)

    def build():
        family.validate(config, layout)
        family.build(config, ModelConfig(**model), layout)

    with pytest.raises(error, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"deepstack_visual_indexes": [0, 1]}, {"pipeline_model_parallel_size": 4}, "[0, 1] feed the first 2 decoder"),
        (
            {},
            {"pipeline_model_parallel_size": 2, "pipeline_layout": [0, 4]},
            "parallel_size=1 with parallel.pipeline_layout=[0, 4] leaves 0 there",
        ),
        ({"deepstack_visual_indexes": [1, 0]}, {}, "deepstack_visual_indexes=[1, 0] must ascend"),
        ({"num_position_embeddings": 17}, {}, "num_position_embeddings is not the square"),
        ({"hidden_act": "relu"}, {}, "vision_config.hidden_act='relu' is not one of quick_gelu, silu"),
        ({"out_hidden_size": 8}, {}, "the tower's output of 8 is not hidden_size="),
    ],
)
def test_what_qwen3_vl_cannot_do_says_why(changes, layout, message):
    config = FAMILIES["qwen3_vl"].draw(0)
    config.vision_config.update(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        family_of(config).validate(config, ParallelConfig(**layout))


@pytest.mark.parametrize("seed", range(5))
def test_learned_positions_are_interpolated_as_transformers_does(seed):
    generator = torch.Generator().manual_seed(seed)
    grids = torch.randint(1, 9, (4, 3), generator=generator) * torch.tensor([1, 2, 2])
    theirs = get_vision_bilinear_indices_and_weights(grids, 5 + seed, 2)
    for ours, expected in zip(interpolated_positions(grids, 2, 5 + seed), theirs, strict=True):
        assert ours.tolist() == expected.tolist()


def test_an_unknown_architecture_is_named():
    config = FAMILIES["qwen2_5_vl"].config("gqa2_tied")
    config.architectures = ["GPT2LMHeadModel"]
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*Qwen2_5_VLForConditionalGeneration"):
        family_of(config)
