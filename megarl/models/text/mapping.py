"""The weight names of checkpoints of text-only policies, whose model is ``models.common.LanguageModel`` itself."""

from __future__ import annotations

from transformers import PretrainedConfig

from megarl.models.common.language import language_mappings
from megarl.models.mapping import Mapping


def mappings(hf: PretrainedConfig) -> list[Mapping]:
    """One mapping for each parameter of the unsplit model; tied output weights have none of their own."""
    return language_mappings(hf, tied=hf.tie_word_embeddings)
