"""What a Megatron checkpoint or a Hugging Face directory holds, in lines to read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import PretrainedConfig

from megarl.checkpoint import megatron
from megarl.checkpoint.companions import OPTIMIZER_PREFIX, is_weight
from megarl.checkpoint.huggingface import HFReader, check_keys, duplicate_of, read_config
from megarl.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megarl.checkpoint.parity import PARITY_FILE
from megarl.config import ParallelConfig
from megarl.families import FAMILIES
from megarl.models.common.language import longest_sequence

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True)
class Row:
    """A tensor, or those of a stack of layers that differ in a number of their name only."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    copies: int = 1

    @property
    def num_elements(self) -> int:
        return self.copies * math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def describe(directory: str | Path) -> list[str]:
    """Lines that say what a Megatron checkpoint or a Hugging Face directory holds; ``CheckpointError`` for others."""
    directory = Path(directory)
    facts, rows = _megatron(directory) if (directory / MANIFEST_FILE).is_file() else _hugging_face(directory)
    if (directory / PARITY_FILE).is_file():
        facts["certificate"] = _certificate(json.loads((directory / PARITY_FILE).read_text()))
    dtypes = sorted({_dtype(row) for row in rows})
    sizes = f"{number(sum(r.num_elements for r in rows))} elements, {number(sum(r.num_bytes for r in rows))}B"
    facts["tensors"] = f"{sum(r.copies for r in rows)}: {sizes} of {', '.join(dtypes)}"
    lines = [f"{label:13} {value}" if label else value for label, value in facts.items()]
    weights = [row for row in rows if is_weight(row.name)]
    return [*lines, "", *_table(stacked(weights)), *_optimizer(set(rows) - set(weights))]


def number(value: float) -> str:
    """In three digits: 135 M, 1.5 k, 12."""
    unit, letter = next(((u, x) for u, x in _UNITS if value >= u), (1.0, ""))
    return f"{value / unit:.3g} {letter}"


def _dtype(row: Row) -> str:
    return str(row.dtype).removeprefix("torch.")


def _hugging_face(directory: Path) -> tuple[dict[str, str], list[Row]]:
    hf, reader = read_config(directory), HFReader(directory)
    metas = {name: reader.meta(name) for name in reader.keys()}  # noqa: SIM118
    facts = {
        "": f"Hugging Face directory {directory}",
        "architecture": ", ".join(hf.architectures or ["?"]),
        "output layer": "tied to the embedding" if hf.tie_word_embeddings else "of its own",
        "sequences": _sequences(hf),
        "files": str(len({path for path, _ in reader.files.values()})),
        "conversion": _conversion(hf, reader),
    }
    return facts, [Row(name, tuple(meta.shape), meta.dtype) for name, meta in metas.items()]


def _sequences(hf: PretrainedConfig) -> str:
    """How long they may be, or why the decoder is none of megarl's."""
    try:
        return "at most {} tokens ({})".format(*longest_sequence(hf.get_text_config()))
    except (AttributeError, TypeError, ValueError) as error:
        return str(error)


def _conversion(hf: PretrainedConfig, reader: HFReader) -> str:
    """Whether the directory can be converted, or what is against it."""
    family = FAMILIES.get((hf.architectures or [""])[0])
    if family is None:
        return f"no: the architecture is not one of {', '.join(FAMILIES)}"
    problems = check_keys(reader, family.mappings(hf), duplicate=duplicate_of(hf))
    return f"no: {'; '.join(problems)}" if problems else f"every tensor is known to the family {family.name}"


def _megatron(directory: Path) -> tuple[dict[str, str], list[Row]]:
    manifest = read_manifest(directory)
    facts = {
        "": f"Megatron checkpoint {directory}",
        "architecture": manifest.architecture,
        "step": str(manifest.step),
        "contents": ", ".join(manifest.contents),
        "layout": _layout(manifest.parallel),
        "ranks": str(manifest.world_size),
        "dtype": manifest.dtype,
        "versions": ", ".join(f"{key} {value}" for key, value in manifest.versions.items()),
        "files": f"{len(manifest.files)}, {number(sum(manifest.files.values()))}B",
    }
    entries = megatron.read_index(directory).state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if not isinstance(entry, BytesStorageMetadata)}
    return facts, [Row(key, tuple(entry.size), entry.properties.dtype) for key, entry in tensors.items()]


def _layout(parallel: dict[str, Any]) -> str:
    """The sizes, and what was set beside them."""
    defaults = asdict(ParallelConfig())
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    return ", ".join(f"{k}={v}" for k, v in parallel.items() if k in sizes or v != defaults.get(k))


def _optimizer(rows: Iterable[Row]) -> list[str]:
    """A line for each kind of state: the names are those of the weights."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        depth = 3 if row.name.startswith(OPTIMIZER_PREFIX) else 4  # behind the name of a part
        kinds.setdefault(".".join(row.name.split(".")[:depth]), []).append(row)
    return [
        f"  {kind}.*  {len(held)} tensors  {number(sum(row.num_bytes for row in held))}B"
        for kind, held in sorted(kinds.items())
    ]


def _certificate(report: dict) -> str:
    logits = report["logits"]
    compared = logits.get("skipped") or f"differ by {logits['max_abs_diff']:.1e} of {logits['largest_logit']:.3g}"
    exact = "bit for bit" if report["bit_exact"] else f"differs by {report['max_abs_diff']:.1e}"
    return f"{report['verdict']}; {report['direction']}: {exact}; logits: {compared}"


def stacked(rows: Iterable[Row]) -> list[Row]:
    """Sorted, with one row ``layers.{0-29}.x`` for equal tensors of consecutive layers."""
    groups: dict[tuple, list[int]] = {}
    for row in rows:
        match = re.search(r"\.(\d+)\.", row.name)
        name = row.name if match is None else f"{row.name[: match.start(1)]}{{}}{row.name[match.end(1) :]}"
        groups.setdefault((name, row.shape, row.dtype), []).append(-1 if match is None else int(match[1]))
    result = []
    for (name, shape, dtype), numbers in groups.items():
        for first, last in _runs(sorted(numbers)):
            which = str(first) if first == last else f"{{{first}-{last}}}"
            result.append(Row(name.replace("{}", which, 1), shape, dtype, last - first + 1))
    return sorted(result, key=lambda row: row.name)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for value in numbers:
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return runs


def _table(rows: list[Row]) -> list[str]:
    cells = [
        (row.name, " x ".join(map(str, row.shape)) or "scalar", _dtype(row), f"{number(row.num_bytes)}B")
        for row in rows
    ]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    return [
        f"  {name:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {size:>8}"
        for name, shape, dtype, size in cells
    ]
