"""What each field of a family's config.json does: changed alone, megarl against transformers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megarl.checkpoint.convert import single_process
from megarl.checkpoint.huggingface import load_hf, read_config
from megarl.config import ModelConfig, ParallelConfig
from megarl.families import family_of
from megarl.models.common.language import longest_sequence
from megarl.models.stage import build_stage
from tests.models.families import FAMILIES
from tests.models.published import LONGROPE
from tests.models.reference import Reference, evaluate, pack, trained

import transformers  # isort: skip  after torchvision_cpu

# the small model of a family whose fields are changed; of text-only models one for each kind
MODELS = {
    "qwen2_vl": ("qwen2_vl", "seed0"),
    "qwen2_5_vl": ("qwen2_5_vl", "gqa2_tied"),
    "qwen3_vl": ("qwen3_vl", "seed0"),
    "qwen3_vl_moe": ("qwen3_vl_moe", "sparse"),
    "llava": ("llava", "clip_llama"),
    "llava_next": ("llava_next", "next_clip_mistral"),
    "llava_onevision": ("llava_onevision", "onevision_siglip_qwen2"),
    "llama": ("text", "llama_gqa2_tied"),
    "mistral": ("text", "mistral_wide_heads"),
    "phi3": ("text", "phi3_fused"),
    "qwen2": ("text", "qwen2_untied"),
    "qwen3": ("text", "qwen3_narrow_heads"),
    "qwen3_moe": ("qwen3_moe", "sparse"),
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
ORIGINAL = {"original_max_position_embeddings": 128}
ROPES = {  # a section of mrope is kept
    "another rope_theta": {"rope_type": "default", "rope_theta": 500.0},
    "partial_rotary_factor": DEFAULT | {"partial_rotary_factor": 0.5},
    "linear": DEFAULT | {"rope_type": "linear", "factor": 3.0},
    "dynamic": DEFAULT | {"rope_type": "dynamic", "factor": 3.0},
    "yarn": DEFAULT | {"rope_type": "yarn", "factor": 4.0} | ORIGINAL,
    "llama3": DEFAULT
    | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 16},
    "longrope": DEFAULT | LONGROPE | ORIGINAL | {"rope_type": "longrope"},  # factors by the number of channels
    "proportional": DEFAULT | {"rope_type": "proportional", "factor": 3.0},
}
# field -> values; one that a model has already is left out
VALUES: dict[str, list[Any]] = {
    "hidden_size": [48, 96],
    "intermediate_size": [32, 40],
    "moe_intermediate_size": [20, 28],
    "num_hidden_layers": [3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4],
    "head_dim": [12],
    "hidden_act": ["gelu", "silu", "quick_gelu"],
    "max_position_embeddings": [512],
    "original_max_position_embeddings": [64],
    "rms_norm_eps": [1e-2],
    "layer_norm_eps": [1e-2],
    "rope_parameters": list(ROPES),
    "attention_bias": [True],
    "mlp_bias": [True],
    "attention_dropout": [0.5],
    "resid_pdrop": [0.5],
    "embd_pdrop": [0.5],
    "pretraining_tp": [2],
    "tie_word_embeddings": [True, False],
    "use_sliding_window": [True],
    "sliding_window": [7, 1000],
    "max_window_layers": [0],
    "layer_types": [["sliding_attention", "full_attention"]],
    "num_experts": [8],
    "num_experts_per_tok": [1, 3],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]],
    "router_aux_loss_coef": [0.5],
    "depth": [1],
    "embed_dim": [32],
    "mlp_ratio": [3],
    "num_heads": [1, 2],
    "window_size": [32],
    "fullatt_block_indexes": [[], [0, 2]],
    "tokens_per_second": [4],
    "spatial_merge_size": [1],
    "temporal_patch_size": [1],
    "in_channels": [1],
    "num_channels": [1],
    "out_hidden_size": [40],
    "num_position_embeddings": [64],
    "deepstack_visual_indexes": [[0], []],
    "projection_dim": [24],
    "vision_use_head": [True, False],
    "image_token_index": [189],
    "video_token_index": [188],
    "image_seq_length": [7],
    "projector_hidden_act": ["relu", "silu"],
    "vision_feature_select_strategy": ["full", "default"],
    "vision_feature_layer": [-1, [0, -2]],
    "multimodal_projector_bias": [False],
    "image_grid_pinpoints": [[[14, 28]]],
    "vision_aspect_ratio": ["anyres_max_1"],
    "use_image_newline_parameter": [False],
}
ORDER = ("honoured", "refused", "bounds the sequences of a run", "no effect in transformers", "fails in transformers")
# decide names or training only, and no logit of these samples
SKIPPED = {
    *("architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id", "model_type"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version", "use_cache"),
    *("initializer_range", "initializer_factor", "output_router_logits", "_name_or_path", "num_local_experts"),
    *("vocab_size", "patch_size", "image_size"),  # the samples are made for one
}


def changes(model: str) -> Iterator[tuple[str, Any]]:
    """Every field of ``model`` with another value; parts' fields as text_config.name."""
    described = _config(model).to_dict()
    parts = {"": described} | {f"{part}.": described.get(part, {}) for part in ("text_config", "vision_config")}
    for prefix, fields in parts.items():
        more = {"attention_bias", "mlp_bias"} if "hidden_act" in fields and prefix != "vision_config." else set()
        more |= {"sliding_window"} if more else set()
        for name in sorted({*fields, *more} - SKIPPED):
            if isinstance(fields.get(name), dict) and name != "rope_parameters":
                continue
            for value in VALUES.get(name, []):
                if value != fields.get(name):
                    yield f"{prefix}{name}", value


def unlisted(model: str) -> list[str]:
    """Fields of ``model`` that nobody changes and nobody skips."""
    described = _config(model).to_dict()
    sections = [described, *(described.get(part, {}) for part in ("text_config", "vision_config"))]
    names = {
        name
        for fields in sections
        for name, value in fields.items()
        if name == "rope_parameters" or not isinstance(value, dict)
    }
    return sorted(n for n in names - set(VALUES) - SKIPPED if not n.endswith("_token_id"))


def _config(model: str) -> transformers.PretrainedConfig:
    family, name = MODELS[model]
    case = FAMILIES[family]
    return case.draw(int(name.removeprefix("seed"))) if name.startswith("seed") else case.config(name)


def _rope(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    old = fields["rope_parameters"]
    new = copy.deepcopy(ROPES[kind]) | {k: v for k, v in old.items() if k.startswith("mrope")}
    if kind == "longrope":
        head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        new |= {"short_factor": [1.0 + 0.1 * n for n in range(head // 2)], "long_factor": [2.0] * (head // 2)}
    if "partial_rotary_factor" in old and "partial_rotary_factor" not in new:
        new["partial_rotary_factor"] = old["partial_rotary_factor"]
    return new


def changed(model: str, field: str, value: Any) -> transformers.PretrainedConfig:
    """The configuration of ``model`` with one other value, made anew from what a config.json would say."""
    config = _config(model)
    described = config.to_dict()
    *part, name = field.split(".")
    fields = described[part[0]] if part else described
    fields[name] = _rope(value, fields) if name == "rope_parameters" else value
    if name == "use_sliding_window":  # alone it has no window
        fields |= {"sliding_window": 7, "max_window_layers": 1}
    if name in ("num_hidden_layers", "use_sliding_window", "max_window_layers"):
        fields.pop("layer_types", None)  # derived, and left out of published files
    if name in ("hidden_size", "num_attention_heads") and _config_derives_head(model):
        fields.pop("head_dim", None)
    described["architectures"] = config.architectures
    return type(config).from_dict(described)


def _config_derives_head(model: str) -> bool:
    return model in ("llama", "qwen2", "phi3", "qwen2_vl", "qwen2_5_vl")


def _reference(model: str, config: transformers.PretrainedConfig) -> tuple[Any, Reference, list[Tensor]]:
    """A random model of ``config``, its samples, and what transformers says of them."""
    torch.manual_seed(0)
    case = FAMILIES[MODELS[model][0]]
    built = getattr(transformers, config.architectures[0])(config).float().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        samples = case.samples(built, seed=0)
        reference = Reference("", samples, [torch.ones(len(trained(s))) for s in samples])
        logits, _ = evaluate(case, built, reference)
    return built, reference, logits


@torch.no_grad()
def _ours(directory: str, reference: Reference) -> list[Tensor]:
    hf = read_config(directory)
    built = build_stage(hf, ModelConfig(), ParallelConfig()).eval()
    load_hf(built, family_of(hf).mappings(hf), directory)
    logits = []
    for number in range(len(reference.samples)):
        hidden = built(*pack(reference, [number]).forward)
        logits.append((hidden @ built.output_weight().T)[:, : built.vocab_size])
    return logits


def _relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    if [a.shape for a in ours] != [b.shape for b in theirs]:  # samples of other lengths
        return float("inf")
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    return difference if difference == difference else float("inf")


def verdict(model: str, field: str, value: Any) -> str:
    """One of ``ORDER``, or WRONG: what ``model`` with ``field=value`` comes to.

    Called within ``single_process``.
    """
    try:
        config = changed(model, field, value)
        built, reference, theirs = _reference(model, config)
    except Exception:  # whatever transformers' classes raise of a value that they cannot have
        return "fails in transformers"
    with tempfile.TemporaryDirectory() as directory:
        built.save_pretrained(directory)
        try:
            hf = read_config(directory)
            family_of(hf).validate(hf, ParallelConfig())
        except ValueError:
            return "refused"
        longest = max(len(s.tokens) for s in reference.samples)
        if longest > longest_sequence(hf.get_text_config())[0]:
            return "bounds the sequences of a run"
        difference = _relative(_ours(directory, reference), theirs)
    if difference > 1e-5:
        return f"WRONG ({difference:.0e})"
    before, _, plain = _reference(model, _config(model))
    shapes = {name: tensor.shape for name, tensor in before.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in built.state_dict().items()}:
        return "honoured"
    return "no effect in transformers" if _relative(theirs, plain) < 1e-7 else "honoured"


def verdicts(model: str) -> dict[str, list[tuple[str, str]]]:
    """Of each field of ``model`` its values, as text, and what they come to."""
    found: dict[str, list[tuple[str, str]]] = {}
    with single_process():
        for field, value in changes(model):
            found.setdefault(field, []).append((str(value), verdict(model, field, value)))
    return found


def section(model: str) -> str:
    """A table of what the fields of ``model`` come to; those that come to several things by value."""
    found = verdicts(model)
    cells: dict[str, list[str]] = {}
    for field, results in found.items():
        kinds = {kind for _, kind in results}
        for kind in sorted(kinds):
            values = [value for value, its in results if its == kind]
            of_values = f" ({', '.join(values)})" if len(kinds) > 1 else ""
            cells.setdefault(kind, []).append(f"`{field}`{of_values}")
    order = [*ORDER, *sorted(set(cells) - set(ORDER))]
    rows = [f"| {kind} | {', '.join(cells[kind])} |" for kind in order if kind in cells]
    return "\n".join([f"### {model}", "", "| | fields |", "|---|---|", *rows])
