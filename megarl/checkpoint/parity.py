"""Evidence that a converted model is the model: every key, every bit of the round trip, logits against transformers."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from transformers import PretrainedConfig

from megarl.checkpoint.export import export_to_rank_zero
from megarl.checkpoint.huggingface import TIED_OUTPUT, HFReader
from megarl.models.common.vision import VisionInputs
from megarl.models.mapping import Mapping
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import AutoModelForImageTextToText  # noqa: E402

PARITY_FILE = "parity.json"
MAX_LOGITS_PARAMETERS = 500_000_000  # of a model that is run twice for the comparison of logits


def sha256(tensor: Tensor) -> str:
    """Of the bytes of ``tensor``."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def compare_tensors(model: MegatronModule, mappings: list[Mapping], reader: HFReader) -> dict[str, Any]:
    """Every tensor of ``model`` against the files of ``reader``; one process holds the model.

    ``bit_exact``: the same keys, the same values, and in the files' dtype the same bits.
    """
    tensors: dict[str, Any] = {}
    for name, tensor in export_to_rank_zero(model, mappings):
        if name not in reader:
            continue
        stored = reader[name]
        tensor = tensor.to("cpu")
        ours = tensor.to(stored.dtype)
        tensors[name] = {
            "shape": list(stored.shape),
            "dtype": str(stored.dtype).removeprefix("torch."),
            "max_abs_diff": float((tensor.double() - stored.double()).abs().max()) if stored.numel() else 0.0,
            "sha256": sha256(stored),
            "sha256_round_trip": sha256(ours),
        }
    expected = {name for mapping in mappings for name in mapping.hf} - {n for m in mappings for n in m.optional}
    embedding = next((mapping.hf[0] for mapping in mappings if "word_embeddings" in mapping.megatron), None)
    duplicates = {}
    if TIED_OUTPUT in reader and TIED_OUTPUT not in tensors and embedding in reader:
        duplicates[TIED_OUTPUT] = {"of": embedding, "equal": torch.equal(reader[TIED_OUTPUT], reader[embedding])}
    unaccounted = sorted(set(reader.keys()) - set(tensors) - set(duplicates))
    missing = sorted(expected - set(tensors))
    same = all(
        entry["sha256"] == entry["sha256_round_trip"] and not entry["max_abs_diff"] for entry in tensors.values()
    )
    return {
        "bit_exact": same and not unaccounted and not missing and all(d["equal"] for d in duplicates.values()),
        "max_abs_diff": max((entry["max_abs_diff"] for entry in tensors.values()), default=0.0),
        "keys": {
            "huggingface": len(reader.keys()),
            "compared": len(tensors),
            "tied_duplicates": duplicates,
            "unaccounted": unaccounted,
            "missing": missing,
        },
        "tensors": dict(sorted(tensors.items())),
    }


@dataclass
class Probe:
    """One prompt with one image, the same for every model of a vocabulary."""

    tokens: Tensor  # [L]
    pixel_values: Tensor  # [P, E]
    grids: Tensor  # [1, 3]


def qwen_vl_probe(hf: PretrainedConfig) -> Probe:
    """Words, an image of 4 x 6 patches of noise, words."""
    generator = torch.Generator().manual_seed(0)
    special = [hf.image_token_id, hf.video_token_id, hf.vision_start_token_id, hf.vision_end_token_id]
    words = torch.randint(3, min([*special, hf.text_config.vocab_size]), (24,), generator=generator)
    vision = hf.vision_config
    merge = vision.spatial_merge_size
    grids = torch.tensor([[1, 2 * merge, 3 * merge]])
    pads = torch.full((6,), hf.image_token_id)
    start, end = torch.tensor([hf.vision_start_token_id]), torch.tensor([hf.vision_end_token_id])
    tokens = torch.cat([words[:8], start, pads, end, words[8:]])
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return Probe(tokens, torch.randn(int(grids.prod()), size, generator=generator), grids)


@torch.no_grad()
def compare_logits(model: MegatronModule, hf: PretrainedConfig, hf_dir: str | Path) -> dict[str, Any]:
    """Logits of ``model`` (float32, whole) on the probe against transformers' on the files of ``hf_dir``."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MAX_LOGITS_PARAMETERS:
        return {"skipped": f"{parameters} parameters are more than {MAX_LOGITS_PARAMETERS}"}
    probe = qwen_vl_probe(hf)
    reference = AutoModelForImageTextToText.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="sdpa")
    types = (probe.tokens == hf.image_token_id).int()[None]
    position_ids, _ = reference.model.get_rope_index(probe.tokens[None], types, probe.grids)
    theirs = reference.eval()(
        input_ids=probe.tokens[None],
        position_ids=position_ids,
        mm_token_type_ids=types,
        pixel_values=probe.pixel_values,
        image_grid_thw=probe.grids,
    ).logits[0]
    cu_seqlens = torch.tensor([0, len(probe.tokens)], dtype=torch.int32)
    vision = VisionInputs(probe.pixel_values, probe.grids, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    hidden = model.eval()(probe.tokens[None], position_ids, cu_seqlens, vision)
    ours = (hidden @ model.output_weight().T)[:, : model.vocab_size]
    return {
        "max_abs_diff": float((ours - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "prompt_tokens": len(probe.tokens),
        "image_patches": len(probe.pixel_values),
    }


def write_parity(directory: str | Path, report: dict[str, Any]) -> Path:
    """Write ``parity.json`` with the versions that made it."""
    packages = ("megatron-core", "torch", "transformers", "safetensors", "numpy")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    path = Path(directory) / PARITY_FILE
    path.write_text(json.dumps({"versions": versions} | report, indent=2) + "\n")
    return path
