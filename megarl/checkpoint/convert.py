"""Hugging Face directory to Megatron checkpoint and back, each with a certificate (``parity.json``).

One process holds the whole model on the CPU. The Megatron format knows no layout: the one that is asked for is checked
against the model and recorded, and any other loads too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megarl.checkpoint import megatron
from megarl.checkpoint.export import export_to_rank_zero
from megarl.checkpoint.huggingface import CheckpointError, HFReader, check_keys, load_hf, read_config, write_hf
from megarl.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megarl.checkpoint.parity import MAX_LOGITS_PARAMETERS, compare_logits, compare_tensors, write_parity
from megarl.config import ModelConfig, ParallelConfig, RunConfig, apply_overrides, load_experiment
from megarl.models.family import family_of
from megarl.models.mapping import Mapping
from megarl.parallel import groups

EXACT = (torch.float32, torch.float16, torch.bfloat16)  # what float32 parameters hold without loss


@contextmanager
def single_process() -> Iterator[None]:
    """A world of one rank for the time of the block; no port is opened."""
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        try:
            groups.initialize(ParallelConfig(), seed=0)
            yield
        finally:
            groups.destroy()
            dist.destroy_process_group()


def _build(hf_dir: Path, config: ModelConfig) -> tuple[MegatronModule, list[Mapping]]:
    hf = read_config(hf_dir)
    family = family_of(hf)
    # the layers of another implementation have the same parameters and may need a GPU
    config = replace(config, transformer_impl="local")
    return family.build(hf, config, ParallelConfig(), pre_process=True, post_process=True), family.mappings(hf)


def _empty(directory: str | Path) -> Path:
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not an empty directory")
    return directory


def _exact_dtype(reader: HFReader) -> str:
    """The dtype of parameters that holds every stored tensor without loss."""
    dtypes = reader.dtypes()
    if not dtypes <= set(EXACT):
        raise CheckpointError(f"{reader.directory}: float64 tensors cannot be held without loss")
    return "bfloat16" if dtypes == {torch.bfloat16} else "float32"


def _conversion_config(hf_dir: Path, dtype: str, overrides: list[str]) -> RunConfig:
    for override in overrides:
        if not override.startswith(("parallel.", "model.")):
            raise ValueError(f"{override!r}: a conversion takes parallel.* and model.* keys only")
    return apply_overrides(RunConfig(model=ModelConfig(path=str(hf_dir), dtype=dtype)), overrides)


def hf_to_megatron(hf_dir: str | Path, out_dir: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Write the Megatron checkpoint ``out_dir`` (model only, step 0) and its ``parity.json``; what that says.

    ``overrides``: ``parallel.*`` for the layout to record, ``model.dtype`` (default: what holds the files exactly).
    ``CheckpointError`` for directories and keys, ``ValueError`` for a layout that cannot divide the model.
    """
    hf_dir, out_dir = Path(hf_dir), _empty(out_dir)
    hf, reader = read_config(hf_dir), HFReader(hf_dir)
    family = family_of(hf)
    problems = check_keys(reader, family.mappings(hf), tied=hf.tie_word_embeddings)
    if problems:
        raise CheckpointError(f"{hf_dir}: {'; '.join(problems)}")
    config = _conversion_config(hf_dir.resolve(), _exact_dtype(reader), overrides or [])
    family.validate(hf, config.parallel)
    with single_process():
        model, mappings = _build(hf_dir, config.model)
        load_hf(model, mappings, hf_dir)
        megatron.save_to(out_dir, 0, model, None, None, {"step": 0}, config, hf_dir=hf_dir).wait()
        report = _verify(model, mappings, out_dir, hf_dir, config)
    write_parity(out_dir, report)
    return report


def _verify(
    model: MegatronModule, mappings: list[Mapping], checkpoint: Path, hf_dir: Path, config: RunConfig
) -> dict[str, Any]:
    """Load ``checkpoint`` over zeros and compare with the Hugging Face files, in float32 when logits are compared."""
    if sum(parameter.numel() for parameter in model.parameters()) <= MAX_LOGITS_PARAMETERS:
        model, mappings = _build(hf_dir, replace(config.model, dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    megatron.load(checkpoint, model)
    comparison = compare_tensors(model, mappings, HFReader(hf_dir))
    return {
        "direction": "huggingface to megatron to huggingface",
        "parallel": read_manifest(checkpoint).parallel,
        "dtype": config.model.dtype,
        "logits": compare_logits(model, read_config(hf_dir), hf_dir),
    } | comparison


def megatron_to_hf(checkpoint: str | Path, out_dir: str | Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write the Hugging Face directory ``out_dir`` from a complete checkpoint, with ``parity.json``; what that says.

    ``dtype`` None keeps the parameters'. ``CheckpointError`` for directories that cannot be used.
    """
    checkpoint, out_dir = Path(checkpoint), _empty(out_dir)
    manifest = read_manifest(checkpoint)
    config = load_experiment(checkpoint / "config.yaml")
    target = torch.float32 if (dtype or manifest.dtype) == "float32" else torch.bfloat16
    with single_process():
        model, mappings = _build(checkpoint / "hf", replace(config.model, dtype=manifest.dtype))
        megatron.load(checkpoint, model)
        write_hf(out_dir, export_to_rank_zero(model, mappings), checkpoint / "hf", dtype=target)
        report = {
            "direction": "megatron to huggingface",
            "step": manifest.step,
            "dtype": str(target).removeprefix("torch."),
        } | compare_tensors(model, mappings, HFReader(out_dir))
        if sum(parameter.numel() for parameter in model.parameters()) <= MAX_LOGITS_PARAMETERS:
            model, _ = _build(checkpoint / "hf", replace(config.model, dtype="float32"))
            megatron.load(checkpoint, model)
        report["logits"] = compare_logits(model, read_config(out_dir), out_dir)
    write_parity(out_dir, report)
    return report


def describe(directory: str | Path) -> list[str]:
    """Lines that say what a Megatron checkpoint or a Hugging Face directory holds."""
    directory = Path(directory)
    if (directory / MANIFEST_FILE).is_file():
        return _describe_megatron(directory)
    hf, reader = read_config(directory), HFReader(directory)
    lines = [f"Hugging Face directory {directory}", f"architecture  {', '.join(hf.architectures or ['?'])}"]
    lines += [_row(name, reader.meta(name).shape, reader.meta(name).dtype) for name in sorted(reader.keys())]
    return [*lines, _total(reader.meta(name) for name in reader.keys())]  # noqa: SIM118


def _describe_megatron(directory: Path) -> list[str]:
    manifest = read_manifest(directory)
    lines = [
        f"Megatron checkpoint {directory}",
        f"architecture  {manifest.architecture}",
        f"step          {manifest.step}",
        f"contents      {', '.join(manifest.contents)}",
        f"layout        {', '.join(f'{key}={value}' for key, value in manifest.parallel.items())}",
        f"ranks         {manifest.world_size}",
        f"dtype         {manifest.dtype}",
        f"versions      {', '.join(f'{key} {value}' for key, value in manifest.versions.items())}",
        f"files         {len(manifest.files)}, {sum(manifest.files.values())} bytes",
    ]
    entries = megatron.read_index(directory).state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if not isinstance(entry, BytesStorageMetadata)}
    lines += [_row(key, entry.size, entry.properties.dtype) for key, entry in sorted(tensors.items())]
    return [*lines, _total(torch.empty(e.size, dtype=e.properties.dtype, device="meta") for e in tensors.values())]


def _row(name: str, shape: torch.Size, dtype: torch.dtype) -> str:
    return f"  {name}  {'x'.join(map(str, shape))}  {str(dtype).removeprefix('torch.')}"


def _total(tensors: Iterator[torch.Tensor]) -> str:
    tensors = list(tensors)
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors)} elements, {sum(t.nbytes for t in tensors)} bytes"
