"""Evidence that a converted model is the model: every key, every bit of the round trip, logits against transformers."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.checkpoint.huggingface import DERIVED, HFReader, embedding_of, listed, read_config
from megarl.families import family_of
from megarl.models.mapping import Mapping
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402

PARITY_FILE = "parity.json"
LOGITS_TOLERANCE = 1e-3  # of the largest, in float32
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
    expected = {name for mapping in mappings for name in mapping.hf}
    duplicates, output, embedding = {}, family_of(read_config(reader.directory)).output_matrix, embedding_of(mappings)
    if output in reader and output not in compared and embedding in reader:
        duplicates[output] = {"of": embedding, "equal": torch.equal(reader[output], reader[embedding])}
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


@torch.no_grad()
def compare_logits(build: Callable[[], MegatronModule], hf_dir: str | Path) -> dict[str, Any]:
    """Logits of the model that ``build`` makes (float32, whole) on its family's probe, against transformers' on
    ``hf_dir``; the two are in memory one after the other."""
    hf = read_config(hf_dir)
    probe = family_of(hf).probe(hf)
    architecture = getattr(transformers, hf.architectures[0])
    reference = architecture.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    position_ids = probe.position_ids(reference)
    # the model's own way to place tokens, which is the one to compare with, sees no position ids
    theirs = reference(input_ids=probe.tokens[None], **probe.inputs).logits[0]
    del reference
    model = build().eval()
    device = model.output_weight().device
    cu_seqlens = torch.tensor([0, len(probe.tokens)], dtype=torch.int32)
    inputs = (probe.tokens[None], position_ids[:, None], cu_seqlens)
    hidden = model(*(tensor.to(device) for tensor in inputs), None if probe.vision is None else probe.vision.to(device))
    ours = (hidden @ model.output_weight().T)[:, : model.vocab_size].cpu()
    return {
        "max_abs_diff": float((ours - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "prompt_tokens": len(probe.tokens),
        "image_patches": 0 if probe.vision is None else len(probe.vision.pixel_values),
        "images": 0 if probe.vision is None else int((~probe.vision.videos).sum()),
        "videos": 0 if probe.vision is None else int(probe.vision.videos.sum()),
    }


def problems_of(report: dict[str, Any]) -> list[str]:
    """What speaks against the files that ``report`` compares; nothing where they are the model.

    Where they were to hold ``rounded`` values, the bits of the rounded ones are judged, and logits are not.
    """
    keys, logits, problems = report["keys"], report["logits"], []
    for name in ("missing", "unaccounted"):
        if keys[name]:
            problems.append(f"{name} tensors: {listed(keys[name])}")
    differing = [name for name, found in keys["tied_duplicates"].items() if not found["equal"]]
    if differing:
        problems.append(f"not the embedding that config.json ties them to: {listed(differing)}")
    exact = report["rounded"] or not report["max_abs_diff"]
    if report["sha256"] != report["sha256_round_trip"] or not exact:
        worst = max(report["tensors"].items(), key=lambda item: item[1]["max_abs_diff"])[0]
        problems.append(f"values differ by up to {report['max_abs_diff']:.3g}, most in {worst}")
    elif (
        not report["rounded"]
        and "skipped" not in logits
        and not logits["max_abs_diff"] <= LOGITS_TOLERANCE * logits["largest_logit"]
    ):
        problems.append(
            f"logits differ from transformers' by {logits['max_abs_diff']:.3g}, more than {LOGITS_TOLERANCE:g} of the "
            f"largest, {logits['largest_logit']:.3g}"
        )
    return problems


def write_parity(directory: str | Path, report: dict[str, Any]) -> Path:
    """Write ``parity.json`` with its verdict and the versions that made it."""
    report["problems"] = problems_of(report)
    report["verdict"] = "different" if report["problems"] else "equal"
    packages = ("megatron-core", "torch", "transformers", "safetensors", "numpy")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    path = Path(directory) / PARITY_FILE
    path.write_text(json.dumps({"versions": versions} | report, indent=2) + "\n")
    return path
