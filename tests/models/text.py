"""Small random decoders without a vision tower for the parity tests."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from tests.models.reference import VOCAB, Case, Sample, words

import transformers  # isort: skip  after torchvision_cpu

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> configuration class, and what differs from heads of 16 for a hidden size of 64
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa2_tied": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama3_scaled": ("LlamaConfig", {"num_key_value_heads": 4, "rope_parameters": LLAMA3_SCALING}),
    "mistral_wide_heads": ("MistralConfig", {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": None}),
    "phi3_fused": ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "qwen2_untied": ("Qwen2Config", {"num_key_value_heads": 2, "hidden_size": 96}),
    "qwen3_narrow_heads": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
}


class Text(Case):
    title = "Llama, Mistral, Qwen2, Qwen3"
    names = tuple(CONFIGS)

    def config(self, name: str) -> transformers.PretrainedConfig:
        kind, fields = CONFIGS[name]
        shape = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        rest = {"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        config = getattr(transformers, kind)(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **shape | rest | fields)
        config.architectures = [kind.replace("Config", "ForCausalLM")]
        return config

    def draw(self, seed: int) -> transformers.PretrainedConfig:
        draw = random.Random(seed)
        heads, size = 4 * draw.choice([1, 2, 3]), draw.choice([48, 96])
        config = self.config(draw.choice(list(CONFIGS)))
        config.update(
            {
                "num_hidden_layers": 4,
                "num_attention_heads": heads,
                "num_key_value_heads": 4,
                "head_dim": size // heads if "Qwen2" in type(config).__name__ else draw.choice([8, 12, 16]),
                "hidden_size": size,
                "intermediate_size": 2 * draw.randint(12, 40),
                "tie_word_embeddings": draw.random() < 0.5,
            }
        )
        return config

    def samples(self, model: transformers.PreTrainedModel, seed: int) -> list[Sample]:
        """Lengths from 9 to 45."""
        generator = torch.Generator().manual_seed(seed)
        none = torch.zeros(0, 3, dtype=torch.int64)
        return [
            Sample(words(n, generator), torch.arange(n)[None], torch.zeros(0, 0), none, none[:, 1:])
            for n in (9, 45, 12, 30, 17, 23, 10)
        ]

    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        return {}
