"""A model of any size, one parameter in memory: reading a Megatron checkpoint's tensors, and feeding a save.

``model`` is always the whole model on the meta device: names, shapes and dtypes without memory. Its sharded state
dict says where mcore's format puts each parameter (layers stacked, gated MLPs in halves).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megarl.checkpoint.huggingface import CheckpointError, HFReader
from megarl.checkpoint.writer import TensorSource
from megarl.models.mapping import Mapping

Entry = ShardedTensor | ShardedTensorFactory


def entries(model: MegatronModule) -> dict[str, Entry]:
    """Where each parameter lies in a checkpoint, by its name in ``model``."""
    state = model.sharded_state_dict()
    return {name: entry for name, entry in state.items() if isinstance(entry, Entry)}


def _parts(entry: Entry, data: Tensor) -> list[ShardedTensor]:
    """The pieces that a checkpoint holds of the parameter ``data``."""
    if isinstance(entry, ShardedTensorFactory):
        return entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)
    return [replace(entry, data=data)]


def whole_parameter(mapping: Mapping, reader: HFReader, dtype: torch.dtype) -> Tensor:
    """The Megatron parameter of ``mapping``, from the files of ``reader``."""
    return mapping.to_megatron({name: reader[name] for name in mapping.hf}).to(dtype)


def parameter_source(
    model: MegatronModule, mappings: list[Mapping], reader: HFReader, wrote: Callable[[int], object]
) -> TensorSource:
    """What a save of ``model`` asks for its tensors, read from ``reader``; ``wrote`` is told the bytes of each."""
    by_name = {mapping.megatron: mapping for mapping in mappings}
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
    state = entries(model)
    for name, entry in state.items():
        for i, part in enumerate(_parts(entry, entry.data)):
            places[part.key, tuple(part.global_offset)] = (name, i)
    held: dict[str, list[ShardedTensor]] = {}  # the pieces of the last parameter: they are asked for one by one

    def source(index: MetadataIndex) -> Tensor:
        name, number = places[index.fqn, tuple(index.offset)]
        if name not in held:
            held.clear()
            data = whole_parameter(by_name[model.global_name(name)], reader, state[name].data.dtype)
            held[name] = _parts(state[name], data)
        part = held[name][number]
        wrote(part.data.nbytes)
        return part.data.view((1,) * part.prepend_axis_num + part.data.shape)

    return source


class _Into(DefaultLoadPlanner):
    """Reads into one tensor, a piece of the stored one."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it was read in place


class CheckpointReader:
    """The parameters of the Megatron checkpoint at ``path``, whatever layout saved it; one is read when asked for."""

    def __init__(self, path: Path, model: MegatronModule) -> None:
        self._files = FileSystemReader(path / "state")
        self._metadata: Metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._entries = {model.global_name(name): entry for name, entry in entries(model).items()}

    def __getitem__(self, name: str) -> Tensor:
        """The whole parameter ``name`` of the unsplit model, on the CPU, as it was stored."""
        entry = self._entries[name]
        pieces = [self._read(part) for part in _parts(entry, entry.data)]
        return entry.merge_fn(pieces) if isinstance(entry, ShardedTensorFactory) else pieces[0]

    def _read(self, part: ShardedTensor) -> Tensor:
        stored = self._metadata.state_dict_metadata[part.key]
        piece = torch.empty(part.local_shape, dtype=stored.properties.dtype)
        shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        chunk = ChunkStorageMetadata(offsets=torch.Size(part.global_offset), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(part.key, stored, [chunk])
        if sum(item.lengths.numel() for item in items) != piece.numel():
            raise CheckpointError(f"{self._files.path}: {part.key} has gaps at {list(part.global_offset)}")
        self._files.read_data(LoadPlan(items), _Into(piece.view(shape)))
        return piece

    def tensors(self, mappings: list[Mapping]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name."""
        for mapping in mappings:
            yield from mapping.to_hf(self[mapping.megatron]).items()

    @torch.no_grad()
    def fill(self, model: MegatronModule) -> None:
        """Copy every parameter into ``model``, whole and of any dtype."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self[model.global_name(name)])
