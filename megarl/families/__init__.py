"""The model families by the class of transformers that a model directory names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarl.families import llava, qwen_vl, text
from megarl.families.family import Architecture, Family, Traits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ALL = (qwen_vl.QWEN_VL, qwen_vl.QWEN3_VL, llava.FAMILY, text.FAMILY)
FAMILIES: dict[str, Family] = {architecture: family for family in ALL for architecture in family.architectures}
TRAITS: dict[str, Traits] = {model_type: traits for family in ALL for model_type, traits in family.decoders.items()}


def family_of(hf_config: PretrainedConfig) -> Family:
    """The family of ``hf_config.architectures[0]``; ``ValueError`` when megarl has none."""
    architectures = hf_config.architectures or []
    if not architectures or architectures[0] not in FAMILIES:
        raise ValueError(f"architectures={architectures} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[architectures[0]]


def architecture_of(hf_config: PretrainedConfig) -> Architecture:
    """What is known of ``hf_config.architectures[0]``; ``ValueError`` when that is nothing."""
    return family_of(hf_config).architectures[hf_config.architectures[0]]


def traits_of(text_config: PretrainedConfig) -> Traits:
    """Of a decoder; ``ValueError`` when megarl has none of its ``model_type``."""
    if text_config.model_type not in TRAITS:
        known = ", ".join(TRAITS)
        raise ValueError(f"model_type={text_config.model_type!r} of the language model is not one of {known}")
    return TRAITS[text_config.model_type]


__all__ = ["FAMILIES", "TRAITS", "Architecture", "Family", "Traits", "architecture_of", "family_of", "traits_of"]
