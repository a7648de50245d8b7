"""An SGLang engine's live parameters under the names and in the shapes of the Hugging Face checkpoint.

SGLang fuses q, k, v and gate, up into one parameter and splits parameters over tensor-parallel ranks. Undoing both on
the engine's side shows what a weight update really wrote: SGLang's loaders skip names that they do not know in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
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


# What SGLang calls the parts of a model whose checkpoint calls them otherwise, by class.
_QWEN3_VL = {"visual.": "model.visual.", "model.": "model.language_model."}
PREFIXES = {"Qwen3VLForConditionalGeneration": _QWEN3_VL, "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL}


def hf_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of ``model`` once, whole and under its checkpoint name; all tensor-parallel ranks call it.

    A tied ``lm_head`` is the embedding and is not repeated. Padding rows of the vocabulary are cut.
    """
    prefixes = PREFIXES.get(type(model).__name__, {})
    for name, tensor in _unfused(model):
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        yield name if prefix is None else prefixes[prefix] + name.removeprefix(prefix), tensor


def _unfused(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same under SGLang's names."""
    modules = dict(model.named_modules())
    fused = any(isinstance(module, Phi3ForCausalLM) for module in modules.values())  # in its checkpoints too
    for name, parameter in model.named_parameters():
        module, tensor = modules[name.rpartition(".")[0]], parameter.detach()
        is_weight = name.endswith(".weight")
        if isinstance(module, QKVParallelLinear):
            yield from _unfuse_qkv(name, module, tensor, fused)
        elif isinstance(module, MergedColumnParallelLinear):
            yield from _unfuse_gate_up(name, module, tensor, fused)
        elif isinstance(module, ColumnParallelLinear):
            yield name, torch.cat(_gather(tensor, module.tp_size))
        elif isinstance(module, RowParallelLinear) and is_weight:
            yield name, torch.cat(_gather(tensor, module.tp_size), dim=1)
        elif isinstance(module, VocabParallelEmbedding) and is_weight:
            yield name, torch.cat(_gather(tensor, module.tp_size))[: module.org_vocab_size]
        else:
            yield name, tensor
