"""An SGLang engine's live parameters under the names and in the shapes of the Hugging Face checkpoint.

SGLang fuses q, k, v and gate, up into one parameter and splits parameters over tensor-parallel ranks. Undoing both on
the engine's side shows what a weight update really wrote: SGLang's loaders skip names that they do not know in silence.
Nothing is gathered: each rank says where in a checkpoint's tensor the elements lie that it holds, and the ranks add
their parts of its checksum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.models.llama import Phi3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
from torch import Tensor, nn

from megarl.families import FAMILIES
from megarl.utils.checksum import checksum_part, format_checksum


@dataclass
class Held:
    """What a rank holds of a tensor of the checkpoint; one tensor may be several, of a fused parameter."""

    name: str  # of the checkpoint's tensor
    shape: tuple[int, ...]  # of the same, whole
    tensor: Tensor  # this rank's elements; none where it has padding only
    part: int = 0  # ranks that hold the same elements have the same number
    offset: int = 0  # of the first element in the whole, row by row
    strides: tuple[int, ...] | None = None  # in the whole, of each dimension of ``tensor``; None: one run


def _rows(name: str, tensor: Tensor, part: int, parts: int, *, first: int = 0, total: int | None = None) -> Held:
    """``part`` of ``parts`` equal ones of rows that begin at row ``first`` of ``total`` (None: these are all)."""
    shape = (total or parts * len(tensor), *tensor.shape[1:])
    return Held(name, shape, tensor, part, (first + part * len(tensor)) * math.prod(shape[1:]))


def _columns(name: str, tensor: Tensor, part: int, parts: int) -> Held:
    """``part`` of ``parts`` equal ones of the columns of a matrix."""
    rows, columns = tensor.shape
    return Held(name, (rows, parts * columns), tensor, part, part * columns, (parts * columns, 1))


def _fused_rows(names: list[str], tensors: list[tuple[Tensor, int, int]]) -> Iterator[Held]:
    """Tensors with their part and number of parts: each a whole of its own or, under one name, one below the other."""
    if len(names) > 1:
        for name, (tensor, part, parts) in zip(names, tensors, strict=True):
            yield _rows(name, tensor, part, parts)
        return
    first, total = 0, sum(len(tensor) * parts for tensor, _, parts in tensors)
    for tensor, part, parts in tensors:
        yield _rows(names[0], tensor, part, parts, first=first, total=total)
        first += len(tensor) * parts


def _qkv(name: str, module: QKVParallelLinear, parameter: Tensor, fused: bool) -> Iterator[Held]:
    sizes = [module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size]
    query, key, value = parameter.split(sizes)
    replicas = module.num_kv_head_replicas  # ranks that hold the same key and value heads
    of_kv = (module.tp_rank // replicas, module.tp_size // replicas)
    prefix, leaf = name.rsplit("qkv_proj.", 1)
    if name.startswith("visual."):
        names = [f"{prefix}qkv.{leaf}"]
    elif fused:
        names = [name]
    else:
        names = [f"{prefix}{part}_proj.{leaf}" for part in "qkv"]
    yield from _fused_rows(names, [(query, module.tp_rank, module.tp_size), (key, *of_kv), (value, *of_kv)])


def _gate_up(name: str, module: MergedColumnParallelLinear, parameter: Tensor, fused: bool) -> Iterator[Held]:
    names = [name] if fused else [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    yield from _fused_rows(names, [(half, module.tp_rank, module.tp_size) for half in parameter.chunk(2)])


def _experts(name: str, module: FusedMoE, parameter: Tensor) -> Iterator[Held]:
    """[E, 2 I, H] and [E, H, I] as [E, H, 2 I] and [E, I, H]; ranks hold some experts, and of those some of I."""
    tp, ep = module.moe_tp_size, module.moe_ep_size
    part = module.moe_ep_rank * tp + module.moe_tp_rank
    prefix, leaf = name.rsplit(".", 1)
    kind, halves, dim = {"w13_weight": ("gate_up_proj", 2, 1), "w2_weight": ("down_proj", 1, 2)}[leaf]
    local, *sizes = parameter.shape
    sizes[dim - 1] *= tp
    columns, rows = sizes  # of an expert's matrix in the checkpoint
    strides = (rows * columns, 1, columns)
    for half, tensor in enumerate(parameter.chunk(halves, dim=dim)):
        first = (half * tp + module.moe_tp_rank) * tensor.shape[dim]
        offset = module.moe_ep_rank * local * strides[0] + first * strides[dim]
        yield Held(f"{prefix}.{kind}", (local * ep, rows, columns), tensor, part, offset, strides)


def _experts_apart(name: str, module: FusedMoE, parameter: Tensor) -> Iterator[Held]:
    """The same as matrices of each expert; every rank names those of all, and of other ranks' it holds nothing."""
    tp, rank, local = module.moe_tp_size, module.moe_tp_rank, len(parameter)
    prefix, leaf = name.rsplit(".", 1)
    for number in range(local * module.moe_ep_size):
        owner, index = divmod(number, local)
        if leaf == "w2_weight":
            held = [_columns(f"{prefix}.{number}.down_proj.weight", parameter[index], rank, tp)]
        else:
            names = [f"{prefix}.{number}.{half}_proj.weight" for half in ("gate", "up")]
            held = [_rows(n, half, rank, tp) for n, half in zip(names, parameter[index].chunk(2), strict=True)]
        for item in held:
            nothing = replace(item, tensor=parameter.new_empty(0), part=tp, offset=0, strides=None)
            yield item if owner == module.moe_ep_rank else nothing


def held_weights(model: nn.Module) -> Iterator[Held]:
    """What this rank holds of every weight of ``model``, under its checkpoint name.

    A tied ``lm_head`` is the embedding and is not repeated. Padding rows of the vocabulary are cut.
    """
    yield from _published(model, _unfused(model))


def checksums(held: Iterable[Held]) -> dict[str, str]:
    """``utils.checksum.tensor_checksum`` of each whole tensor; all tensor-parallel ranks call it and have the same.

    Where ranks should hold copies of one part and do not, the checksum says so and equals none.
    """
    held = list(held)
    group = get_tp_group()
    sums = torch.stack([checksum_part(item.tensor, item.offset, item.strides) for item in held])
    mine = torch.stack([torch.tensor([item.part for item in held], device=sums.device), sums])
    ranks = [torch.empty_like(mine) for _ in range(group.world_size)]
    torch.distributed.all_gather(ranks, mine, group=group.device_group)
    return combined(held, [rank.tolist() for rank in ranks])


def combined(held: list[Held], ranks: list[list[list[int]]]) -> dict[str, str]:
    """``checksums`` from each rank's parts and sums [2, len(held)]."""
    sums: dict[str, int] = {}
    whole: dict[str, Held] = {}
    conflicts: dict[str, str] = {}
    for i, item in enumerate(held):
        holders: dict[int, int] = {}  # part -> the first rank that holds it
        for rank, (parts, values) in enumerate(ranks):
            first = holders.setdefault(parts[i], rank)
            if values[i] != ranks[first][1][i]:
                conflicts[item.name] = f", and ranks {first} and {rank} hold different copies"
        sums[item.name] = sums.get(item.name, 0) + sum(ranks[rank][1][i] for rank in holders.values())
        whole[item.name] = item
    return {
        name: format_checksum(whole[name].shape, whole[name].tensor.dtype, value) + conflicts.get(name, "")
        for name, value in sums.items()
    }


def _published(model: nn.Module, held: Iterable[Held]) -> Iterator[Held]:
    """``held`` under their checkpoint names instead of SGLang's."""
    architecture = type(model).__name__
    prefixes = FAMILIES[architecture].architectures[architecture].engine_prefixes if architecture in FAMILIES else {}
    for item in held:
        prefix = next((prefix for prefix in prefixes if item.name.startswith(prefix)), None)
        yield item if prefix is None else replace(item, name=prefixes[prefix] + item.name.removeprefix(prefix))


def _is_fused(model: nn.Module) -> bool:
    """Whether the checkpoint keeps q, k, v and gate, up as one too."""
    return any(isinstance(module, Phi3ForCausalLM) for module in model.modules())


def _unfused(model: nn.Module) -> Iterator[Held]:
    """The same under SGLang's names."""
    modules, fused, apart = dict(model.named_modules()), _is_fused(model), isinstance(model, Qwen3MoeForCausalLM)
    for name, parameter in model.named_parameters():
        module, tensor = modules[name.rpartition(".")[0]], parameter.detach()
        if isinstance(module, BaseLayerWithLoRA):  # holds its layer's parameters as its own
            module = module.base_layer
        is_weight = name.endswith(".weight")
        if isinstance(module, QKVParallelLinear):
            yield from _qkv(name, module, tensor, fused)
        elif isinstance(module, MergedColumnParallelLinear):
            yield from _gate_up(name, module, tensor, fused)
        elif isinstance(module, FusedMoE):
            yield from (_experts_apart if apart else _experts)(name, module, tensor)
        elif isinstance(module, ColumnParallelLinear):
            yield _rows(name, tensor, module.tp_rank, module.tp_size)
        elif isinstance(module, RowParallelLinear) and is_weight:
            yield _columns(name, tensor, module.tp_rank, module.tp_size)
        elif isinstance(module, VocabParallelEmbedding) and is_weight:
            yield _vocabulary(name, module, tensor)
        else:
            yield Held(name, tuple(tensor.shape), tensor)


def _vocabulary(name: str, module: VocabParallelEmbedding, parameter: Tensor) -> Held:
    """Of the padded rows of all ranks the first are the vocabulary; a rank may hold padding only."""
    rows, first = parameter[: module.shard_indices.num_org_elements], module.shard_indices.org_vocab_start_index
    shape = (module.org_vocab_size, *parameter.shape[1:])
    return Held(name, shape, rows, first, first * math.prod(shape[1:]))


def held_adapters(manager: LoRAManager) -> Iterator[Held]:
    """The one adapter's tensors as layers compute with them, named as in PEFT, zeros where it has none."""
    (uid,) = manager.loras
    manager.fetch_new_loras({uid})  # what SGLang does before the first request that uses it
    slot = manager.memory_pool.get_buffer_id(uid)
    fused = _is_fused(manager.base_model)
    layers = [item for layer in manager.lora_modules for item in layer.items()]
    held = (item for name, layer in layers for item in _adapter_of(name, layer, slot, fused))
    yield from _published(manager.base_model, held)


def _adapter_of(name: str, layer: BaseLayerWithLoRA, slot: int, fused: bool) -> Iterator[Held]:
    module = layer.base_layer
    row = isinstance(module, RowParallelLinear)
    if isinstance(module, QKVParallelLinear):
        a, b = layer.A_buffer_qkv[slot], layer.B_buffer_qkv[slot]
        prefix, names = name.removesuffix("qkv_proj"), ("q_proj", "k_proj", "v_proj")
        yield from _qkv(f"{name}.lora_B.weight", module, b, fused)
    elif isinstance(module, MergedColumnParallelLinear):
        a, b = layer.A_buffer[slot], layer.B_buffer[slot]
        prefix, names = name.removesuffix("gate_up_proj"), ("gate_proj", "up_proj")
        yield from _gate_up(f"{name}.lora_B.weight", module, b, fused)
    else:
        a, b, prefix, names = layer.A_buffer[slot], layer.B_buffer[slot], name, ("",)
        whole = f"{name}.lora_B.weight"
        yield Held(whole, tuple(b.shape), b) if row else _rows(whole, b, module.tp_rank, module.tp_size)
    parts = a.chunk(len(names))
    if fused:  # one for all, repeated by SGLang
        prefix, names, parts = name, ("",), parts[:1]
    for projection, part in zip(names, parts, strict=True):
        whole = f"{prefix}{projection}.lora_A.weight"
        yield _columns(whole, part, module.tp_rank, module.tp_size) if row else Held(whole, tuple(part.shape), part)
