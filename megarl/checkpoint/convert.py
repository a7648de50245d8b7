"""Hugging Face directory to Megatron checkpoint and back, each with a certificate (``parity.json``).

One process holds one parameter at a time, however large the model; only the comparison of logits needs the whole. The
Megatron format knows no layout: the one that is asked for is checked against the model and recorded, any other loads.
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

from megarl.checkpoint import megatron
from megarl.checkpoint.huggingface import CheckpointError, HFReader, check_load, read_config, write_hf
from megarl.checkpoint.manifest import read_manifest
from megarl.checkpoint.parity import MAX_LOGITS_PARAMETERS, compare_logits, compare_tensors, write_parity
from megarl.checkpoint.progress import counted, progress
from megarl.checkpoint.staging import require_empty, staged
from megarl.checkpoint.streaming import CheckpointReader, parameter_source
from megarl.config import ModelConfig, ParallelConfig, RunConfig, apply_overrides, load_experiment
from megarl.models.family import family_of
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
    with torch.device(device):
        model = family.build(hf, config, ParallelConfig(), pre_process=True, post_process=True)
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
        check_load(reader, mappings, model, tied=hf.tie_word_embeddings, tp_size=1)
        with staged(out_dir, _num_bytes(model)) as directory:
            with progress(_num_bytes(model), f"writing {out_dir}") as bar:
                tensors = parameter_source(model, mappings, reader, bar.update)
                extra = {"step": 0}
                megatron.save_to(
                    directory, 0, model, None, None, extra, config, hf_dir=hf_dir, tensor_source=tensors
                ).wait()
            written = CheckpointReader(directory, model)
            report = {
                "direction": "huggingface to megatron to huggingface",
                "parallel": read_manifest(directory).parallel,
                "dtype": config.model.dtype,
                "logits": _logits(written, hf_dir, config.model, hf_dir, asked=logits),
            }
            report |= compare_tensors(written.tensors(mappings), mappings, reader)
            write_parity(directory, report)
    return report


def megatron_to_hf(
    checkpoint: str | Path, out_dir: str | Path, *, dtype: str | None = None, logits: bool = True
) -> dict[str, Any]:
    """Write the Hugging Face directory ``out_dir`` from a complete checkpoint, with ``parity.json``; what that says.

    ``dtype`` of the files, one of ``FILE_DTYPES``; None keeps the parameters'. ``CheckpointError`` for directories that
    cannot be used; then nothing is written.
    """
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    require_empty(out_dir)
    manifest = read_manifest(checkpoint)
    config = load_experiment(checkpoint / "config.yaml")
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
                "step": manifest.step,
                "dtype": name,
                "logits": _logits(stored, checkpoint / "hf", config.model, directory, asked=logits),
            }
            report |= compare_tensors(stored.tensors(mappings), mappings, HFReader(directory))
            write_parity(directory, report)
    return report


def _logits(
    parameters: CheckpointReader, description: Path, config: ModelConfig, hf_dir: Path, *, asked: bool
) -> dict[str, Any]:
    """Logits of ``parameters`` in float32 against transformers' on ``hf_dir``, or why they are not compared."""
    if not asked:
        return {"skipped": "not asked for"}
    meta, _ = whole_model(description, config, "meta")
    number = sum(parameter.numel() for parameter in meta.parameters())
    if number > MAX_LOGITS_PARAMETERS:
        return {"skipped": f"{number} parameters are more than {MAX_LOGITS_PARAMETERS}"}

    def model() -> MegatronModule:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        whole, _ = whole_model(description, replace(config, dtype="float32"), device)
        parameters.fill(whole)
        return whole

    return compare_logits(model, hf_dir)
