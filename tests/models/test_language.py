"""What a decoder's configuration may say: each refusal by its name, and how long a sequence may be."""

import re
from types import SimpleNamespace

import pytest

from megarl.config import ParallelConfig
from megarl.models.common.decoder import _scale_rotation
from megarl.models.common.language import longest_sequence, validate_language
from tests.models.text import LONGROPE, Text


def config(name: str = "qwen2_untied", **fields):
    made = Text().config(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def rope(kind: str, **fields) -> dict:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama_gqa2_tied", {"attention_bias": True}, "attention_bias=True of the language model is not supported"),
        ("llama_gqa2_tied", {"mlp_bias": True}, "mlp_bias=True of the language model is not supported"),
        ("qwen3_narrow_heads", {"attention_bias": True}, "attention_bias=True of the language model"),
        ("mistral_wide_heads", {"hidden_act": "gelu"}, "hidden_act='gelu' of the language model is not silu"),
        ("qwen2_untied", {"model_type": "gpt2"}, "model_type='gpt2' of the language model is not one of"),
        ("qwen2_untied", {"num_key_value_heads": 3}, "num_attention_heads=4 cannot be divided by num_key_value_heads"),
        ("qwen2_untied", {"rope_parameters": rope("ntk")}, "rope_scaling.rope_type='ntk' is not one of default"),
        (
            "qwen2_untied",
            {"rope_parameters": rope("proportional", factor=2.0)},
            "rope_scaling.rope_type='proportional' is not one of default",
        ),
        ("qwen2_untied", {"rope_parameters": rope("yarn")}, "rope_type='yarn': rope_scaling has no 'factor'"),
        (
            "qwen2_untied",
            {"rope_parameters": rope("longrope", short_factor=[1.0])},
            "rope_scaling has no 'long_factor'",
        ),
        (
            "qwen2_untied",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types=['chunked_attention', 'full_attention'] with sliding_window=None is not supported",
        ),
        ("qwen2_untied", {"layer_types": ["sliding_attention"] * 2}, "with sliding_window=None is not supported"),
        *(
            (name, {"rope_parameters": rope("default", partial_rotary_factor=0.5)}, "partial_rotary_factor=0.5: ")
            for name in ("llama_gqa2_tied", "mistral_wide_heads", "qwen2_untied", "qwen3_narrow_heads")
        ),
        (
            "llama_gqa2_tied",
            {"rope_parameters": rope("linear", factor=2.0, partial_rotary_factor=0.5)},
            "partial_rotary_factor=0.5: ",
        ),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(name, fields, message):
    validate_language(config(name), ParallelConfig())
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_language(config(name, **fields), ParallelConfig())


@pytest.mark.parametrize(
    ("heads", "groups", "size", "message"),
    [
        (16, 2, 4, ""),
        (16, 2, 16, ""),
        (32, 4, 8, ""),
        (16, 1, 4, ""),
        (28, 4, 8, "num_attention_heads=28 cannot be divided by parallel.tensor_model_parallel_size=8"),
        (12, 4, 6, "num_key_value_heads=4 and parallel.tensor_model_parallel_size=6: one must divide the other"),
        (6, 2, 6, "num_attention_heads=6, num_key_value_heads=2 and head_dim=8 make 80 rows"),
    ],
)
def test_ranks_divide_the_groups_of_keys_or_are_divided_by_them(heads, groups, size, message):
    text = config("llama_gqa2_tied", num_attention_heads=heads, num_key_value_heads=groups, head_dim=8)
    parallel = ParallelConfig(tensor_model_parallel_size=size)
    if not message:
        validate_language(text, parallel)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_language(text, parallel)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("qwen2_untied", {}, (128, "max_position_embeddings")),
        ("window", {}, (45, "sliding_window")),
        ("window", {"sliding_window": 4096}, (128, "max_position_embeddings")),
        ("window", {"sliding_window": None}, (128, "max_position_embeddings")),
        ("window_of_layers", {}, (45, "sliding_window")),
        ("window_of_layers", {"layer_types": ["full_attention"] * 2}, (128, "max_position_embeddings")),
        ("phi3_fused", {"sliding_window": 7}, (7, "sliding_window")),
        ("longrope_partial_tied", {}, (64, "original_max_position_embeddings")),
        ("longrope_partial_tied", {"sliding_window": 7}, (7, "sliding_window")),
        ("llama_gqa2_tied", {"rope_parameters": LONGROPE}, (64, "original_max_position_embeddings")),
        ("yarn", {}, (128, "max_position_embeddings")),
    ],
)
def test_a_sequence_is_at_most_as_long_as_what_changes_nothing(name, fields, expected):
    assert longest_sequence(config(name, **fields)) == expected


def test_the_fused_rotation_has_no_factor():
    _scale_rotation(SimpleNamespace(apply_rope_fusion=True), 1.0)
    with pytest.raises(ValueError, match=r"model\.megatron\.apply_rope_fusion=True: .* rope_scaling asks for 1\.2$"):
        _scale_rotation(SimpleNamespace(apply_rope_fusion=True), 1.2)
