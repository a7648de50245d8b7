"""An SGLang engine's live parameters under the names and in the shapes of the Hugging Face checkpoint.

SGLang fuses q, k, v and gate, up into one parameter and splits parameters over tensor-parallel ranks. Undoing both on
the engine's side shows what a weight update really wrote: SGLang's loaders skip names that they do not know in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
from torch import Tensor, nn


def _gather(shard: Tensor, size: int) -> list[Tensor]:
    """The shards of all tensor-parallel ranks; every one of them calls it. ``size`` 1: the module is replicated."""
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)]
    torch.distributed.all_gather(shards, shard.contiguous(), group=get_tp_group().device_group)
    return shards


def _unfuse_qkv(name: str, module: QKVParallelLinear, parameter: Tensor, fused: bool) -> Iterator[tuple[str, Tensor]]:
    sizes = [module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size]
    shards = [_gather(part, module.tp_size) for part in parameter.split(sizes)]
    replicas = module.num_kv_head_replicas  # ranks that hold the same key and value heads
    query, key, value = (torch.cat(shards[0]), torch.cat(shards[1][::replicas]), torch.cat(shards[2][::replicas]))
    prefix, leaf = name.rsplit("qkv_proj.", 1)
    if name.startswith("visual."):
        yield f"{prefix}qkv.{leaf}", torch.cat([query, key, value])
    elif fused:
        yield name, torch.cat([query, key, value])
    else:
        yield f"{prefix}q_proj.{leaf}", query
        yield f"{prefix}k_proj.{leaf}", key
        yield f"{prefix}v_proj.{leaf}", value


def _unfuse_gate_up(
    name: str, module: MergedColumnParallelLinear, parameter: Tensor, fused: bool
) -> Iterator[tuple[str, Tensor]]:
    gate, up = (torch.cat(_gather(part, module.tp_size)) for part in parameter.chunk(2))
    if fused:
        yield name, torch.cat([gate, up])
    else:
        yield name.replace("gate_up_proj", "gate_proj"), gate
        yield name.replace("gate_up_proj", "up_proj"), up


def _unfuse_experts(name: str, module: FusedMoE, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """[E, 2 I, H] and [E, H, I] as [E, H, 2 I] and [E, I, H]; ranks hold some experts, and of those some of I."""
    tp, ep = module.moe_tp_size, module.moe_ep_size
    prefix, leaf = name.rsplit(".", 1)
    kind, parts, dim = {"w13_weight": ("gate_up_proj", 2, 1), "w2_weight": ("down_proj", 1, 2)}[leaf]
    whole = []
    for part in parameter.chunk(parts, dim=dim):
        shards = _gather(part, tp * ep)
        whole.append(torch.cat([torch.cat(shards[start : start + tp], dim=dim) for start in range(0, tp * ep, tp)]))
    yield f"{prefix}.{kind}", torch.cat(whole, dim=dim).transpose(1, 2).contiguous()


# What SGLang calls the parts of a model whose checkpoint calls them otherwise, by class.
_QWEN3_VL = {"visual.": "model.visual.", "model.": "model.language_model."}
PREFIXES = {"Qwen3VLForConditionalGeneration": _QWEN3_VL, "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL}


def hf_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of ``model`` once, whole and under its checkpoint name; all tensor-parallel ranks call it.

    A tied ``lm_head`` is the embedding and is not repeated. Padding rows of the vocabulary are cut.
    """
    yield from _published(model, _unfused(model))


def _published(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """``tensors`` under their checkpoint names instead of SGLang's."""
    prefixes = PREFIXES.get(type(model).__name__, {})
    for name, tensor in tensors:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        yield name if prefix is None else prefixes[prefix] + name.removeprefix(prefix), tensor


def _is_fused(model: nn.Module) -> bool:
    """Whether the checkpoint keeps q, k, v and gate, up as one too."""
    return any(isinstance(module, Phi3ForCausalLM) for module in model.modules())


def _unfused(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same under SGLang's names."""
    modules, fused = dict(model.named_modules()), _is_fused(model)
    for name, parameter in model.named_parameters():
        module, tensor = modules[name.rpartition(".")[0]], parameter.detach()
        if isinstance(module, BaseLayerWithLoRA):  # holds its layer's parameters as its own
            module = module.base_layer
        is_weight = name.endswith(".weight")
        if isinstance(module, QKVParallelLinear):
            yield from _unfuse_qkv(name, module, tensor, fused)
        elif isinstance(module, MergedColumnParallelLinear):
            yield from _unfuse_gate_up(name, module, tensor, fused)
        elif isinstance(module, FusedMoE):
            yield from _unfuse_experts(name, module, tensor)
        elif isinstance(module, ColumnParallelLinear):
            yield name, torch.cat(_gather(tensor, module.tp_size))
        elif isinstance(module, RowParallelLinear) and is_weight:
            yield name, torch.cat(_gather(tensor, module.tp_size), dim=1)
        elif isinstance(module, VocabParallelEmbedding) and is_weight:
            yield name, torch.cat(_gather(tensor, module.tp_size))[: module.org_vocab_size]
        else:
            yield name, tensor


def adapter_tensors(manager: LoRAManager) -> Iterator[tuple[str, Tensor]]:
    """Yield the one adapter's tensors as layers compute with them, whole and named as in PEFT, zeros where it has none.

    All tensor-parallel ranks call it.
    """
    (uid,) = manager.loras
    manager.fetch_new_loras({uid})  # what SGLang does before the first request that uses it
    slot = manager.memory_pool.get_buffer_id(uid)
    fused = _is_fused(manager.base_model)
    layers = [item for layer in manager.lora_modules for item in layer.items()]
    tensors = (item for name, layer in layers for item in _adapter_of(name, layer, slot, fused))
    yield from _published(manager.base_model, tensors)


def _adapter_of(name: str, layer: BaseLayerWithLoRA, slot: int, fused: bool) -> Iterator[tuple[str, Tensor]]:
    module = layer.base_layer
    if isinstance(module, QKVParallelLinear):
        a, b = layer.A_buffer_qkv[slot], layer.B_buffer_qkv[slot]
        prefix, names = name.removesuffix("qkv_proj"), ("q_proj", "k_proj", "v_proj")
        yield from _unfuse_qkv(f"{name}.lora_B.weight", module, b, fused)
    elif isinstance(module, MergedColumnParallelLinear):
        a, b = layer.A_buffer[slot], layer.B_buffer[slot]
        prefix, names = name.removesuffix("gate_up_proj"), ("gate_proj", "up_proj")
        yield from _unfuse_gate_up(f"{name}.lora_B.weight", module, b, fused)
    else:
        a, b, prefix, names = layer.A_buffer[slot], layer.B_buffer[slot], name, ("",)
        row = isinstance(module, RowParallelLinear)
        a = torch.cat(_gather(a, module.tp_size), dim=1) if row else a
        yield f"{name}.lora_B.weight", b if row else torch.cat(_gather(b, module.tp_size))
    parts = a.chunk(len(names))
    if fused:  # one for all, repeated by SGLang
        prefix, names, parts = name, ("",), parts[:1]
    for projection, part in zip(names, parts, strict=True):
        yield f"{prefix}{projection}.lora_A.weight", part
