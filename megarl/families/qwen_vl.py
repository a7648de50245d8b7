"""Qwen2-VL and Qwen2.5-VL; Qwen3-VL and its mixture of experts, whose files are named otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarl.families.family import Architecture, Family, Traits
from megarl.families.sizes import Block, VisionSizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def vision_sizes(hf_config: PretrainedConfig) -> VisionSizes:
    """Of the tower and its mergers."""
    vision, hidden = hf_config.vision_config, hf_config.get_text_config().hidden_size
    first = hf_config.model_type == "qwen2_vl"
    width = vision.embed_dim if first else vision.hidden_size
    merge = vision.spatial_merge_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ffn = int(width * vision.mlp_ratio) if first else vision.intermediate_size
    gated = hf_config.model_type == "qwen2_5_vl"
    return VisionSizes(
        layers=Block(layers=vision.depth, hidden=width, query=width, key=width, ffn=ffn, gated=gated),
        patches_per_token=merge,
        patch=patch,
        other=width * (patch + (getattr(vision, "num_position_embeddings", None) or 0)),
        projector=mergers * (width * merge) * (width * merge + hidden),
    )


_PACKAGE = "megarl.models.qwen_vl"
_PROCESSOR = "megarl.data.processors.qwen_vl:QwenVLProcessor"
_QWEN3 = Architecture(
    processor="megarl.data.processors.qwen_vl:Qwen3VLProcessor",
    engine_prefixes={"visual.": "model.visual.", "model.": "model.language_model."},
)

QWEN_VL = Family(
    name="qwen_vl",
    package=_PACKAGE,
    architectures={
        "Qwen2VLForConditionalGeneration": Architecture(_PROCESSOR),
        "Qwen2_5_VLForConditionalGeneration": Architecture(_PROCESSOR, engine_model=True),
    },
    decoders={"qwen2_vl_text": Traits(qkv_bias=True), "qwen2_5_vl_text": Traits(qkv_bias=True)},
    names=f"{_PACKAGE}.mapping:canonical_name",
    vision_sizes=vision_sizes,
)

QWEN3_VL = Family(
    name="qwen3_vl",
    package=_PACKAGE,
    architectures={"Qwen3VLForConditionalGeneration": _QWEN3, "Qwen3VLMoeForConditionalGeneration": _QWEN3},
    decoders={
        "qwen3_vl_text": Traits(qk_norm=True, interleaved_axes=True),
        "qwen3_vl_moe_text": Traits(qk_norm=True, experts=True, interleaved_axes=True),
    },
    layouts=f"{_PACKAGE}.mapping:canonical_tensor",
    vision_sizes=vision_sizes,
)
