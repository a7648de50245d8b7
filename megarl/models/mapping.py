"""How one Megatron parameter corresponds to tensors of a Hugging Face checkpoint, read in both directions.

A model family declares one list of these (``models/<family>/mapping.py``): a mapping for each parameter of the whole,
unsplit model, layers numbered globally. Loading, export, the converters and weight sync are all readers of that list;
nothing else knows a parameter's name. Everything here is a pure function of tensors; collectives live in the readers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HFTensors = dict[str, Tensor]
VOCAB_MULTIPLE = 128  # rows of an embedding are padded to a multiple of this and of the tensor-parallel size


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """One Megatron parameter, the Hugging Face tensors it is made of, and the dimension that ranks split.

    ``parallelism``: whose ranks hold the shards, ``tensor`` or ``expert`` (see ``groups.shard_group``).
    """

    megatron: str  # name in the unsplit model
    hf: tuple[str, ...]  # names in the checkpoint's files
    shard_dim: int | None = None  # None: replicated
    parallelism: str = "tensor"

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        """The whole Megatron parameter, from all tensors named in ``hf``."""
        return tensors[self.hf[0]]

    def to_hf(self, tensor: Tensor) -> HFTensors:
        """The Hugging Face tensors, from the whole Megatron parameter."""
        return {self.hf[0]: tensor}

    def split(self, tensor: Tensor, size: int) -> list[Tensor]:
        """The shards of ``size`` ranks, in order of rank."""
        if self.shard_dim is None:
            return [tensor] * size
        if tensor.shape[self.shard_dim] % size:
            raise ValueError(
                f"{self.megatron}: dimension {self.shard_dim} of {tuple(tensor.shape)} cannot be split over "
                f"{size} {self.parallelism}-parallel ranks"
            )
        return list(tensor.chunk(size, dim=self.shard_dim))

    def join(self, shards: list[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        return shards[0] if self.shard_dim is None else torch.cat(shards, dim=self.shard_dim)


@dataclass(frozen=True, kw_only=True)
class Vocab(Mapping):
    """An embedding or output matrix, whose rows Megatron pads so that tensor parallelism divides them."""

    vocab_size: int  # rows in the checkpoint
    shard_dim: int | None = 0

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return _padded(tensors[self.hf[0]], padded_vocab_size(self.vocab_size))

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return {self.hf[0]: tensor[: self.vocab_size]}

    def split(self, tensor: Tensor, size: int) -> list[Tensor]:
        return super().split(_padded(tensor, padded_vocab_size(self.vocab_size, size)), size)


@dataclass(frozen=True, kw_only=True)
class QKV(Mapping):
    """Query, key and value projections, in Megatron one matrix: for each key-value group its queries, key, value."""

    num_heads: int
    num_groups: int
    shard_dim: int | None = 0

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return torch.cat([tensors[name].unflatten(0, (self.num_groups, -1)) for name in self.hf], dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return dict(zip(self.hf, self.queries_keys_values(tensor), strict=True))

    def queries_keys_values(self, tensor: Tensor) -> list[Tensor]:
        """All queries, all keys, all values of the whole Megatron parameter."""
        head = tensor.shape[0] // (self.num_heads + 2 * self.num_groups)
        queries = head * (self.num_heads // self.num_groups)
        parts = tensor.unflatten(0, (self.num_groups, -1)).split([queries, head, head], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True, kw_only=True)
class FusedQKV(QKV):
    """The same, stored as one matrix of all queries, all keys, all values."""

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        whole = tensors[self.hf[0]]
        head = whole.shape[0] // (self.num_heads + 2 * self.num_groups)
        parts = whole.split([self.num_heads * head, self.num_groups * head, self.num_groups * head])
        return torch.cat([part.unflatten(0, (self.num_groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return {self.hf[0]: torch.cat(self.queries_keys_values(tensor))}


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Mapping):
    """The gate and up projections of a gated MLP, in Megatron one matrix; each rank holds [its gate; its up]."""

    shard_dim: int | None = 0

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return torch.cat([tensors[name] for name in self.hf])

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return dict(zip(self.hf, tensor.chunk(2), strict=True))

    def split(self, tensor: Tensor, size: int) -> list[Tensor]:
        halves = [super(GatedMLP, self).split(half, size) for half in tensor.chunk(2)]
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]

    def join(self, shards: list[Tensor]) -> Tensor:
        halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([part for half in halves for part in half])


@dataclass(frozen=True, kw_only=True)
class FusedGatedMLP(GatedMLP):
    """The same, stored as one matrix: gate over up."""

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return tensors[self.hf[0]]

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return {self.hf[0]: tensor}


@dataclass(frozen=True, kw_only=True)
class ExpertMatrices(Mapping):
    """Matrices [out, in] of E experts, each stored by itself, in Megatron one tensor [E, in, num_parts * out].

    ``hf`` names the parts of the first expert, then those of the second; ranks hold whole experts.
    """

    num_parts: int

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        rows = torch.cat([tensors[name] for name in self.hf])
        return rows.unflatten(0, (len(self.hf) // self.num_parts, -1)).transpose(1, 2).contiguous()

    def to_hf(self, tensor: Tensor) -> HFTensors:
        rows = tensor.transpose(1, 2).contiguous().flatten(0, 1)
        return dict(zip(self.hf, rows.chunk(len(self.hf)), strict=True))


@dataclass(frozen=True, kw_only=True)
class Unsqueezed(Mapping):
    """A tensor that has ``ones`` dimensions of size one in front in the checkpoint."""

    ones: int

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return tensors[self.hf[0]].flatten(0, self.ones)

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return {self.hf[0]: tensor.view(*[1] * self.ones, *tensor.shape)}


@dataclass(frozen=True, kw_only=True)
class Flattened(Mapping):
    """A convolution whose stride is its kernel, in Megatron the matrix of a linear layer over flattened patches."""

    kernel: tuple[int, ...]  # shape of the checkpoint's tensor behind its first dimension

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return tensors[self.hf[0]].flatten(1)

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return {self.hf[0]: tensor.unflatten(1, self.kernel)}


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int = 1) -> int:
    """Rows of an embedding that hold ``vocab_size`` tokens and are cut in equal parts."""
    multiple = math.lcm(VOCAB_MULTIPLE, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
