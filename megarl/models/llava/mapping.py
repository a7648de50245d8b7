"""Which tensors of a LLaVA checkpoint each Megatron parameter is made of.

Checkpoint names are those of the published files: ``language_model.*``, ``vision_tower.*``,
``multi_modal_projector.*`` and ``image_newline``.
"""

from __future__ import annotations

import re

from transformers import PretrainedConfig

from megarl.models.common.language import language_mappings
from megarl.models.llava.towers import carried_name, carried_shapes, feature_layers, gated, mlp_names, tower_of
from megarl.models.mapping import QKV, Flattened, FusedGatedMLP, Mapping, Unsqueezed

_SPELLINGS = [  # from -> to, the first that fits
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.(?=vision_tower\.|multi_modal_projector\.|image_newline)", ""),
]
# CLIP and SigLIP towers have lost their middle name; DINOv2's never had one, and its parts are called otherwise
_SHORT_TOWER = re.compile(
    r"vision_tower\.(?=(embeddings\.(class_embedding|patch_embedding|position_embedding)|pre_layrnorm|post_layernorm"
    r"|encoder\.layers|head)(\.|$))"
)


def mappings(hf: PretrainedConfig) -> list[Mapping]:
    """One mapping for each parameter of the unsplit model; tied output weights have none of their own."""
    text = language_mappings(
        hf.text_config,
        tied=hf.tie_word_embeddings,
        prefix="language_model.model.",
        output="language_model.lm_head.weight",
    )
    return [*_tower(hf), *_projector(hf), *text]


def canonical_name(name: str) -> str:
    """The published spelling of a tensor's name, whichever version of transformers wrote the file."""
    for pattern, replacement in _SPELLINGS:
        name, fits = re.subn(f"^{pattern}", replacement, name)
        if fits:
            break
    return _SHORT_TOWER.sub("vision_tower.vision_model.", name)


def _projector(hf: PretrainedConfig) -> list[Mapping]:
    ours, theirs = "vision_projection.mlp.linear_fc", "multi_modal_projector.linear_"
    table = [
        Mapping(megatron=f"{ours}1.weight", hf=(f"{theirs}1.weight",), shard_dim=0),
        Mapping(megatron=f"{ours}2.weight", hf=(f"{theirs}2.weight",), shard_dim=1),
    ]
    if hf.multimodal_projector_bias:
        table.append(Mapping(megatron=f"{ours}1.bias", hf=(f"{theirs}1.bias",), shard_dim=0))
        table.append(Mapping(megatron=f"{ours}2.bias", hf=(f"{theirs}2.bias",)))
    if hf.model_type != "llava":
        table.append(Mapping(megatron="vision_projection.newline", hf=("image_newline",)))
    return table


def _tower(hf: PretrainedConfig) -> list[Mapping]:
    vision = hf.vision_config
    tower = tower_of(vision)
    ones = 1 if vision.model_type == "dinov2" else 0  # dimensions that its embeddings have in front
    ours, theirs = "vision_model.", tower.prefix
    kernel = (vision.num_channels, vision.patch_size, vision.patch_size)
    table: list[Mapping] = [
        Flattened(megatron=f"{ours}patch_embed.weight", hf=(f"{theirs}{tower.stem}.weight",), kernel=kernel),
        Unsqueezed(megatron=f"{ours}position_embedding", hf=(theirs + tower.position,), ones=ones),
    ]
    if tower.stem_bias:
        table.append(Mapping(megatron=f"{ours}patch_embed.bias", hf=(f"{theirs}{tower.stem}.bias",)))
    if tower.class_token:
        table.append(Unsqueezed(megatron=f"{ours}class_embedding", hf=(theirs + tower.class_token,), ones=2 * ones))
    if tower.pre_norm:
        table += _both(Mapping, f"{ours}pre_norm", theirs + tower.pre_norm)
    for i in range(max(feature_layers(hf))):
        table += _layer(vision, f"{ours}blocks.layers.{i}.", f"{theirs}{tower.layers}{i}.")
    table += [Mapping(megatron=f"{ours}carried.{carried_name(name)}", hf=(name,)) for name in carried_shapes(hf)]
    return table


def _layer(vision: PretrainedConfig, ours: str, theirs: str) -> list[Mapping]:
    tower, heads = tower_of(vision), vision.num_attention_heads
    inner, outer = mlp_names(vision)
    first = FusedGatedMLP if gated(vision) else Mapping
    table = [
        *_both(Mapping, f"{ours}input_layernorm", theirs + tower.norms[0]),
        *_both(Mapping, f"{ours}pre_mlp_layernorm", theirs + tower.norms[1]),
        *_both(first, f"{ours}mlp.linear_fc1", theirs + inner, shard_dim=0),
    ]
    for part, name in (("self_attention.linear_proj", tower.proj), ("mlp.linear_fc2", outer)):
        table.append(Mapping(megatron=f"{ours}{part}.weight", hf=(f"{theirs}{name}.weight",), shard_dim=1))
        table.append(Mapping(megatron=f"{ours}{part}.bias", hf=(f"{theirs}{name}.bias",)))
    table += [
        QKV(
            megatron=f"{ours}self_attention.linear_qkv.{kind}",
            hf=tuple(f"{theirs}{name}.{kind}" for name in tower.qkv),
            num_heads=heads,
            num_groups=heads,
        )
        for kind in ("weight", "bias")
    ]
    if tower.layer_scales:
        parts = zip(("self_attn_bda", "mlp_bda"), tower.layer_scales, strict=True)
        table += [Mapping(megatron=f"{ours}{part}.weight", hf=(theirs + name,)) for part, name in parts]
    return table


def _both(kind: type[Mapping], ours: str, theirs: str, **fields: int) -> list[Mapping]:
    """A weight and its bias."""
    return [kind(megatron=f"{ours}.{x}", hf=(f"{theirs}.{x}",), **fields) for x in ("weight", "bias")]
