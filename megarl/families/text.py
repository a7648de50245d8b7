"""Llama, Mistral, Phi-3, Qwen2, Qwen3 and Qwen3-MoE: a decoder alone."""

from __future__ import annotations

from megarl.families.family import Architecture, Family, Traits

_WORDS = Architecture(processor="megarl.data.processors.text:TextProcessor")

FAMILY = Family(
    name="text",
    package="megarl.models.text",
    architectures={
        "LlamaForCausalLM": _WORDS,
        "MistralForCausalLM": _WORDS,
        "Phi3ForCausalLM": _WORDS,
        "Qwen2ForCausalLM": _WORDS,
        "Qwen3ForCausalLM": _WORDS,
        "Qwen3MoeForCausalLM": _WORDS,
    },
    decoders={
        "llama": Traits(),
        "mistral": Traits(),
        "phi3": Traits(fused=True, partial_rotary=True),
        "qwen2": Traits(qkv_bias=True),
        "qwen3": Traits(qk_norm=True),
        "qwen3_moe": Traits(qk_norm=True, experts=True, expert_files=True, reads_norm_topk_prob=True),
    },
)
