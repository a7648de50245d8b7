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
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE = {  # of three quarters of a head's 16 channels
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
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
# like those; the longest of the samples, 45 tokens, fits what each allows
LONG_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
    "yarn": ("Qwen2Config", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "yarn_said_factor": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": YARN | {"attention_factor": 0.8}},
    ),
    "longrope_partial_tied": (
        "Phi3Config",
        {"num_key_value_heads": 2, "pad_token_id": 0, "rope_parameters": LONGROPE, "tie_word_embeddings": True}
        | {"original_max_position_embeddings": 64},
    ),
    "dynamic": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "window": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 45}),
    "six_heads": ("Qwen2Config", {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}),
    "window_of_layers": (
        "Qwen2Config",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 45, "max_window_layers": 1},
    ),
}


class Text(Case):
    title = "Llama, Mistral, Phi-3, Qwen2, Qwen3"
    names = tuple(CONFIGS)

    def config(self, name: str) -> transformers.PretrainedConfig:
        kind, fields = (CONFIGS | LONG_CONFIGS)[name]
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


class Qwen3Moe(Text):
    """``sparse``: every layer has experts. ``mixed``: the first does not, and the chosen ones' weights sum to less."""

    title = "Qwen3-MoE"
    names = ("sparse", "mixed")

    def config(self, name: str) -> transformers.Qwen3MoeConfig:
        fields = {"sparse": {"norm_topk_prob": True}, "mixed": {"decoder_sparse_step": 2, "tie_word_embeddings": True}}
        return transformers.Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            **fields[name],
        )

    def draw(self, seed: int) -> transformers.Qwen3MoeConfig:
        draw = random.Random(seed)
        config = self.config(draw.choice(self.names))
        config.update(
            {
                "num_hidden_layers": 4,
                "num_attention_heads": 4 * draw.choice([1, 2]),
                "num_key_value_heads": 4,
                "moe_intermediate_size": 4 * draw.randint(3, 9),
                "num_experts": draw.choice([4, 8]),
                "num_experts_per_tok": draw.choice([2, 3]),
                "mlp_only_layers": draw.choice([[], [1], [0, 3]]),
            }
        )
        return config

    def published(self, config: transformers.PretrainedConfig, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every expert's matrices by themselves, as files hold them and transformers does not."""
        result: dict[str, Tensor] = {}
        for name, tensor in named.items():
            prefix, _, kind = name.rpartition("experts.")
            if kind not in ("gate_up_proj", "down_proj"):
                result[name] = tensor
                continue
            for number, expert in enumerate(tensor):
                parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
                for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                    result[f"{prefix}experts.{number}.{part}_proj.weight"] = matrix
        return result
