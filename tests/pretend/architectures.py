"""The configurations of published models that ``real_sizes`` measures, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import transformers

from tests.models.published import published


def qwen2_5_vl_7b() -> transformers.PretrainedConfig:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
        },
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def llava_1_5_7b() -> transformers.PretrainedConfig:
    """llava-hf/llava-1.5-7b-hf."""
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        image_token_index=32000,
        image_seq_length=576,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def qwen3_8b() -> transformers.PretrainedConfig:
    """Qwen/Qwen3-8B."""
    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    return config


ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen2_5_vl_7b": qwen2_5_vl_7b,
    "llava_1_5_7b": llava_1_5_7b,
    "qwen3_8b": qwen3_8b,
    "qwen2_5_vl_3b": partial(published, "Qwen2.5-VL-3B"),  # two groups of keys and values
}
