"""LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, and the like of other towers and decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarl.families.family import Architecture, Family
from megarl.families.sizes import Block, VisionSizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def vision_sizes(hf_config: PretrainedConfig) -> VisionSizes:
    """Of the tower, as far as its layers are read, and the projector."""
    vision, taken = hf_config.vision_config, hf_config.vision_feature_layer
    taken = [taken] if isinstance(taken, int) else list(taken)
    layers = max(layer if layer >= 0 else vision.num_hidden_layers + 1 + layer for layer in taken)
    width, hidden = vision.hidden_size, hf_config.get_text_config().hidden_size
    ffn = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    side, patch = vision.image_size // vision.patch_size, vision.num_channels * vision.patch_size**2
    return VisionSizes(
        layers=Block(layers=layers, hidden=width, query=width, key=width, ffn=ffn, gated=False),
        # tiles of a frame or of a large image are pooled to fewer tokens in OneVision
        patches_per_token=4 if hf_config.model_type == "llava_onevision" else 1,
        patch=patch,
        other=width * (patch + side**2),
        projector=hidden * (width * len(taken) + hidden),
    )


def _architecture(processor: str) -> Architecture:
    return Architecture(f"megarl.data.processors.llava:{processor}", engine_model=True, engine_processor=True)


FAMILY = Family(
    name="llava",
    package="megarl.models.llava",
    architectures={
        "LlavaForConditionalGeneration": _architecture("LlavaProcessor"),
        "LlavaNextForConditionalGeneration": _architecture("LlavaNextProcessor"),
        "LlavaOnevisionForConditionalGeneration": _architecture("LlavaOnevisionProcessor"),
    },
    names="megarl.models.llava.mapping:canonical_name",
    output_matrix="language_model.lm_head.weight",
    vision_sizes=vision_sizes,
)
