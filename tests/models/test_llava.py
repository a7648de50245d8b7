"""LLaVA: what the parity of all families (test_parity.py) does not cover."""

from __future__ import annotations

import re
from functools import cache, reduce

import pytest

from megarl.config import ModelConfig, ParallelConfig
from megarl.families import family_of
from megarl.models.llava.mapping import canonical_name
from megarl.models.llava.towers import carried_shapes
from tests.models.llava import Llava, LlavaNext, LlavaOnevision
from tests.models.parity import assert_near, check_logits, joined, run
from tests.models.reference import Case, reference

CASES: dict[str, Case] = {name: case for case in (Llava(), LlavaNext(), LlavaOnevision()) for name in case.names}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """``references(name)``: the tiny model ``name`` and what transformers says about it, made once."""
    return cache(lambda name: reference(CASES[name], name, tmp_path_factory.mktemp(name)))


def published(name: str, tower: str) -> str:
    """The name in the published files of a tensor of transformers' model."""
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = re.sub(r"^model\.language_model", "language_model.model", name).removeprefix("model.")
    return name if tower == "dinov2" else name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("name", CASES)
def test_files_of_every_age_have_one_name_for_a_tensor(name):
    keys = list(CASES[name].model(name).state_dict())
    names = [published(key, CASES[name].config(name).vision_config.model_type) for key in keys]
    assert [canonical_name(key) for key in keys] == names
    assert [canonical_name(key) for key in names] == names
    # transformers 5 writes the published names but for this
    assert [canonical_name(key.replace(".vision_model.", ".")) for key in names] == names


@pytest.mark.parametrize("name", ["dinov2_mistral", "clip_qwen3_layers", "siglip_qwen2"])
def test_what_no_image_goes_through_is_carried(references, name):
    """``test_parity`` sees that it has no gradient and stays what it was."""
    ref = references(name)
    assert set(ref.updated) - set(ref.gradients) == set(carried_shapes(CASES[name].config(name)))


@pytest.mark.parametrize("name", ["clip_llama", "onevision_siglip_qwen2"])
def test_a_batch_of_text_leaves_the_tower_a_gradient_of_zero(pool, references, name):
    ref = references(name)
    gradients = joined(run(pool, ref, "tp2_sp", [[0, 4]]), "gradients", ref.directory)
    assert set(gradients) == set(ref.gradients)
    for key, gradient in gradients.items():
        assert bool(gradient.any()) == key.startswith("language_model."), key


def test_frozen_parts_stay_as_they_are(pool, references):
    ref = references("next_clip_mistral")
    results = run(pool, ref, "tp2", model=ModelConfig(freeze=["vision_tower", "decoder"], recompute="full"))
    expected = {
        key: g for key, g in ref.gradients.items() if key.startswith(("multi_modal_projector", "image_newline"))
    }
    assert_near(joined(results, "gradients", ref.directory), expected)


def test_packing_and_order_change_nothing(pool, references):
    ref = references("onevision_siglip_qwen2")
    for microbatches in ([[i] for i in range(7)], [[6, 2, 5, 0, 1, 3, 4]]):
        results = run(pool, ref, "tp1", microbatches)
        check_logits(results, ref, microbatches)
        assert_near(joined(results, "gradients", ref.directory), ref.gradients)


@pytest.mark.parametrize(
    ("name", "changes", "tp", "message"),
    [
        (
            "clip_llama",
            {"vision_config.model_type": "vit"},
            1,
            "vision_config.model_type='vit' is not one of clip_vision",
        ),
        (
            "clip_llama",
            {"vision_config.hidden_act": "relu6"},
            1,
            "vision_config.hidden_act='relu6' is not one of gelu, ",
        ),
        ("clip_llama", {"projector_hidden_act": "silu"}, 1, "projector_hidden_act='silu' is not one of"),
        (
            "clip_llama",
            {"vision_config.num_attention_heads": 3},
            1,
            "vision_config.hidden_size=16 cannot be divided by vis",
        ),
        (
            "clip_llama",
            {"vision_config.num_attention_heads": 1},
            2,
            "vision_config.num_attention_heads=1 cannot be divided",
        ),
        (
            "clip_llama",
            {"vision_config.intermediate_size": 25},
            2,
            "vision_config.intermediate_size=25 cannot be divided",
        ),
        (
            "clip_llama",
            {"text_config.num_key_value_heads": 3},
            2,
            "num_attention_heads=4 cannot be divided by num_key_value_heads=3",
        ),
        ("clip_llama", {"text_config.model_type": "gpt2"}, 1, "model_type='gpt2' of the language model is not one of"),
        ("clip_llama", {"vision_config.image_size": [14, 28]}, 1, "vision_config.image_size=[14, 28]: only squares"),
        (
            "clip_llama",
            {"vision_feature_layer": -5},
            1,
            "vision_feature_layer=-5 chooses no layers of the vision_config.nu",
        ),
        ("clip_llama", {"vision_feature_layer": 0}, 1, "vision_feature_layer=0 chooses no layers"),
        ("dinov2_mistral", {"vision_config.qkv_bias": False}, 1, "vision_config.qkv_bias=False is not supported"),
        (
            "next_clip_mistral",
            {"vision_feature_select_strategy": "full"},
            1,
            "='full' leaves 10 of 10 positions of a clip",
        ),
        (
            "next_clip_mistral",
            {"image_grid_pinpoints": [[12, 25]]},
            1,
            "image_grid_pinpoints: [12, 25] is not made of tiles",
        ),
        (
            "onevision_siglip_qwen2",
            {"vision_aspect_ratio": "square"},
            1,
            "vision_aspect_ratio='square' is not anyres_max_",
        ),
    ],
)
def test_what_cannot_be_built_names_the_key(name, changes, tp, message):
    config = CASES[name].config(name)
    for key, value in changes.items():
        *path, last = key.split(".")
        setattr(reduce(getattr, path, config), last, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        family_of(config).validate(config, ParallelConfig(tensor_model_parallel_size=tp))
