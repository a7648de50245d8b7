"""From a model's configuration to what a rank holds of it."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.families import family_of
from megarl.models.common.interleaved import InterleavedModel


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
