"""Which tensors of a Qwen2.5-VL checkpoint each Megatron parameter is made of.

Checkpoint names are those of the published files, which SGLang reads: ``visual.*``, ``model.*``, ``lm_head.weight``.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from megarl.models.mapping import QKV, Flattened, FusedQKV, GatedMLP, Mapping, Vocab


def mappings(hf: PretrainedConfig) -> list[Mapping]:
    """One mapping for each parameter of the unsplit model; tied output weights have none of their own."""
    return [*_vision(hf), *_language(hf)]


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
                ),
                GatedMLP(
                    megatron=f"{ours}mlp.linear_fc1.{kind}",
                    hf=(f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}"),
                ),
            ]
    return table


def _language(hf: PretrainedConfig) -> list[Mapping]:
    text = hf.text_config
    vocab = {"vocab_size": text.vocab_size}
    ours, theirs = "language_model.", "model."
    table: list[Mapping] = [
        Vocab(megatron=f"{ours}embedding.word_embeddings.weight", hf=(f"{theirs}embed_tokens.weight",), **vocab),
        Mapping(megatron=f"{ours}decoder.final_layernorm.weight", hf=(f"{theirs}norm.weight",)),
    ]
    if not hf.tie_word_embeddings:
        table.append(Vocab(megatron=f"{ours}output_layer.weight", hf=("lm_head.weight",), **vocab))
    for i in range(text.num_hidden_layers):
        ours, theirs = f"language_model.decoder.layers.{i}.", f"model.layers.{i}."
        attention = f"{ours}self_attention.linear_"
        table += [
            Mapping(megatron=f"{ours}input_layernorm.weight", hf=(f"{theirs}input_layernorm.weight",)),
            Mapping(megatron=f"{ours}pre_mlp_layernorm.weight", hf=(f"{theirs}post_attention_layernorm.weight",)),
            Mapping(megatron=f"{attention}proj.weight", hf=(f"{theirs}self_attn.o_proj.weight",), shard_dim=1),
            GatedMLP(
                megatron=f"{ours}mlp.linear_fc1.weight",
                hf=(f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"),
            ),
            Mapping(megatron=f"{ours}mlp.linear_fc2.weight", hf=(f"{theirs}mlp.down_proj.weight",), shard_dim=1),
        ]
        table += [
            QKV(
                megatron=f"{attention}qkv.{kind}",
                hf=tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"),
                num_heads=text.num_attention_heads,
                num_groups=text.num_key_value_heads,
            )
            for kind in ("weight", "bias")
        ]
    return table
