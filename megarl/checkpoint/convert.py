"""Hugging Face directory to Megatron checkpoint and back, each with a certificate (``parity.json``).

One process holds one parameter at a time, however large the model; only the comparison of logits needs the whole. The
Megatron format knows no layout: the one that is asked for is checked against the model and recorded, any other loads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.checkpoint import megatron
from megarl.checkpoint.adapters import described, load_peft, merged_tensors, read_peft, write_peft
from megarl.checkpoint.belonging import frozen_digests, other_weights
from megarl.checkpoint.huggingface import (
    CheckpointError,
    HFReader,
    check_load,
    duplicate_of,
    load_hf,
    read_config,
    write_hf,
)
from megarl.checkpoint.manifest import Manifest, read_manifest
from megarl.checkpoint.parity import MAX_LOGITS_PARAMETERS, compare_logits, compare_tensors, write_parity
from megarl.checkpoint.progress import counted, progress
from megarl.checkpoint.staging import require_empty, staged
from megarl.checkpoint.streaming import CheckpointReader, parameter_source
from megarl.config import ModelConfig, ParallelConfig, RunConfig
from megarl.experiment import apply_overrides, load_experiment
from megarl.families import family_of
from megarl.models.common.lora import attach
from megarl.models.mapping import Mapping
from megarl.parallel import groups

EXACT = (torch.float32, torch.float16, torch.bfloat16)  # what float32 parameters hold without loss
FILE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def whole_model(hf_dir: Path, config: ModelConfig, device: str) -> tuple[MegatronModule, list[Mapping]]:
    """The whole model; its parameters have no values yet, and on the device ``meta`` no memory."""
    hf = read_config(hf_dir)
    family = family_of(hf)
    # the layers of another implementation have the same parameters and may need a GPU
    config = replace(config, transformer_impl="local", megatron=config.megatron | {"perform_initialization": False})
    family.validate(hf, ParallelConfig())
    with torch.device(device):
        model = family.build(hf, config, ParallelConfig())
    return model, family.mappings(hf)


def _num_bytes(model: MegatronModule, dtype: torch.dtype | None = None) -> int:
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())


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


def hf_to_megatron(
    hf_dir: str | Path, out_dir: str | Path, overrides: list[str] | None = None, *, logits: bool = True
) -> dict[str, Any]:
    """Write the Megatron checkpoint ``out_dir`` (model only, step 0) and its ``parity.json``; what that says.

    ``overrides``: ``parallel.*`` for the layout to record, ``model.dtype`` (default: what holds the files exactly).
    ``logits``: compare them with transformers', which holds the whole model in memory. ``CheckpointError`` for
    directories and keys, ``ValueError`` for a layout that cannot divide the model; then nothing is written.
    """
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    require_empty(out_dir)
    hf, reader = read_config(hf_dir), HFReader(hf_dir)
    family = family_of(hf)
    config = _conversion_config(hf_dir.resolve(), _exact_dtype(reader), overrides or [])
    family.validate(hf, config.parallel)
    with single_process():
        model, mappings = whole_model(hf_dir, config.model, "meta")
        check_load(reader, mappings, model, duplicate=duplicate_of(hf))
        with staged(out_dir, _num_bytes(model)) as directory:
            with progress(_num_bytes(model), f"writing {out_dir}") as bar:
                tensors = parameter_source(model, mappings, reader, bar.update)
                extra = {"step": 0}
                megatron.save(
                    directory, 0, model, None, None, extra, config, hf_dir=hf_dir, tensor_source=tensors
                ).wait()
            written = CheckpointReader(directory, model)
            report = {
                "direction": "huggingface to megatron to huggingface",
                "rounded": False,
                "parallel": read_manifest(directory).parallel,
                "dtype": config.model.params_dtype,
                "logits": _logits(written, hf_dir, config.model, hf_dir, asked=logits),
            }
            report |= compare_tensors(written.tensors(mappings), mappings, reader)
            write_parity(directory, report)
    return report


def megatron_to_hf(
    checkpoint: str | Path, out_dir: str | Path, *, dtype: str | None = None, logits: bool = True
) -> dict[str, Any]:
    """Write the Hugging Face directory ``out_dir`` from a complete checkpoint, with ``parity.json``; what that says.

    A checkpoint of adapters is merged into the model that it was trained on. ``dtype`` of the files, one of
    ``FILE_DTYPES``; None keeps the parameters'. ``CheckpointError`` for directories that cannot be used; then nothing
    is written.
    """
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    require_empty(out_dir)
    manifest = read_manifest(checkpoint)
    config = load_experiment(checkpoint / "config.yaml")
    if "adapters" in manifest.contents:
        _check_frozen(checkpoint, manifest, config.model.path)
        with tempfile.TemporaryDirectory() as directory:
            megatron_to_peft(checkpoint, directory)
            report = merge_adapters(config.model.path, directory, out_dir, dtype=dtype, logits=logits)
        return report | {"step": manifest.step}
    name = dtype or manifest.dtype
    with single_process():
        megatron.intact(checkpoint)
        model, mappings = whole_model(checkpoint / "hf", replace(config.model, dtype=manifest.dtype), "meta")
        megatron.check_tensors(checkpoint, model)
        stored = CheckpointReader(checkpoint, model)
        with staged(out_dir, _num_bytes(model, FILE_DTYPES[name])) as directory:
            tensors = counted(stored.tensors(mappings), _num_bytes(model), f"writing {out_dir}")
            write_hf(directory, tensors, checkpoint / "hf", dtype=FILE_DTYPES[name])
            report = {
                "direction": "megatron to huggingface",
                "rounded": name != manifest.dtype,
                "step": manifest.step,
                "dtype": name,
                "logits": _logits(stored, checkpoint / "hf", config.model, directory, asked=logits),
            }
            report |= compare_tensors(stored.tensors(mappings), mappings, HFReader(directory))
            write_parity(directory, report)
    return report


def _check_frozen(checkpoint: Path, manifest: Manifest, hf_dir: str) -> None:
    """Raise unless ``hf_dir`` has the weights that the checkpoint's adapters learned beside."""
    hf, reader = read_config(hf_dir), HFReader(hf_dir)
    names = [name for mapping in family_of(hf).mappings(hf) for name in mapping.hf if name in reader]
    dtype = FILE_DTYPES[manifest.dtype]
    ours = frozen_digests(((name, reader[name].to(dtype)) for name in names), dtype)
    if problems := other_weights(manifest.adapters.get("frozen", {}), ours):
        raise CheckpointError(f"{checkpoint} holds adapters of another model than model.path={hf_dir}: {problems[0]}")


def megatron_to_peft(checkpoint: str | Path, out_dir: str | Path) -> int:
    """Write the PEFT directory ``out_dir`` from a complete checkpoint of adapters; the number of tensors."""
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    require_empty(out_dir)
    manifest = read_manifest(checkpoint)
    if "adapters" not in manifest.contents:
        raise CheckpointError(f"{checkpoint} holds {', '.join(manifest.contents)} and no adapters")
    config = load_experiment(checkpoint / "config.yaml")
    with single_process():
        megatron.intact(checkpoint)
        model, mappings = whole_model(checkpoint / "hf", replace(config.model, dtype=manifest.dtype), "meta")
        adapters = attach(model, mappings, config.model.lora, model.parts, seed=0)
        megatron.check_tensors(checkpoint, model)
        tensors = list(CheckpointReader(checkpoint, model).tensors(adapters))
    with staged(out_dir, sum(tensor.nbytes for _, tensor in tensors)) as directory:
        write_peft(directory, tensors, config.model.lora, checkpoint / "hf", base=config.model.path)
    return len(tensors)


def merge_adapters(
    hf_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    logits: bool = True,
) -> dict[str, Any]:
    """Write ``hf_dir`` with the adapters of a PEFT directory added, and ``parity.json``; what that says.

    ``logits``: of our model with the adapters beside its matrices, against transformers' on what was written. ``dtype``
    as in ``megatron_to_hf``; None keeps each tensor's.
    """
    hf_dir, adapter_dir, out_dir = Path(hf_dir), Path(adapter_dir), Path(out_dir)
    reader, (config, tensors) = HFReader(hf_dir), read_peft(adapter_dir, hf_dir)
    target = None if dtype is None else FILE_DTYPES[dtype]
    model_config = ModelConfig(path=str(hf_dir), dtype="float32")
    with single_process():
        meta, mappings = whole_model(hf_dir, model_config, "meta")
        merged = partial(merged_tensors, reader, mappings, adapter_dir, config, tensors)
        with staged(out_dir, reader.num_bytes()) as directory:
            write_hf(directory, counted(merged(), reader.num_bytes(), f"writing {out_dir}"), hf_dir, dtype=target)
            report = {
                "direction": "adapters into huggingface",
                "rounded": ({target} if target else reader.dtypes()) != {torch.float32},
                "dtype": dtype or ", ".join(sorted(str(d).removeprefix("torch.") for d in reader.dtypes())),
                "adapted_modules": len(tensors) // 2,
                "logits": _skipped(meta, asked=logits),
            }
            if not report["logits"]:
                build = partial(_adapted_model, hf_dir, model_config, adapter_dir, config, tensors)
                report["logits"] = compare_logits(build, directory)
            report |= compare_tensors(merged(), mappings, HFReader(directory))
            write_parity(directory, report)
    return report


def _adapted_model(
    hf_dir: Path, model_config: ModelConfig, adapter_dir: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> MegatronModule:
    """The whole model with its adapters, in float32."""
    model, mappings = whole_model(hf_dir, model_config, "cuda" if torch.cuda.is_available() else "cpu")
    load_hf(model, mappings, hf_dir)
    lora = described(config, tensors, model.parts)
    load_peft(model, attach(model, mappings, lora, model.parts, seed=0), adapter_dir, lora, hf_dir)
    return model


def _skipped(meta: MegatronModule, *, asked: bool) -> dict[str, Any]:
    """Why logits are not compared; empty when they are."""
    if not asked:
        return {"skipped": "not asked for"}
    number = sum(parameter.numel() for parameter in meta.parameters())
    if number > MAX_LOGITS_PARAMETERS:
        return {"skipped": f"{number} parameters are more than {MAX_LOGITS_PARAMETERS}"}
    return {}


def _logits(
    parameters: CheckpointReader, description: Path, config: ModelConfig, hf_dir: Path, *, asked: bool
) -> dict[str, Any]:
    """Logits of ``parameters`` in float32 against transformers' on ``hf_dir``, or why they are not compared."""
    meta, _ = whole_model(description, config, "meta")
    if skipped := _skipped(meta, asked=asked):
        return skipped

    def model() -> MegatronModule:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        whole, _ = whole_model(description, replace(config, dtype="float32"), device)
        parameters.fill(whole)
        return whole

    return compare_logits(model, hf_dir)
