"""A LLaVA's Hugging Face configuration as Megatron-Core configurations of its three transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.language import check_divisible, validate_language
from megarl.models.common.transformer_config import transformer_config
from megarl.models.llava.towers import feature_layers, ffn_size, gated, num_positions, side, tower_of
from megarl.utils.anyres import max_tiles


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def validate(hf: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise a ``ValueError`` that names the key when the layout cannot divide the model or a feature is unknown."""
    text, vision = hf.text_config, hf.vision_config
    validate_language(text, parallel)
    tower_of(vision)
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, key), int):
            raise ValueError(f"vision_config.{key}={getattr(vision, key)!r}: only squares, one number, are supported")
    for key, activation in (
        ("vision_config.hidden_act", vision.hidden_act),
        ("projector_hidden_act", hf.projector_hidden_act),
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"{key}={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if not vision.to_dict().get("qkv_bias", True):
        raise ValueError("vision_config.qkv_bias=False is not supported")
    check_divisible(
        {"vision_config.hidden_size": vision.hidden_size},
        "vision_config.num_attention_heads",
        vision.num_attention_heads,
    )
    check_divisible(
        {
            "vision_config.num_attention_heads": vision.num_attention_heads,
            "vision_config.intermediate_size"
            if vision.model_type != "dinov2"
            else "vision_config.mlp_ratio x hidden_size": ffn_size(vision),
            "text_config.hidden_size": text.hidden_size,
        },
        "parallel.tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
    )
    layers = feature_layers(hf)
    if not layers or min(layers) < 0 or not 0 < max(layers) <= vision.num_hidden_layers:
        raise ValueError(
            f"vision_feature_layer={hf.vision_feature_layer} chooses no layers of the "
            f"vision_config.num_hidden_layers={vision.num_hidden_layers}"
        )
    if hf.model_type != "llava":
        _validate_tiles(hf)


def _validate_tiles(hf: PretrainedConfig) -> None:
    vision = hf.vision_config
    if tokens_per_tile(hf) != side(vision) ** 2:
        raise ValueError(
            f"vision_feature_select_strategy={hf.vision_feature_select_strategy!r} leaves {tokens_per_tile(hf)} of "
            f"{num_positions(vision)} positions of a {vision.model_type}: tiles need exactly their patches"
        )
    for resolution in hf.image_grid_pinpoints:
        if any(edge <= 0 or edge % vision.image_size for edge in resolution):
            raise ValueError(
                f"image_grid_pinpoints: {list(resolution)} is not made of tiles of "
                f"vision_config.image_size={vision.image_size}"
            )
    if hf.model_type == "llava_onevision":
        max_tiles(hf.vision_aspect_ratio)


def tokens_per_tile(hf: PretrainedConfig) -> int:
    """Tokens that the tower makes of one image, or of one tile."""
    return num_positions(hf.vision_config) - (hf.vision_feature_select_strategy == "default")


def vision_config(hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Of the tower up to the last feature that is taken."""
    vision = hf.vision_config
    return transformer_config(
        model,
        parallel,
        pipelined=False,
        overrides="vision_megatron",
        num_layers=max(feature_layers(hf)),
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        ffn_hidden_size=ffn_size(vision),
        normalization="LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        gated_linear_unit=gated(vision),
        activation_func=F.silu if gated(vision) else ACTIVATIONS[vision.hidden_act],
        add_bias_linear=True,
    )


def projector_config(hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Of the MLP from the tower's features to tokens of the decoder."""
    text = hf.text_config
    return transformer_config(
        model,
        parallel,
        pipelined=False,
        num_layers=1,
        num_attention_heads=parallel.tensor_model_parallel_size,  # it has none, but mcore wants some that divide
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.hidden_size,
        activation_func=ACTIVATIONS[hf.projector_hidden_act],
        add_bias_linear=hf.multimodal_projector_bias,
    )
