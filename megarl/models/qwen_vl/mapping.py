"""Which tensors of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint each Megatron parameter is made of.

Checkpoint names are those of the published files: ``visual.*``, ``model.*``, ``lm_head.weight`` before Qwen3-VL, and
``model.visual.*``, ``model.language_model.*``, ``lm_head.weight`` from then on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from megarl.models.common.language import language_mappings
from megarl.models.mapping import Flattened, FusedQKV, GatedMLP, Mapping
from megarl.models.qwen_vl.config import Tower, tower

# model_type -> what the checkpoint calls the parts of a tower's MLP, and of a merger
MLP_NAMES = {"qwen2_vl": ("fc1", "fc2"), "qwen2_5_vl": ("", "down_proj"), "qwen3_vl": ("linear_fc1", "linear_fc2")}
MERGER_NAMES = {"qwen2_vl": ("ln_q", "mlp.0", "mlp.2"), "qwen3_vl": ("norm", "linear_fc1", "linear_fc2")}
MERGER_NAMES["qwen2_5_vl"] = MERGER_NAMES["qwen2_vl"]
MLP_NAMES["qwen3_vl_moe"], MERGER_NAMES["qwen3_vl_moe"] = MLP_NAMES["qwen3_vl"], MERGER_NAMES["qwen3_vl"]


def mappings(hf: PretrainedConfig) -> list[Mapping]:
    """One mapping for each parameter of the unsplit model; tied output weights have none of their own."""
    text, tied = hf.text_config, hf.tie_word_embeddings
    if hf.model_type in ("qwen3_vl", "qwen3_vl_moe"):
        return [*_vision(hf, "model.visual."), *language_mappings(text, tied=tied, prefix="model.language_model.")]
    return [*_vision(hf, "visual."), *language_mappings(text, tied=tied)]


def canonical_name(name: str) -> str:
    """The published spelling, before Qwen3-VL, of a tensor's name, whichever version of transformers wrote the file."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def canonical_tensor(config: dict[str, Any], name: str, tensor: Tensor) -> Tensor:
    """The experts' matrices of Qwen3-VL-MoE as published, [E, inputs, outputs]; transformers 5 writes its own layout.

    Goes by the shape; ``validate`` refuses models of which it does not tell.
    """
    kind = name.rpartition("mlp.experts.")[2]
    hidden = {"gate_up_proj": 1, "down_proj": 2}.get(kind)  # the dimension that is the decoder's width
    if hidden is None or tensor.dim() != 3 or tensor.shape[hidden] == config["text_config"]["hidden_size"]:
        return tensor
    return tensor.transpose(1, 2)


def _linear(ours: str, theirs: str, *, shard_dim: int) -> list[Mapping]:
    """Weight and bias of a linear layer; split over its inputs (1), its bias is whole on every rank."""
    return [
        Mapping(megatron=f"{ours}.weight", hf=(f"{theirs}.weight",), shard_dim=shard_dim),
        Mapping(megatron=f"{ours}.bias", hf=(f"{theirs}.bias",), shard_dim=None if shard_dim else 0),
    ]


def _norm(ours: str, theirs: str, vision: Tower) -> list[Mapping]:
    kinds = ("weight", "bias") if vision.normalization == "LayerNorm" else ("weight",)
    return [Mapping(megatron=f"{ours}.{kind}", hf=(f"{theirs}.{kind}",)) for kind in kinds]


def _merger(ours: str, theirs: str, vision: Tower, model_type: str) -> list[Mapping]:
    norm, first, second = MERGER_NAMES[model_type]
    return [
        *_norm(f"{ours}norm", f"{theirs}{norm}", vision),
        *_linear(f"{ours}mlp.linear_fc1", f"{theirs}{first}", shard_dim=0),
        *_linear(f"{ours}mlp.linear_fc2", f"{theirs}{second}", shard_dim=1),
    ]


def _vision(hf: PretrainedConfig, prefix: str) -> list[Mapping]:
    vision = tower(hf)
    ours, theirs = "vision_model.patch_embed.", f"{prefix}patch_embed.proj."
    table: list[Mapping] = [
        Flattened(megatron=f"{ours}weight", hf=(f"{theirs}weight",), kernel=vision.patch),
        *_merger("vision_projection.", f"{prefix}merger.", vision, hf.model_type),
    ]
    if vision.patch_bias:
        table.append(Mapping(megatron=f"{ours}bias", hf=(f"{theirs}bias",)))
    if vision.positions:
        table.append(Mapping(megatron="vision_model.positions.weight", hf=(f"{prefix}pos_embed.weight",)))
    for k in range(len(vision.deepstack)):
        ours, theirs = f"vision_projection.deepstack{k}.", f"{prefix}deepstack_merger_list.{k}."
        table += _merger(ours, theirs, vision, hf.model_type)
    for i in range(vision.num_layers):
        table += _layer(f"vision_model.blocks.layers.{i}.", f"{prefix}blocks.{i}.", vision, hf.model_type)
    return table


def _layer(ours: str, theirs: str, vision: Tower, model_type: str) -> list[Mapping]:
    first, second = MLP_NAMES[model_type]
    table: list[Mapping] = [
        *_norm(f"{ours}input_layernorm", f"{theirs}norm1", vision),
        *_norm(f"{ours}pre_mlp_layernorm", f"{theirs}norm2", vision),
        *_linear(f"{ours}self_attention.linear_proj", f"{theirs}attn.proj", shard_dim=1),
        *_linear(f"{ours}mlp.linear_fc2", f"{theirs}mlp.{second}", shard_dim=1),
    ]
    if not vision.gated:
        table += _linear(f"{ours}mlp.linear_fc1", f"{theirs}mlp.{first}", shard_dim=0)
    for kind in ("weight", "bias"):
        table.append(
            FusedQKV(
                megatron=f"{ours}self_attention.linear_qkv.{kind}",
                hf=(f"{theirs}attn.qkv.{kind}",),
                num_heads=vision.num_heads,
                num_groups=vision.num_heads,
            )
        )
        if vision.gated:
            names = (f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}")
            table.append(GatedMLP(megatron=f"{ours}mlp.linear_fc1.{kind}", hf=names))
    return table
