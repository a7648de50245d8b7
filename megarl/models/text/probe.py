"""The prompt that compares a text-only policy with transformers."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from megarl.models.probe import Probe, probe_words


def probe(hf: PretrainedConfig) -> Probe:
    """Words alone."""
    tokens = probe_words(hf.vocab_size)
    return Probe(tokens, lambda reference: torch.arange(len(tokens))[None])
