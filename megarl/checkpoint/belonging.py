"""What the adapters of a checkpoint belong to: the layers that they are on, their scale, and the frozen weights.

The checkpoint holds the adapters' tensors alone. With another scale, on other layers of the same shapes or beside other
frozen weights the same tensors are another policy, so the manifest remembers all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarl.checkpoint.export import export_to_rank_zero
from megarl.checkpoint.huggingface import listed
from megarl.models.common.lora import HF_A, adapters_off, attachment
from megarl.utils.checksum import tensor_checksum

_digests: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()  # frozen weights do not change


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def frozen_digests(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of whole ``tensors`` and their names, by the dtype that they are rounded to: ``dtype`` and bfloat16.

    The second is what a run in float32 and one in bfloat16 on the same files have in common.
    """
    dtypes = {_name(kind): kind for kind in (dtype, torch.bfloat16)}
    lines: dict[str, list[str]] = {name: [] for name in dtypes}
    for key, tensor in tensors:
        for name, kind in dtypes.items():
            lines[name].append(f"{key} {tensor_checksum(tensor.to(kind))}")
    return {name: hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() for name, found in lines.items()}


def belonging(model: nn.Module) -> dict[str, Any]:
    """What the adapters of ``model``, an unwrapped stage, belong to; every rank of the world calls it.

    The first call reads all frozen weights once, as a weight sync does.
    """
    attached = attachment(model)
    if model not in _digests:
        dtype = next(model.parameters()).dtype
        with adapters_off(model):
            digests = [frozen_digests(export_to_rank_zero(model, attached.mappings), dtype)]
        dist.broadcast_object_list(digests, src=0)
        _digests[model] = digests[0]
    names = [name for mapping in attached.adapters for name in mapping.hf if name.endswith(HF_A)]
    return {
        "model.lora.rank": attached.lora.rank,
        "model.lora.alpha": float(attached.lora.alpha),
        "model.lora.use_rslora": attached.lora.use_rslora,
        "modules": sorted(name.removesuffix(HF_A) for name in names),
        "frozen": _digests[model],
    }


def misfits(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """How a checkpoint's ``belonging`` differs from that of the model that it is loaded into."""
    problems = [
        f"{key} is {saved.get(key)} in the checkpoint and {value} here"
        for key, value in ours.items()
        if key.startswith("model.lora.") and saved.get(key) != value
    ]
    theirs, modules = set(saved.get("modules", [])), set(ours["modules"])
    for only, where in ((theirs - modules, "in the checkpoint"), (modules - theirs, "here")):
        if only:
            problems.append(f"only {where} are adapters on {listed(sorted(only))}")
    return problems + other_weights(saved.get("frozen", {}), ours["frozen"])


def other_weights(saved: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What is wrong when the frozen weights that two ``frozen_digests`` describe are not the same."""
    kind = next(name for name in ours if name in saved or name == _name(torch.bfloat16))
    if saved.get(kind) == ours[kind]:
        return []
    return [f"the frozen weights ({kind}) have the hash {saved.get(kind)} in the checkpoint and {ours[kind]} here"]
