"""Evidence that a converted model is the model: every key, every bit of the round trip, logits against transformers."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from transformers import PretrainedConfig

from megarl.checkpoint.huggingface import DERIVED, TIED_OUTPUT, HFReader
from megarl.models.common.vision import VisionInputs
from megarl.models.mapping import Mapping
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import AutoModelForImageTextToText  # noqa: E402

PARITY_FILE = "parity.json"
MAX_LOGITS_PARAMETERS = 500_000_000  # of a model that is run whole, here and in transformers, to compare logits

_PIECE = 1 << 20  # elements


def sha256(tensor: Tensor) -> str:
    """Of the bytes of ``tensor``."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _sha256_of_all(hashes: dict[str, str]) -> str:
    """Of the names and hashes of all tensors."""
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _max_abs_diff(a: Tensor, b: Tensor) -> float:
    """In float64, a piece at a time."""
    pieces = zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True)
    return max((float((x.double() - y.double()).abs().max()) for x, y in pieces if len(x)), default=0.0)


def compare_tensors(tensors: Iterable[tuple[str, Tensor]], mappings: list[Mapping], reader: HFReader) -> dict[str, Any]:
    """Every one of ``tensors`` (canonically named, on the CPU) against the files of ``reader``, one in memory.

    ``bit_exact``: the same keys, the same values, and in the files' dtype the same bits.
    """
    compared: dict[str, Any] = {}
    for name, tensor in tensors:
        if name not in reader:
            continue
        stored = reader[name]
        compared[name] = {
            "shape": list(stored.shape),
            "dtype": str(stored.dtype).removeprefix("torch."),
            "max_abs_diff": _max_abs_diff(tensor, stored),
            "sha256": sha256(stored),
            "sha256_round_trip": sha256(tensor.to(stored.dtype)),
        }
    expected = {name for mapping in mappings for name in mapping.hf} - {n for m in mappings for n in m.optional}
    embedding = next((mapping.hf[0] for mapping in mappings if "word_embeddings" in mapping.megatron), None)
    duplicates = {}
    if TIED_OUTPUT in reader and TIED_OUTPUT not in compared and embedding in reader:
        duplicates[TIED_OUTPUT] = {"of": embedding, "equal": torch.equal(reader[TIED_OUTPUT], reader[embedding])}
    derived = sorted(name for name in reader.keys() if DERIVED.fullmatch(name))  # noqa: SIM118
    unaccounted = sorted(set(reader.keys()) - set(compared) - set(duplicates) - set(derived))
    missing = sorted(expected - set(compared))
    hashes = {
        key: _sha256_of_all({name: entry[key] for name, entry in compared.items()})
        for key in ("sha256", "sha256_round_trip")
    }
    # equal bits are not enough: what the files' dtype rounds away must not be there
    same = hashes["sha256"] == hashes["sha256_round_trip"] and not any(e["max_abs_diff"] for e in compared.values())
    return {
        "bit_exact": same and not unaccounted and not missing and all(d["equal"] for d in duplicates.values()),
        "max_abs_diff": max((entry["max_abs_diff"] for entry in compared.values()), default=0.0),
        **hashes,
        "keys": {
            "huggingface": len(reader.keys()),
            "compared": len(compared),
            "tied_duplicates": duplicates,
            "derived": derived,
            "unaccounted": unaccounted,
            "missing": missing,
        },
        "tensors": dict(sorted(compared.items())),
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
def compare_logits(build: Callable[[], MegatronModule], hf: PretrainedConfig, hf_dir: str | Path) -> dict[str, Any]:
    """Logits of the model that ``build`` makes (float32, whole) on the probe against transformers' on ``hf_dir``.

    The two are in memory one after the other.
    """
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
    del reference
    model = build()
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
