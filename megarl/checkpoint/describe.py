"""What a Megatron checkpoint or a Hugging Face directory holds, in lines to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megarl.checkpoint import megatron
from megarl.checkpoint.huggingface import HFReader, read_config
from megarl.checkpoint.manifest import MANIFEST_FILE, read_manifest


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
