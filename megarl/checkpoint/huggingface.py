"""Hugging Face directories: reading one lazily, filling a sharded model from it, writing one tensor by tensor.

Only safetensors files are read or written. Names are always the canonical ones: those of the published files and those
that the rollout engine loads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from megarl.checkpoint.shards import DTYPES, ShardWriter
from megarl.families import FAMILIES, Family, family_of
from megarl.models.mapping import Mapping
from megarl.parallel.groups import shard_group

INDEX_FILE = "model.safetensors.index.json"
DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # buffers that older files hold and config.json determines

_CERTIFICATE = "parity.json"  # of a conversion: true of the weights beside it, and of no others
_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|index\.json)$")
_MAX_LISTED = 20


class CheckpointError(ValueError):
    """A directory that cannot be used as asked; the message names the file or the keys."""


def listed(names: Iterable[str]) -> str:
    """``names`` in one line, cut after twenty."""
    names = list(names)
    rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + rest


def _family(directory: Path) -> tuple[dict[str, Any], Family | None]:
    """What config.json says, nothing without one, and the family of the model; None: megarl has none."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return config, FAMILIES.get((config.get("architectures") or [""])[0])


def canonical_names(directory: Path) -> Callable[[str], str]:
    """The published spelling of tensor names in ``directory``, as its model's family knows it."""
    family = _family(directory)[1]
    return family.canonical_name if family is not None else str


def canonical_tensors(directory: Path) -> Callable[[str, Tensor], Tensor]:
    """The published layout of the canonically named tensors in ``directory``, as its model's family knows it."""
    config, family = _family(directory)
    return (lambda name, tensor: tensor) if family is None else partial(family.canonical_tensor, config)


def read_config(directory: str | Path) -> PretrainedConfig:
    """The model's configuration; ``CheckpointError`` unless ``directory`` is a Hugging Face model directory."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: not a Hugging Face model directory: it has no config.json")
    try:
        family = _family(directory)[1]
        return AutoConfig.from_pretrained(directory) if family is None else family.read_config(str(directory))
    except Exception as error:  # transformers raises whatever a wrong value makes its classes raise
        raise CheckpointError(f"{directory}/config.json: {' '.join(str(error).split())}") from error


@dataclass
class HFReader:
    """The tensors of a Hugging Face directory as published, name and layout; one is read when it is asked for."""

    directory: Path
    files: dict[str, tuple[Path, str]] = field(init=False)  # canonical name -> file, name in the file

    def __post_init__(self) -> None:
        self.directory = Path(self.directory)
        self._meta: dict[str, Tensor] = {}
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self.files, canonical_name = {}, canonical_names(self.directory)
        family = _family(self.directory)[1]
        self._weights = self.directory / (family.weights_folder if family is not None else "")
        self._canonical_tensor = canonical_tensors(self.directory)
        for name, path in self._names().items():
            canonical = canonical_name(name)
            if canonical in self.files:
                raise CheckpointError(f"{self.directory}: {name} and {self.files[canonical][1]} are the same tensor")
            self.files[canonical] = (path, name)

    def _names(self) -> dict[str, Path]:
        """Every tensor's name in the files; the index's promises are checked against the files."""
        index = self._weights / INDEX_FILE
        if not index.is_file():
            paths = sorted(self._weights.glob("*.safetensors"))
            if not paths:
                raise CheckpointError(f"{self._weights}: no .safetensors file (pickled weights are not read)")
            return self._files_of(paths, {})
        try:
            weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of tensors' files: {error}") from error
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: not an index of tensors' files: weight_map has values that are no names")
        lost = sorted({file for file in weight_map.values() if not (self._weights / file).is_file()})
        if lost:
            keys = [name for name, file in weight_map.items() if file in lost]
            raise CheckpointError(f"{self.directory}: missing files {listed(lost)} with the keys {listed(keys)}")
        paths = [self._weights / file for file in sorted(set(weight_map.values()))]
        names = self._files_of(paths, {name: self._weights / file for name, file in weight_map.items()})
        absent = sorted(set(weight_map) - set(names))
        if absent:
            raise CheckpointError(f"{self.directory}: {INDEX_FILE} promises keys that no file holds: {listed(absent)}")
        return names

    def _files_of(self, paths: list[Path], named: dict[str, Path]) -> dict[str, Path]:
        """The file of each tensor that ``paths`` hold; of several the one that ``named`` has, or an error."""
        names: dict[str, Path] = {}
        for path in paths:
            for name in self._open(path).keys():  # noqa: SIM118
                if names.setdefault(name, path) != path and name not in named:
                    raise CheckpointError(f"{self.directory}: {names[name].name} and {path.name} both hold {name}")
                if named.get(name) == path:
                    names[name] = path
        return names

    def _open(self, path: Path) -> safe_open:
        """Opened anew each time: a handle maps its file, and every page that was read stays in memory with it."""
        try:
            return safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error

    def keys(self) -> list[str]:
        """Canonical names, in the order of the files."""
        return list(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self.files[name]
        return self._canonical_tensor(name, self._open(path).get_tensor(stored))

    def meta(self, name: str) -> Tensor:
        """A tensor without data, of the shape and dtype that reading it gives."""
        if name not in self._meta:
            self._read_meta(self.files[name][0])
        return self._meta[name]

    def _read_meta(self, path: Path) -> None:
        file = self._open(path)
        names = {stored: name for name, (where, stored) in self.files.items() if where == path}
        for stored, name in names.items():
            view = file.get_slice(stored)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(f"{path}: {stored} is stored as {view.get_dtype()}; read are {', '.join(DTYPES)}")
            meta = torch.empty(view.get_shape(), dtype=DTYPES[view.get_dtype()], device="meta")
            self._meta[name] = self._canonical_tensor(name, meta)

    def is_published(self) -> bool:
        """Whether every tensor is stored by its published name and layout, which others take for granted."""
        shapes = {path: self._open(path) for path, _ in self.files.values()}
        return all(
            stored == name and shapes[path].get_slice(stored).get_shape() == list(self.meta(name).shape)
            for name, (path, stored) in self.files.items()
        )

    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(self.meta(name).nbytes for name in self.files)

    def dtypes(self) -> set[torch.dtype]:
        """Every dtype that occurs."""
        return {self.meta(name).dtype for name in self.files}


def duplicate_of(hf_config: PretrainedConfig) -> str | None:
    """What files may call an output matrix that is the embedding; None where the configuration does not tie them."""
    return family_of(hf_config).output_matrix if hf_config.tie_word_embeddings else None


def embedding_of(mappings: list[Mapping]) -> str:
    """What files call the matrix of word embeddings."""
    return next(mapping.hf[0] for mapping in mappings if "word_embeddings" in mapping.megatron)


def check_keys(reader: HFReader, mappings: list[Mapping], *, duplicate: str | None) -> list[str]:
    """Problems of a directory's key set against the mapping table: one line each for missing and unknown keys.

    Buffers that the configuration determines are no problem; nor is ``duplicate_of`` the model.
    """
    expected = {name for mapping in mappings for name in mapping.hf}
    allowed = expected | {duplicate}
    missing = sorted(name for name in expected if name not in reader)
    unknown = sorted(name for name in reader.keys() if name not in allowed and not DERIVED.fullmatch(name))  # noqa: SIM118
    problems = [f"missing keys: {listed(missing)}"] if missing else []
    return problems + ([f"unknown keys: {listed(unknown)}"] if unknown else [])


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _tie_problem(reader: HFReader, mappings: list[Mapping], output: str) -> list[str]:
    """A stored output layer that is not the embedding: transformers would use it, and a tied model cannot hold it."""
    embedding = embedding_of(mappings)
    if output not in reader or embedding not in reader or torch.equal(reader[output], reader[embedding]):
        return []
    return [f"{output} is not {embedding}, and config.json ties them: set tie_word_embeddings to false there"]


def parameters_of(model: nn.Module, global_name: Callable[[str], str]) -> dict[str, list[nn.Parameter]]:
    """This rank's parameters by their name in the unsplit model; a tied pair may share a name."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(global_name(name), []).append(parameter)
    return found


def _shape_problem(mapping: Mapping, reader: HFReader, parameter: nn.Parameter) -> str | None:
    """Run the mapping on tensors without data and compare the shard's shape with the parameter's."""
    tensors = {name: reader.meta(name) for name in mapping.hf}
    stored = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    try:
        shape = mapping.split(mapping.to_megatron(tensors), shard_group(mapping.parallelism).size())[0].shape
    except (RuntimeError, ValueError) as error:
        return f"wrong shape: {stored} cannot become {mapping.megatron}: {str(error).splitlines()[0]}"
    if shape == parameter.shape:
        return None
    return f"wrong shape: {stored} gives {list(shape)}, {mapping.megatron} has {list(parameter.shape)} on a rank"


def check_load(reader: HFReader, mappings: list[Mapping], model: nn.Module, *, duplicate: str | None) -> None:
    """Raise on every rank one ``CheckpointError`` that lists what is wrong on any; every rank of the world calls it.

    Reads file headers only. Wrong are keys that are missing or unknown, shapes, and parameters without a mapping.
    """
    problems = check_keys(reader, mappings, duplicate=duplicate)
    if duplicate and _first_rank():
        problems += _tie_problem(reader, mappings, duplicate)
    local, known = parameters_of(model, model.global_name), {mapping.megatron for mapping in mappings}
    problems += [f"{name}: the mapping table has no such parameter" for name in sorted(set(local) - known)]
    if not problems:
        for mapping in mappings:
            for parameter in local.get(mapping.megatron, []):
                problem = _shape_problem(mapping, reader, parameter)
                problems += [problem] if problem else []
    names = set(local)
    if dist.is_initialized():
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (problems, names))
        problems = list(dict.fromkeys(problem for theirs, _ in gathered for problem in theirs))
        names = set().union(*(theirs for _, theirs in gathered))
    unheld = sorted(known - names)
    problems += [f"no rank holds the parameters {listed(unheld)}"] if unheld else []
    if problems:
        raise CheckpointError(f"{reader.directory} does not fit the model:\n  " + "\n  ".join(problems))


@torch.no_grad()
def load_hf(model: nn.Module, mappings: list[Mapping], directory: str | Path) -> None:
    """Fill this rank's shard of ``model`` from a Hugging Face directory; every rank of the world calls it.

    ``model`` is the unwrapped module: it names its parameters in the unsplit model with ``global_name``. A rank reads
    the tensors of its own pipeline stage, one parameter at a time. ``CheckpointError`` lists missing, unknown and
    wrongly shaped keys before anything is changed. After an optimizer has been built call its
    ``reload_model_params()``, or its float32 copies keep the old values.
    """
    reader = HFReader(Path(directory))
    check_load(reader, mappings, model, duplicate=duplicate_of(read_config(directory)))
    local = parameters_of(model, model.global_name)
    for mapping in mappings:
        if mapping.megatron in local:
            whole = mapping.to_megatron({name: reader[name] for name in mapping.hf})
            group = shard_group(mapping.parallelism)
            shard = mapping.split(whole, group.size())[group.rank()]
            for parameter in local[mapping.megatron]:
                parameter.copy_(shard)


def copy_auxiliary_files(source: str | Path, destination: str | Path) -> None:
    """Copy configuration, tokenizer and processor: all files of ``source`` but weights and what certifies them."""
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).iterdir()):
        left = path.name == _CERTIFICATE or path.name.startswith(".") or _WEIGHT_FILE.match(path.name)
        if path.is_file() and not left:
            shutil.copyfile(path, destination / path.name)


def _set_config_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Make config.json say ``dtype``, nested sections included; untouched where it already does."""
    path, name = directory / "config.json", str(dtype).removeprefix("torch.")
    config = json.loads(path.read_text())
    changed = False
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section and section[key] != name:
                section[key], changed = name, True
    if changed:
        path.write_text(json.dumps(config, indent=2) + "\n")


def write_hf(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    source_directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a Hugging Face directory, holding one tensor in memory; a file ends at about ``max_shard_bytes``.

    ``tensors`` are whole and canonically named; ``dtype`` None keeps theirs. Every file of ``source_directory`` that
    holds no weights is copied. One process calls it.
    """
    directory = Path(directory)
    copy_auxiliary_files(source_directory, directory)
    if dtype is not None:
        _set_config_dtype(directory, dtype)
    parts: list[Path] = []
    files: dict[str, int] = {}  # tensor -> number of its part
    total = 0
    with ExitStack() as stack:
        shard: ShardWriter | None = None
        for name, tensor in tensors:
            tensor = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
            if name in files:
                raise CheckpointError(f"{name} came twice")
            if shard is None or shard.num_bytes + tensor.nbytes > max_shard_bytes or not shard.fits(name, tensor):
                stack.pop_all().close()
                parts.append(directory / f"part-{len(parts):05d}.safetensors")
                shard = stack.enter_context(ShardWriter(parts[-1]))
            shard.add(name, tensor)
            files[name], total = len(parts) - 1, total + tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = ["model.safetensors"] if len(parts) == 1 else names
    for part, name in zip(parts, names, strict=True):
        part.rename(directory / name)
    if len(parts) > 1:
        weight_map = {name: names[number] for name, number in files.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
