"""Configurations of published models: of their config.json the fields that decide what megarl does with them."""

from __future__ import annotations

import copy
from typing import Any

from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402

_COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _decoder(model_type: str, *sizes: int, **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(_COLUMNS, sizes, strict=True)), "tie_word_embeddings": False} | others


TIED = {"tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LLAMA3_1 = {"rope_scaling": LLAMA3 | {"factor": 8.0}, "rope_theta": 5e5, "max_position_embeddings": 131072}
LLAMA3_2 = {"rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 5e5, "max_position_embeddings": 131072} | TIED
QWEN2 = {"rope_theta": 1e6, "max_position_embeddings": 32768, "sliding_window": 32768, "use_sliding_window": False}
CARD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
QWEN3 = {"head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 40960}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
PHI3_4K = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PHI3_128K = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
    "rope_scaling": LONGROPE,
}
TEXTS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _decoder("llama", 4096, 14336, 32, 32, 8, 128256, **LLAMA3_1),
    "Llama-3.1-70B": _decoder("llama", 8192, 28672, 80, 64, 8, 128256, **LLAMA3_1),
    "Llama-3.2-1B": _decoder("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **LLAMA3_2),
    "Llama-3.2-3B": _decoder("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **LLAMA3_2),
    "SmolLM2-135M": _decoder("llama", 576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, rope_theta=1e5, **TIED),
    "SmolLM2-1.7B": _decoder("llama", 2048, 8192, 24, 32, 32, 49152, max_position_embeddings=8192, **TIED),
    "deepseek-coder-6.7b": _decoder(
        "llama",
        *(4096, 11008, 32, 32, 32, 32256),
        max_position_embeddings=16384,
        rope_theta=1e5,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "Mistral-7B-v0.1": _decoder(
        "mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096, max_position_embeddings=32768
    ),
    "Mistral-7B-v0.3": _decoder(
        "mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None, max_position_embeddings=32768, rope_theta=1e6
    ),
    "Mistral-Nemo-2407": _decoder(
        "mistral", 5120, 14336, 40, 32, 8, 131072, sliding_window=None, head_dim=128, max_position_embeddings=131072
    ),
    "Phi-3-mini-4k": _decoder("phi3", 3072, 8192, 32, 32, 32, 32064, **PHI3_4K),
    "Phi-3-medium-4k": _decoder("phi3", 5120, 17920, 40, 40, 10, 32064, **PHI3_4K),
    "Phi-3-mini-128k": _decoder("phi3", 3072, 8192, 32, 32, 32, 32064, **PHI3_128K),
    "Phi-3.5-mini": _decoder("phi3", 3072, 8192, 32, 32, 32, 32064, **PHI3_128K),
    "Phi-4-mini": _decoder("phi3", 3072, 8192, 32, 24, 8, 200064, partial_rotary_factor=0.75, **PHI3_128K, **TIED),
    "phi-4": _decoder(
        "phi3",
        *(5120, 17920, 40, 40, 10, 100352),
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        rope_theta=250000,
    ),
    "Qwen2.5-0.5B": _decoder("qwen2", 896, 4864, 24, 14, 2, 151936, **QWEN2, **TIED),
    "Qwen2.5-1.5B": _decoder("qwen2", 1536, 8960, 28, 12, 2, 151936, **QWEN2, **TIED),
    "Qwen2.5-7B": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064, **QWEN2),
    "Qwen2.5-7B, yarn": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064, rope_scaling=CARD_YARN, **QWEN2)
    | {"max_position_embeddings": 131072},
    "Qwen2.5-32B": _decoder("qwen2", 5120, 27648, 64, 40, 8, 152064, **QWEN2),
    "Qwen2.5-72B": _decoder("qwen2", 8192, 29568, 80, 64, 8, 152064, **QWEN2),
    "Qwen3-0.6B": _decoder("qwen3", 1024, 3072, 28, 16, 8, 151936, **QWEN3, **TIED),
    "Qwen3-8B": _decoder("qwen3", 4096, 12288, 36, 32, 8, 151936, **QWEN3),
    "Qwen3-32B": _decoder("qwen3", 5120, 25600, 64, 64, 8, 151936, **QWEN3),
    "Qwen3-30B-A3B": _decoder(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, moe_intermediate_size=768, norm_topk_prob=True, **EXPERTS, **QWEN3
    ),
    "gemma-2-9b": _decoder("gemma2", 3584, 14336, 42, 16, 8, 256000),
}
MROPE = QWEN2 | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
MROPE_YARN = QWEN2 | {"rope_scaling": CARD_YARN | {"mrope_section": [16, 24, 24]}, "max_position_embeddings": 128000}
QWEN3_MROPE = {"head_dim": 128, "rope_theta": 5e6, "max_position_embeddings": 262144}
QWEN3_MROPE |= {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}}


def _qwen2_vl(*sizes: int, **others: Any) -> dict[str, Any]:
    text = _decoder("qwen2_vl_text", *sizes, **MROPE, **others)
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": sizes[0]}
    return {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision, **_tie(text)}


def _qwen2_5_vl(inside: int, *sizes: int, rope: dict[str, Any] = MROPE, **others: Any) -> dict[str, Any]:
    text = _decoder("qwen2_5_vl_text", *sizes, **rope | others)
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": inside, "window_size": 112}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": sizes[0]}
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, **_tie(text)}


def _qwen3_vl(large: bool, *sizes: int, **others: Any) -> dict[str, Any]:
    kind = "qwen3_vl_moe" if "num_experts" in others else "qwen3_vl"
    text = _decoder(f"{kind}_text", *sizes, **QWEN3_MROPE | others)
    small = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    vision = (tower if large else small) | {"num_heads": 16, "out_hidden_size": sizes[0]}
    return {"model_type": kind, "text_config": text, "vision_config": vision, **_tie(text)}


def _tie(text: dict[str, Any]) -> dict[str, Any]:
    return {"tie_word_embeddings": text["tie_word_embeddings"]}


def _llava(model_type: str, text: dict[str, Any], **others: Any) -> dict[str, Any]:
    clip = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    clip |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
    return {"model_type": model_type, "text_config": text, "vision_config": clip, **_tie(text)} | others


def _onevision(text: dict[str, Any]) -> dict[str, Any]:
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    siglip |= {"num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    siglip |= {"vision_use_head": False}
    pinpoints = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
    choice = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    return _llava("llava_onevision", text, vision_config=siglip, image_grid_pinpoints=pinpoints, **choice)


_VICUNA_7B = _decoder("llama", 4096, 11008, 32, 32, 32, 32064, max_position_embeddings=4096)
_VICUNA_13B = _decoder("llama", 5120, 13824, 40, 40, 40, 32064, max_position_embeddings=4096)
_YI = _decoder("llama", 7168, 20480, 60, 56, 8, 64064, max_position_embeddings=4096, rope_theta=5e6)
_LLAMA3 = _decoder("llama", 4096, 14336, 32, 32, 8, 128320, max_position_embeddings=8192, rope_theta=5e5)
_MISTRAL = TEXTS["Mistral-7B-v0.3"] | {"vocab_size": 32064}
VLMS: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B": _qwen2_vl(1536, 8960, 28, 12, 2, 151936, **TIED),
    "Qwen2-VL-7B": _qwen2_vl(3584, 18944, 28, 28, 4, 152064),
    "Qwen2-VL-72B": _qwen2_vl(8192, 29568, 80, 64, 8, 152064),
    "Qwen2.5-VL-3B": _qwen2_5_vl(3420, 2048, 11008, 36, 16, 2, 151936, max_position_embeddings=128000, **TIED),
    "Qwen2.5-VL-7B": _qwen2_5_vl(3420, 3584, 18944, 28, 28, 4, 152064, max_position_embeddings=128000),
    "Qwen2.5-VL-7B, yarn": _qwen2_5_vl(3420, 3584, 18944, 28, 28, 4, 152064, rope=MROPE_YARN),
    "Qwen2.5-VL-32B": _qwen2_5_vl(3456, 5120, 27648, 64, 40, 8, 152064, max_position_embeddings=128000),
    "Qwen2.5-VL-72B": _qwen2_5_vl(3456, 8192, 29568, 80, 64, 8, 152064, max_position_embeddings=128000),
    "Qwen3-VL-2B": _qwen3_vl(False, 2048, 6144, 28, 16, 8, 151936, **TIED),
    "Qwen3-VL-4B": _qwen3_vl(False, 2560, 9728, 36, 32, 8, 151936, **TIED),
    "Qwen3-VL-8B": _qwen3_vl(True, 4096, 12288, 36, 32, 8, 151936),
    "Qwen3-VL-32B": _qwen3_vl(True, 5120, 25600, 64, 64, 8, 151936),
    "Qwen3-VL-30B-A3B": _qwen3_vl(True, 2048, 6144, 48, 32, 4, 151936, moe_intermediate_size=768, **EXPERTS),
    "Qwen3-VL-235B-A22B": _qwen3_vl(True, 4096, 12288, 94, 64, 4, 151936, moe_intermediate_size=1536, **EXPERTS),
    "llava-1.5-7b": _llava("llava", _VICUNA_7B),
    "llava-1.5-13b": _llava("llava", _VICUNA_13B),
    "llava-v1.6-mistral-7b": _llava("llava_next", _MISTRAL),
    "llava-v1.6-vicuna-7b": _llava("llava_next", _VICUNA_7B),
    "llava-v1.6-34b": _llava("llava_next", _YI),
    "llama3-llava-next-8b": _llava("llava_next", _LLAMA3),
    "llava-onevision-0.5b": _onevision(_decoder("qwen2", 896, 4864, 24, 14, 2, 152000, **QWEN2, **TIED)),
    "llava-onevision-7b": _onevision(_decoder("qwen2", 3584, 18944, 28, 28, 4, 152128, **QWEN2)),
}
PUBLISHED = VLMS | TEXTS
_CONDITIONAL = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
}
_CAUSAL = {"llama": "Llama", "mistral": "Mistral", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_CAUSAL |= {"qwen3_moe": "Qwen3Moe", "gemma2": "Gemma2"}


def published(name: str) -> transformers.PretrainedConfig:
    """The configuration as transformers reads it from the files of ``name``."""
    fields = copy.deepcopy(PUBLISHED[name])  # transformers fills in the dict of positions
    kind = fields.pop("model_type")
    if kind in _CONDITIONAL:
        architecture = f"{_CONDITIONAL[kind]}ForConditionalGeneration"
    else:
        architecture = f"{_CAUSAL[kind]}ForCausalLM"
    return transformers.AutoConfig.for_model(kind, architectures=[architecture], **fields)
