"""Which tensors of a Qwen2.5-VL checkpoint each Megatron parameter is made of.

Checkpoint names are those of the published files, which SGLang reads: ``visual.*``, ``model.*``, ``lm_head.weight``.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from megarl.models.common.language import language_mappings
from megarl.models.mapping import Flattened, FusedQKV, GatedMLP, Mapping


def mappings(hf: PretrainedConfig) -> list[Mapping]:
    """One mapping for each parameter of the unsplit model; tied output weights have none of their own."""
    return [*_vision(hf), *language_mappings(hf.text_config, tied=hf.tie_word_embeddings)]


def canonical_name(name: str) -> str:
    """The published spelling of a tensor's name, whichever version of transformers wrote the file."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def _vision(hf: PretrainedConfig) -> list[Mapping]:
    vision = hf.vision_config
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    merger, theirs = "vision_projection.", "visual.merger."
    table: list[Mapping] = [
        Flattened(megatron="vision_model.patch_embed.weight", hf=("visual.patch_embed.proj.weight",), kernel=kernel),
        Mapping(megatron=f"{merger}norm.weight", hf=(f"{theirs}ln_q.weight",)),
        Mapping(megatron=f"{merger}mlp.linear_fc1.weight", hf=(f"{theirs}mlp.0.weight",), shard_dim=0),
        Mapping(megatron=f"{merger}mlp.linear_fc1.bias", hf=(f"{theirs}mlp.0.bias",), shard_dim=0),
        Mapping(megatron=f"{merger}mlp.linear_fc2.weight", hf=(f"{theirs}mlp.2.weight",), shard_dim=1),
        Mapping(megatron=f"{merger}mlp.linear_fc2.bias", hf=(f"{theirs}mlp.2.bias",)),
    ]
    for i in range(vision.depth):
        ours, theirs = f"vision_model.blocks.layers.{i}.", f"visual.blocks.{i}."
        table += [
            Mapping(megatron=f"{ours}input_layernorm.weight", hf=(f"{theirs}norm1.weight",)),
            Mapping(megatron=f"{ours}pre_mlp_layernorm.weight", hf=(f"{theirs}norm2.weight",)),
            Mapping(
                megatron=f"{ours}self_attention.linear_proj.weight", hf=(f"{theirs}attn.proj.weight",), shard_dim=1
            ),
            Mapping(megatron=f"{ours}self_attention.linear_proj.bias", hf=(f"{theirs}attn.proj.bias",)),
            Mapping(megatron=f"{ours}mlp.linear_fc2.weight", hf=(f"{theirs}mlp.down_proj.weight",), shard_dim=1),
            Mapping(megatron=f"{ours}mlp.linear_fc2.bias", hf=(f"{theirs}mlp.down_proj.bias",)),
        ]
        for kind in ("weight", "bias"):
            table += [
                FusedQKV(
                    megatron=f"{ours}self_attention.linear_qkv.{kind}",
                    hf=(f"{theirs}attn.qkv.{kind}",),
                    num_heads=vision.num_heads,
                    num_groups=vision.num_heads,
                ),
                GatedMLP(
                    megatron=f"{ours}mlp.linear_fc1.{kind}",
                    hf=(f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}"),
                ),
            ]
    return table
