"""Hugging Face configurations of Qwen2-VL, Qwen2.5-VL and Qwen3-VL as those of Megatron-Core's transformers.

The three share a decoder and differ in their vision towers: ``Tower`` is everything that the modules and the mapping
table want to know of one, whatever its generation calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.language import check_divisible, sparse_layers, validate_language
from megarl.models.common.transformer_config import transformer_config

NORM_EPS = 1e-6  # of every norm in the vision tower; no key in the checkpoint says so

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Tower:
    """A vision tower with its patch mergers."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int  # of the decoder
    num_heads: int
    activation: str  # one of ACTIVATIONS
    normalization: str  # RMSNorm | LayerNorm
    gated: bool  # the MLP has a gate
    patch: tuple[int, int, int, int]  # channels, frames, height, width of a patch
    patch_bias: bool
    merge: int  # merge x merge patches become one token
    window: int = 0  # side of an attention window in tokens; 0: every layer attends to whole frames
    full_attention: frozenset[int] = frozenset()  # layers that do so where there are windows
    positions: int = 0  # side of the grid of learned positions; 0: none, only rotary ones
    deepstack: tuple[int, ...] = ()  # layers whose outputs the first layers of the decoder also see

    @property
    def merged_size(self) -> int:
        """Width of the patches of one token, side by side."""
        return self.hidden_size * self.merge**2

    @property
    def patch_size(self) -> int:
        """Numbers of a patch."""
        channels, frames, height, width = self.patch
        return channels * frames * height * width


def tower(hf: PretrainedConfig) -> Tower:
    """The vision tower of ``hf``; its ``model_type`` decides what the numbers mean."""
    vision = hf.vision_config
    merge = vision.spatial_merge_size
    shared = {
        "num_layers": vision.depth,
        "num_heads": vision.num_heads,
        "activation": vision.hidden_act,
        "patch": (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size),
        "merge": merge,
    }
    if hf.model_type == "qwen2_vl":
        return Tower(
            hidden_size=vision.embed_dim,
            intermediate_size=int(vision.embed_dim * vision.mlp_ratio),
            out_hidden_size=vision.hidden_size,
            normalization="LayerNorm",
            gated=False,
            patch_bias=False,
            **shared,
        )
    shared |= {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": vision.out_hidden_size,
    }
    if hf.model_type == "qwen2_5_vl":
        return Tower(
            normalization="RMSNorm",
            gated=True,
            patch_bias=False,
            window=vision.window_size // vision.patch_size // merge,
            full_attention=frozenset(vision.fullatt_block_indexes),
            **shared,
        )
    return Tower(
        normalization="LayerNorm",
        gated=False,
        patch_bias=True,
        positions=int(vision.num_position_embeddings**0.5),
        deepstack=tuple(vision.deepstack_visual_indexes),
        **shared,
    )


def validate(hf: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise a ``ValueError`` that names the key when the layout cannot divide the model or a feature is unknown."""
    text, vision = hf.text_config, tower(hf)
    validate_language(text, parallel)
    check_divisible(
        {
            "vision_config.num_heads": vision.num_heads,
            "intermediate size of vision_config": vision.intermediate_size,
            "hidden size of vision_config x spatial_merge_size^2": vision.merged_size,
        },
        "parallel.tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
    )
    if any(sparse_layers(text)) and text.hidden_size in (text.moe_intermediate_size, 2 * text.moe_intermediate_size):
        raise ValueError(
            f"hidden_size={text.hidden_size} and moe_intermediate_size={text.moe_intermediate_size} give experts "
            "square matrices, and files do not say which of their two layouts these have"
        )
    if vision.activation not in ACTIVATIONS:
        raise ValueError(f"vision_config.hidden_act={vision.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(
            f"vision_config: the tower's output of {vision.out_hidden_size} is not hidden_size={text.hidden_size}"
        )
    if vision.positions**2 != hf.vision_config.to_dict().get("num_position_embeddings", 0):
        raise ValueError("vision_config.num_position_embeddings is not the square of a whole number")
    layers = list(vision.deepstack)
    even = text.num_hidden_layers // parallel.num_pipeline_chunks
    first = parallel.pipeline_layout[0] if parallel.pipeline_layout else even
    if len(layers) > first:
        raise ValueError(
            f"vision_config.deepstack_visual_indexes={layers} feed the first {len(layers)} decoder layers, which must "
            f"stand beside the vision tower: parallel.pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x parallel.virtual_pipeline_model_parallel_size="
            f"{max(1, parallel.virtual_pipeline_model_parallel_size)} with parallel.pipeline_layout="
            f"{list(parallel.pipeline_layout)} leaves {first} there"
        )
    if layers != sorted(set(layers)) or not all(0 <= layer < vision.num_layers for layer in layers):
        raise ValueError(
            f"vision_config.deepstack_visual_indexes={layers} must ascend and lie below depth={vision.num_layers}"
        )


def vision_config(vision: Tower, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    return transformer_config(
        model,
        parallel,
        pipelined=False,
        overrides="vision_megatron",
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        normalization=vision.normalization,
        layernorm_epsilon=NORM_EPS,
        gated_linear_unit=vision.gated,
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=True,
    )


def projector_config(vision: Tower, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Of a patch merger: an MLP from ``merge^2`` patches to one token of the decoder."""
    return transformer_config(
        model,
        parallel,
        pipelined=False,
        num_layers=1,
        num_attention_heads=vision.num_heads,  # it has none, but mcore wants some that divide
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.merged_size,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
