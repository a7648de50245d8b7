"""Vision towers by ``vision_config.model_type``: what no number in it says, and what checkpoints call their parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tower:
    """Names are relative to ``prefix``, those of a layer's parts to ``layers<number>.``."""

    prefix: str
    stem: str  # the convolution that makes embeddings of patches
    stem_bias: bool
    position: str
    class_token: str | None
    pre_norm: str | None  # before the first layer
    post_norm: str  # after the last: LLaVA takes features before it
    layers: str
    norms: tuple[str, str]  # before attention, before the MLP
    qkv: tuple[str, str, str]
    proj: str
    mlp: tuple[str, str]
    layer_scales: tuple[str, str] | None  # of what attention and MLP add


CLIP = Tower(
    prefix="vision_tower.vision_model.",
    stem="embeddings.patch_embedding",
    stem_bias=False,
    position="embeddings.position_embedding.weight",
    class_token="embeddings.class_embedding",
    pre_norm="pre_layrnorm",  # sic
    post_norm="post_layernorm",
    layers="encoder.layers.",
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    layer_scales=None,
)
SIGLIP = replace(CLIP, stem_bias=True, class_token=None, pre_norm=None)
DINOV2 = Tower(
    prefix="vision_tower.",
    stem="embeddings.patch_embeddings.projection",
    stem_bias=True,
    position="embeddings.position_embeddings",
    class_token="embeddings.cls_token",
    pre_norm=None,
    post_norm="layernorm",
    layers="encoder.layer.",
    norms=("norm1", "norm2"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    mlp=("mlp.fc1", "mlp.fc2"),
    layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
TOWERS = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP, "dinov2": DINOV2}


def tower_of(vision: PretrainedConfig) -> Tower:
    """``ValueError`` that names the key when there is none of that kind."""
    if vision.model_type not in TOWERS:
        raise ValueError(f"vision_config.model_type={vision.model_type!r} is not one of {', '.join(TOWERS)}")
    return TOWERS[vision.model_type]


def gated(vision: PretrainedConfig) -> bool:
    """Whether the tower's MLP is SwiGLU; its two inner matrices are one in the checkpoint."""
    return bool(vision.to_dict().get("use_swiglu_ffn"))


def mlp_names(vision: PretrainedConfig) -> tuple[str, str]:
    """The inner and the outer matrix of a layer's MLP."""
    return ("mlp.weights_in", "mlp.weights_out") if gated(vision) else tower_of(vision).mlp


def ffn_size(vision: PretrainedConfig) -> int:
    """Inner width of the tower's MLP."""
    if vision.model_type != "dinov2":
        return vision.intermediate_size
    size = int(vision.hidden_size * vision.mlp_ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated(vision) else size


def side(vision: PretrainedConfig) -> int:
    """Patches along an edge of an image, or of a tile."""
    return vision.image_size // vision.patch_size


def num_positions(vision: PretrainedConfig) -> int:
    """Patches of an image, and the class token where there is one."""
    return side(vision) ** 2 + (tower_of(vision).class_token is not None)


def feature_layers(hf: PretrainedConfig) -> tuple[int, ...]:
    """Number of layers behind each of the features that are taken; 0 is the embedding of the patches."""
    chosen = hf.vision_feature_layer
    total = hf.vision_config.num_hidden_layers
    return tuple(i if i >= 0 else total + 1 + i for i in ([chosen] if isinstance(chosen, int) else chosen))


def carried_shapes(hf: PretrainedConfig) -> Shapes:
    """What a checkpoint holds of the tower and no image goes through, by name.

    The layers behind the last feature, the norm after all, SigLIP's pooling head and DINOv2's mask token: kept as they
    are, never trained, and written and sent with the rest.
    """
    vision = hf.vision_config
    tower, width, ffn = tower_of(vision), vision.hidden_size, ffn_size(vision)
    shapes: Shapes = {}

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    norm(tower.post_norm)
    inner, outer = mlp_names(vision)
    for i in range(max(feature_layers(hf)), vision.num_hidden_layers):
        layer = f"{tower.layers}{i}."
        for name in tower.norms:
            norm(layer + name)
        for name in (*tower.qkv, tower.proj):
            linear(layer + name, width, width)
        linear(layer + inner, 2 * ffn if gated(vision) else ffn, width)
        linear(layer + outer, width, ffn)
        shapes |= {layer + name: (width,) for name in tower.layer_scales or ()}
    options = vision.to_dict()
    if vision.model_type == "siglip_vision_model" and options.get("vision_use_head", True):
        shapes |= {
            "head.probe": (1, 1, width),
            "head.attention.in_proj_weight": (3 * width, width),
            "head.attention.in_proj_bias": (3 * width,),
        }
        linear("head.attention.out_proj", width, width)
        norm("head.layernorm")
        linear("head.mlp.fc1", ffn, width)
        linear("head.mlp.fc2", width, ffn)
    if options.get("use_mask_token"):
        shapes["embeddings.mask_token"] = (1, width)
    return {tower.prefix + name: shape for name, shape in shapes.items()}


def carried_name(name: str) -> str:
    """What a parameter is called that holds the carried tensor ``name``: without the dots of a path of modules."""
    return name.replace(".", "/")
