"""Qwen2.5-VL's Hugging Face configuration as Megatron-Core configurations of its three transformers."""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.transformer_config import transformer_config

NORM_EPS = 1e-6  # of every norm in the vision tower; no key in the checkpoint says so


def validate(hf: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise a ``ValueError`` that names the key when the layout cannot divide the model or a feature is unknown."""
    text, vision = hf.text_config, hf.vision_config
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    merged = vision.hidden_size * vision.spatial_merge_size**2
    divided = {
        "num_attention_heads": (text.num_attention_heads, tp),
        "num_key_value_heads": (text.num_key_value_heads, tp),
        "intermediate_size": (text.intermediate_size, tp),
        "vision_config.num_heads": (vision.num_heads, tp),
        "vision_config.intermediate_size": (vision.intermediate_size, tp),
        "vision_config.hidden_size x spatial_merge_size^2": (merged, tp),
    }
    for key, (value, size) in divided.items():
        if value % size:
            raise ValueError(f"{key}={value} cannot be divided by parallel.tensor_model_parallel_size={size}")
    if text.num_hidden_layers % pp:
        raise ValueError(
            f"num_hidden_layers={text.num_hidden_layers} cannot be divided by "
            f"parallel.pipeline_model_parallel_size={pp}"
        )
    if "sliding_attention" in text.layer_types:
        raise ValueError("use_sliding_window=True: sliding-window layers are not supported")
    if text.hidden_act != "silu" or vision.hidden_act != "silu":
        raise ValueError(f"hidden_act={text.hidden_act!r}, vision_config.hidden_act={vision.hidden_act!r}: not silu")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(
            f"vision_config.out_hidden_size={vision.out_hidden_size} is not hidden_size={text.hidden_size}"
        )
    if text.rope_parameters["rope_type"] != "default":
        raise ValueError(f"rope_scaling.rope_type={text.rope_parameters['rope_type']!r} is not supported")


def decoder_config(hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    text = hf.text_config
    return transformer_config(
        model,
        parallel,
        pipelined=True,
        overrides=True,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        ffn_hidden_size=text.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        mrope_section=list(text.rope_parameters["mrope_section"]),
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
