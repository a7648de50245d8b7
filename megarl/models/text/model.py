"""Text-only policies: the decoder that vision-language families share, and the weight names of its checkpoints."""

from __future__ import annotations

from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.language import language_mappings, validate_language
from megarl.models.common.language_model import LanguageModel
from megarl.models.mapping import Mapping


class TextModel(LanguageModel):
    """One pipeline stage of a Llama-like model."""

    def __init__(
        self,
        hf: PretrainedConfig,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        validate_language(hf, parallel)
        tied = hf.tie_word_embeddings
        super().__init__(
            hf, model, parallel, tied=tied, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )


def mappings(hf: PretrainedConfig) -> list[Mapping]:
    """One mapping for each parameter of the unsplit model; tied output weights have none of their own."""
    return language_mappings(hf, tied=hf.tie_word_embeddings)
