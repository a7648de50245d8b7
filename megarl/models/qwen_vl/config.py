"""Qwen2.5-VL's Hugging Face configuration as Megatron-Core configurations of its three transformers."""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.language import check_divisible, validate_language
from megarl.models.common.transformer_config import transformer_config

NORM_EPS = 1e-6  # of every norm in the vision tower; no key in the checkpoint says so


def validate(hf: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise a ``ValueError`` that names the key when the layout cannot divide the model or a feature is unknown."""
    text, vision = hf.text_config, hf.vision_config
    validate_language(text, parallel)
    check_divisible(
        {
            "vision_config.num_heads": vision.num_heads,
            "vision_config.intermediate_size": vision.intermediate_size,
            "vision_config.hidden_size x spatial_merge_size^2": vision.hidden_size * vision.spatial_merge_size**2,
        },
        "parallel.tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
    )
    if vision.hidden_act != "silu":
        raise ValueError(f"vision_config.hidden_act={vision.hidden_act!r} is not silu")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(
            f"vision_config.out_hidden_size={vision.out_hidden_size} is not hidden_size={text.hidden_size}"
        )


def vision_config(hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    vision = hf.vision_config
    return transformer_config(
        model,
        parallel,
        pipelined=False,
        overrides=False,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPS,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=True,
    )


def projector_config(hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Of the patch merger: an MLP from ``merge^2`` patches to one token of the decoder."""
    vision = hf.vision_config
    return transformer_config(
        model,
        parallel,
        pipelined=False,
        overrides=False,
        num_layers=1,
        num_attention_heads=vision.num_heads,  # it has none, but mcore wants some that divide
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.hidden_size * vision.spatial_merge_size**2,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
