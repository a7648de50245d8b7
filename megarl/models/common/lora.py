"""Low-rank adapters (arXiv 2106.09685) on Megatron-Core's parallel linear layers: y = W x + scale * B A x, W frozen.

A layer keeps its place and the names of its parameters; it gains a child ``adapter`` with ``lora_A`` and ``lora_B``.
Where a matrix holds several projections of the checkpoint (q, k, v; gate, up) each has a pair of its own: their A are
stacked, and the rows of ``lora_B`` lie as those of W, so that the layer's mapping says which row belongs to which
projection. The adapters' mappings are derived from the layers': there is no other list of names.

Shapes: T tokens, I inputs and O outputs of a layer on this rank, R rank, P projections in one matrix.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megarl.config import LoraConfig
from megarl.models.mapping import GatedMLP, HFTensors, Mapping, Vocab

CHILD = ".adapter."  # in the names of an adapter's parameters, and of nothing else
WEIGHT, A, B = ".weight", f"{CHILD}lora_A", f"{CHILD}lora_B"
HF_A, HF_B = ".lora_A.weight", ".lora_B.weight"
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Attachment:
    """What ``attach`` gave a model."""

    lora: LoraConfig
    mappings: list[Mapping]  # of the model
    adapters: list[Mapping]


_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class StackedA(Mapping):
    """The A of the projections in a matrix, one above the other."""

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        return torch.cat([tensors[name] for name in self.hf])

    def to_hf(self, tensor: Tensor) -> HFTensors:
        return dict(zip(self.hf, tensor.chunk(len(self.hf)), strict=True))


@dataclass(frozen=True, kw_only=True)
class FilledA(StackedA):
    """The same, with zeros for the matrix's other projections."""

    others: tuple[str, ...]

    def to_hf(self, tensor: Tensor) -> HFTensors:
        parts = super().to_hf(tensor)
        return parts | {name: torch.zeros_like(parts[self.hf[0]]) for name in self.others}


@dataclass(frozen=True, kw_only=True)
class StackedB(Mapping):
    """The B of the projections in a matrix, its rows as those of the matrix; zero where a projection has none."""

    layer: Mapping  # of the matrix
    num_rows: int  # of the whole matrix; 0 on ranks that do not hold it

    def to_megatron(self, tensors: HFTensors) -> Tensor:
        first = tensors[self.hf[0]]
        rows = self.layer.to_hf(torch.empty(self.num_rows, 1, device="meta"))
        names = {name: name.removesuffix(WEIGHT) + HF_B for name in rows}
        return self.layer.to_megatron(
            {
                name: tensors[names[name]] if names[name] in self.hf else first.new_zeros(len(part), first.shape[1])
                for name, part in rows.items()
            }
        )

    def to_hf(self, tensor: Tensor) -> HFTensors:
        parts = {name.removesuffix(WEIGHT) + HF_B: part for name, part in self.layer.to_hf(tensor).items()}
        return {name: parts[name] for name in self.hf}

    def split(self, tensor: Tensor, size: int) -> list[Tensor]:
        return super().split(tensor, size) if self.shard_dim is None else self.layer.split(tensor, size)

    def join(self, shards: list[Tensor]) -> Tensor:
        return super().join(shards) if self.shard_dim is None else self.layer.join(shards)


class Adapter(nn.Module):
    """scale * B A of one layer on this rank; A is split as the layer's inputs are, and B as its outputs."""

    def __init__(
        self, linear: ColumnParallelLinear | RowParallelLinear, owners: Tensor, num_projections: int, lora: LoraConfig
    ) -> None:
        """owners: [O] int64, which of the projections each output on this rank belongs to, or -1 for none."""
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.scale, self.enabled = lora.scale, True
        self.column = isinstance(linear, ColumnParallelLinear)
        self.sequence_parallel, self.tp_group = linear.sequence_parallel, linear.tp_group
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(num_projections * lora.rank, inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank, **like))
        mask = F.one_hot(owners + 1, num_projections + 1)[:, 1:]  # [O, P]
        self.mask = None if bool(mask.all()) else mask.to(**like)
        split, whole = (self.lora_B, self.lora_A) if self.column else (self.lora_A, self.lora_B)
        set_tensor_model_parallel_attributes(split, True, 0 if self.column else 1, 1)
        whole.sequence_parallel = self.sequence_parallel  # its gradient is of this rank's tokens only

    def _b(self) -> Tensor:
        """B of all projections beside each other, zero off the blocks: [O, P R]."""
        return self.lora_B if self.mask is None else (self.lora_B[:, None] * self.mask[:, :, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer's output gains: [T, ..., I] -> [T, ..., O], tokens cut as the layer's own."""
        low = F.linear(x, self.lora_A)
        if self.column and self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        elif self.column:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return F.linear(low * self.scale, self._b())

    def merged(self, weight: Tensor) -> Tensor:
        """W + scale * B A [O, I]."""
        return add_product(weight, self.lora_A, self._b(), self.scale)


class _Adapted:
    """What a parallel linear layer with a child ``adapter`` does in addition."""

    split_dims: ClassVar[dict[str, int]]  # parameter -> the dimension that tensor parallelism splits
    adapter: Adapter
    gated: bool  # a rank's rows are those of its gate and then those of its up projection

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        if self.adapter.enabled:
            output = output + self.adapter(input_)
        return output, bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The layer's parameters and its adapter's; called by mcore's checkpointing."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:  # mcore's MLP does this to the weight
            name = f"{prefix}{B[1:]}"
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):
    split_dims: ClassVar = {"weight": 0, "bias": 0, B[1:]: 0}


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):
    split_dims: ClassVar = {"weight": 1, A[1:]: 1}


def add_product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A in a new tensor of W's dtype, summed in float32 and rounded once."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def projections(mapping: Mapping) -> list[str]:
    """The checkpoint's modules whose matrices ``mapping`` holds; none unless it is of a parallel linear layer."""
    if isinstance(mapping, Vocab) or mapping.shard_dim is None or not mapping.megatron.endswith(WEIGHT):
        return []
    return [name.removesuffix(WEIGHT) for name in mapping.hf]


def _wants(target: str, projection: str) -> bool:
    return target in (ALL_LINEAR, projection) or projection.endswith(f".{target}")


def check_targets(every: list[str], lora: LoraConfig, where: str) -> None:
    """``ValueError`` for a target that is none of the modules ``every``, which are those of ``where``."""
    for target in lora.target_modules:
        if not any(_wants(target, name) for name in every):
            known = sorted({name.rpartition(".")[2] for name in every})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f", only {', '.join(known)}"
            raise ValueError(f"model.lora.target_modules: {where} has no layer {target!r} that adapters fit{hint}")


def adapted_projections(mappings: list[Mapping], lora: LoraConfig, parts: dict[str, str]) -> dict[str, list[str]]:
    """Megatron's name of each layer that gets adapters -> the checkpoint's modules in it that do.

    ``parts``: part of the model -> its module. ``ValueError`` names a target that no layer of ``lora.parts`` has.
    """
    absent = [part for part in lora.parts if part not in parts]
    if absent:
        raise ValueError(f"model.lora.parts={absent}: this model has {', '.join(parts)} only")
    roots = tuple(f"{parts[part]}." for part in lora.parts)
    candidates = {m.megatron.removesuffix(WEIGHT): projections(m) for m in mappings if m.megatron.startswith(roots)}
    every = [name for names in candidates.values() for name in names]
    check_targets(every, lora, ", ".join(lora.parts))
    chosen = {
        layer: [name for name in names if any(_wants(target, name) for target in lora.target_modules)]
        for layer, names in candidates.items()
    }
    return {layer: names for layer, names in chosen.items() if names}


def attach(
    model: nn.Module, mappings: list[Mapping], lora: LoraConfig, parts: dict[str, str], *, seed: int
) -> list[Mapping]:
    """Freeze ``model``, one pipeline stage, and give its layers adapters; the adapters' mappings, of all stages.

    ``lora_B`` is zero and ``lora_A`` drawn by ``seed`` and name, alike at every parallel layout. Called before the
    model is wrapped for data parallelism.
    """
    chosen = adapted_projections(mappings, lora, parts)
    layers = {m.megatron.removesuffix(WEIGHT): m for m in mappings}
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    num_rows: dict[str, int] = {}
    model.requires_grad_(False)
    for local_name, _ in list(model.named_parameters()):
        name = model.global_name(local_name).removesuffix(WEIGHT)
        if name not in chosen or not local_name.endswith(WEIGHT):
            continue
        module = model.get_submodule(local_name.removesuffix(WEIGHT))
        _check(module, layers[name])
        num_rows[name] = len(module.weight) * (size if layers[name].shard_dim == 0 else 1)
        owners = _owners(layers[name], chosen[name], num_rows[name])
        column = layers[name].shard_dim == 0
        owners = layers[name].split(owners[:, None], size)[rank][:, 0] if column else owners
        module.adapter = Adapter(module, owners, len(chosen[name]), lora)
        module.gated = isinstance(layers[name], GatedMLP)
        module.__class__ = AdaptedColumnParallelLinear if column else AdaptedRowParallelLinear
    table = [mapping for name, names in chosen.items() for mapping in _mappings(layers[name], names, num_rows)]
    _attachments[model] = Attachment(lora, mappings, table)
    _initialize(model, table, rank, size, seed)
    for block in model.modules():
        if isinstance(block, TransformerBlock) and block.config.recompute_granularity is not None:
            block.register_forward_pre_hook(_require_grad, with_kwargs=True)
    return table


def adapters_for_engine(adapters: list[Mapping]) -> list[Mapping]:
    """``adapters`` for an engine that wants those of a matrix for all of its projections or none: with zeros."""
    names = {m.megatron.removesuffix(B): projections(m.layer) for m in adapters if isinstance(m, StackedB)}
    table: list[Mapping] = []
    for mapping in adapters:
        every = names[mapping.megatron.removesuffix(A).removesuffix(B)]
        if isinstance(mapping, StackedB):
            table.append(replace(mapping, hf=tuple(name + HF_B for name in every)))
        else:
            others = tuple(name + HF_A for name in every if name + HF_A not in mapping.hf)
            table.append(FilledA(megatron=mapping.megatron, hf=mapping.hf, shard_dim=mapping.shard_dim, others=others))
    return table


def _check(module: nn.Module, mapping: Mapping) -> None:
    expected = ColumnParallelLinear if mapping.shard_dim == 0 else RowParallelLinear
    if type(module) is not expected or module.is_expert:
        raise ValueError(
            f"model.lora: {mapping.megatron} is of a {type(module).__name__}, which adapters do not fit "
            "(model.transformer_impl=local has layers that they do fit; experts have none)"
        )


def _owners(mapping: Mapping, names: list[str], num_rows: int) -> Tensor:
    """[num_rows] int64: which of ``names`` each row of the whole matrix belongs to, or -1."""
    owners = torch.full((num_rows,), -1)
    rows = mapping.to_hf(torch.arange(num_rows)[:, None])
    for index, name in enumerate(names):
        owners[rows[name + WEIGHT].flatten()] = index
    return owners


def _mappings(mapping: Mapping, names: list[str], num_rows: dict[str, int]) -> list[Mapping]:
    layer, column = mapping.megatron.removesuffix(WEIGHT), mapping.shard_dim == 0
    return [
        StackedA(megatron=layer + A, hf=tuple(name + HF_A for name in names), shard_dim=None if column else 1),
        StackedB(
            megatron=layer + B,
            hf=tuple(name + HF_B for name in names),
            shard_dim=0 if column else None,
            layer=mapping,
            num_rows=num_rows.get(layer, 0),
        ),
    ]


@torch.no_grad()
def _initialize(model: nn.Module, table: list[Mapping], rank: int, size: int, seed: int) -> None:
    parameters = {model.global_name(name): parameter for name, parameter in model.named_parameters()}
    for mapping in table:
        if isinstance(mapping, StackedA) and mapping.megatron in parameters:
            parameter = parameters[mapping.megatron]
            inputs = parameter.shape[1] * (1 if mapping.shard_dim is None else size)
            rows = len(parameter) // len(mapping.hf)
            whole = mapping.to_megatron({name: _uniform(rows, inputs, f"{seed} {name}") for name in mapping.hf})
            parameter.copy_(mapping.split(whole, size)[rank])


def _uniform(rows: int, inputs: int, key: str) -> Tensor:
    """PEFT's initial A, Kaiming with a = sqrt(5): uniform in +-1/sqrt(inputs); the same for the same ``key``."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    return (torch.rand(rows, inputs, generator=generator) * 2 - 1) * inputs**-0.5


def _require_grad(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Let gradients into recomputed layers: autograd skips a checkpoint none of whose inputs needs one."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if torch.is_grad_enabled() and hidden is not None and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
        if "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": hidden}
        else:
            args = (hidden, *args[1:])
    return args, kwargs


def is_adapted(model: nn.Module) -> bool:
    """Whether ``attach`` was called on ``model``, which may be a stage that no adapter is on."""
    return model in _attachments


def attachment(model: nn.Module) -> Attachment:
    """What ``attach`` gave ``model``."""
    return _attachments[model]


def adapted_layers(model: nn.Module) -> dict[int, _Adapted]:
    """The layers of ``model`` that have adapters, by the id of their weight."""
    return {id(module.weight): module for module in model.modules() if isinstance(module, _Adapted)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, for the time of the block: the reference of what they learn."""
    adapters = [layer.adapter for layer in adapted_layers(model).values()]
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled
