"""The contract between a model family and the rest of megarl, and the families by Hugging Face architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.interleaved import InterleavedModel
from megarl.models.common.language import validate_language
from megarl.models.common.language_model import LanguageModel
from megarl.models.llava.config import validate as llava_validate
from megarl.models.llava.mapping import canonical_name as llava_canonical_name
from megarl.models.llava.mapping import mappings as llava_mappings
from megarl.models.llava.model import build as llava_build
from megarl.models.llava.probe import probe as llava_probe
from megarl.models.mapping import Mapping
from megarl.models.probe import Probe, text_probe
from megarl.models.qwen_vl.config import validate as qwen_vl_validate
from megarl.models.qwen_vl.mapping import canonical_name as qwen_vl_canonical_name
from megarl.models.qwen_vl.mapping import canonical_tensor as qwen3_vl_canonical_tensor
from megarl.models.qwen_vl.mapping import mappings as qwen_vl_mappings
from megarl.models.qwen_vl.model import QwenVLModel
from megarl.models.qwen_vl.probe import probe as qwen_vl_probe
from megarl.models.text.mapping import mappings as text_mappings


@dataclass(frozen=True)
class Family:
    """``build(hf_config, model, parallel, *, pre_process, post_process, vp_stage)`` makes a piece of the model.

    ``build_stage`` makes all that a rank holds. ``validate(hf_config, parallel)`` comes first: it raises ``ValueError``
    that names the key when the layout cannot divide the model. A model is a
    ``models.common.LanguageModel``. ``canonical_name`` is the published spelling of a tensor's name, whichever version
    of transformers wrote the file, and ``canonical_tensor(config, name, tensor)`` the tensor of that name as published
    (``config``: that of config.json). ``probe`` makes the prompt whose logits a converter compares with transformers'.
    """

    name: str
    architectures: tuple[str, ...]
    build: Callable[..., MegatronModule]
    mappings: Callable[[PretrainedConfig], list[Mapping]]
    validate: Callable[[PretrainedConfig, ParallelConfig], None]
    canonical_name: Callable[[str], str]
    canonical_tensor: Callable[[dict[str, Any], str, Tensor], Tensor]
    probe: Callable[[PretrainedConfig], Probe]


def _as_stored(config: dict[str, Any], name: str, tensor: Tensor) -> Tensor:
    """Every version of transformers writes these tensors alike."""
    return tensor


QWEN_VL = Family(
    name="qwen_vl",
    architectures=("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    build=QwenVLModel,
    mappings=qwen_vl_mappings,
    validate=qwen_vl_validate,
    canonical_name=qwen_vl_canonical_name,
    canonical_tensor=_as_stored,
    probe=qwen_vl_probe,
)

QWEN3_VL = replace(
    QWEN_VL,
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
    canonical_name=str,
    canonical_tensor=qwen3_vl_canonical_tensor,
)

LLAVA = Family(
    name="llava",
    architectures=(
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
    ),
    build=llava_build,
    mappings=llava_mappings,
    validate=llava_validate,
    canonical_name=llava_canonical_name,
    canonical_tensor=_as_stored,
    probe=llava_probe,
)

TEXT = Family(
    name="text",
    architectures=(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ),
    build=LanguageModel,
    mappings=text_mappings,
    validate=validate_language,
    canonical_name=str,
    canonical_tensor=_as_stored,
    probe=text_probe,
)

FAMILIES: dict[str, Family] = {
    architecture: family for family in (QWEN_VL, QWEN3_VL, LLAVA, TEXT) for architecture in family.architectures
}


def build_stage(hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> MegatronModule:
    """This rank's part of the model: a ``LanguageModel``, or the ``InterleavedModel`` of several.

    Every rank of the world calls it when the groups of ``parallel`` have been built.
    """
    family = family_of(hf_config)
    family.validate(hf_config, parallel)
    if not parallel.interleaved:
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        return family.build(hf_config, model, parallel, pre_process=first, post_process=last)
    chunks = []
    for number in range(parallel.virtual_pipeline_model_parallel_size):
        where = {"ignore_virtual": False, "vp_stage": number}
        first, last = parallel_state.is_pipeline_first_stage(**where), parallel_state.is_pipeline_last_stage(**where)
        chunks.append(family.build(hf_config, model, parallel, pre_process=first, post_process=last, vp_stage=number))
    return InterleavedModel(chunks)


def family_of(hf_config: PretrainedConfig) -> Family:
    """The family of ``hf_config.architectures[0]``; ``ValueError`` when megarl has none."""
    architectures = hf_config.architectures or []
    if not architectures or architectures[0] not in FAMILIES:
        raise ValueError(f"architectures={architectures} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[architectures[0]]
