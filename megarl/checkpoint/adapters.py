"""Adapters as PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

A tensor is named ``base_model.model.<module>.lora_A.weight``, where ``<module>`` is its name in the transformers model
in memory; inside megarl adapters have canonical names, as all tensors do. The two differ by what transformers itself
says: its model is built without weights and asked for its names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megarl.checkpoint.huggingface import (
    CheckpointError,
    HFReader,
    canonical_names,
    listed,
    parameters_of,
    read_config,
)
from megarl.config import PARTS, LoraConfig
from megarl.models.common.lora import HF_A, HF_B, WEIGHT, add_product
from megarl.models.mapping import Mapping
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def _module(name: str) -> str:
    return name.removesuffix(HF_A).removesuffix(HF_B)


@cache
def _spelling(hf_dir: str) -> dict[str, str]:
    """Canonical name of each module of ``hf_dir``'s model that has a weight -> its name in transformers' model."""
    config, canonical_name = read_config(hf_dir), canonical_names(Path(hf_dir))
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    names = [name for name, _ in model.named_parameters() if name.endswith(WEIGHT)]
    return {canonical_name(name).removesuffix(WEIGHT): name.removesuffix(WEIGHT) for name in names}


def peft_config(names: Iterable[str], lora: LoraConfig, base: str) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for tensors ``names``; ``base``: where the frozen weights are."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted({_module(name) for name in names}),
    }


def write_peft(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    lora: LoraConfig,
    hf_dir: str | Path,
    *,
    base: str | None = None,
) -> None:
    """Write the adapters ``tensors``, whole and canonically named, as a PEFT directory; one process calls it.

    ``hf_dir`` describes the frozen model and has its weights, unless they are at ``base``.
    """
    spelling = _spelling(str(hf_dir))
    named = {
        spelling[_module(name)] + name.removeprefix(_module(name)): tensor.detach().cpu().contiguous()
        for name, tensor in tensors
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: tensor for name, tensor in named.items()}, directory / WEIGHTS_FILE)
    config = peft_config(named, lora, base or str(hf_dir))
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def read_peft(directory: str | Path, hf_dir: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the canonically named tensors of a PEFT directory; ``CheckpointError`` if it is none.

    ``hf_dir`` holds the model that they adapt.
    """
    directory, canonical_name = Path(directory), canonical_names(Path(hf_dir))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: not a PEFT directory: it has no {file}")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        stored = load_file(directory / WEIGHTS_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: {error}") from error
    return config, {canonical_name(name.removeprefix(PREFIX)): tensor for name, tensor in stored.items()}


def _check_config(directory: str | Path, config: dict[str, Any], lora: LoraConfig) -> None:
    """Raise unless the adapters of ``directory`` are what ``model.lora`` describes."""
    expected = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora}
    expected |= {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    wrong = [f"{key}={config[key]} (not {value})" for key, value in expected.items() if config.get(key, value) != value]
    if wrong:
        raise CheckpointError(f"{directory}/{CONFIG_FILE} does not fit model.lora: {listed(wrong)}")


@torch.no_grad()
def load_peft(
    model: nn.Module, adapters: list[Mapping], directory: str | Path, lora: LoraConfig, hf_dir: str | Path
) -> None:
    """Fill the adapters of ``model`` from a PEFT directory; every rank calls it. ``CheckpointError`` says what differs.

    ``adapters``: their mappings; ``hf_dir``: of the frozen model. Before an optimizer is built, or call its
    ``reload_model_params()`` afterwards.
    """
    config, tensors = read_peft(directory, hf_dir)
    _check_config(directory, config, lora)
    expected = {name for mapping in adapters for name in mapping.hf}
    missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    problems = [f"missing keys: {listed(missing)}"] if missing else []
    problems += [f"unknown keys: {listed(unknown)}"] if unknown else []
    if problems:
        raise CheckpointError(f"{directory} does not fit model.lora: {'; '.join(problems)}")
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    local = parameters_of(model, model.global_name)
    for mapping in adapters:
        for parameter in local.get(mapping.megatron, []):
            shard = mapping.split(mapping.to_megatron({name: tensors[name] for name in mapping.hf}), size)[rank]
            if shard.shape != parameter.shape:
                shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in mapping.hf)
                raise CheckpointError(f"{directory}: {shapes} do not fit {mapping.megatron} {list(parameter.shape)}")
            parameter.copy_(shard)


def described(config: dict[str, Any], tensors: dict[str, Tensor], parts: Iterable[str]) -> LoraConfig:
    """``model.lora`` for a model that has the adapters of a PEFT directory; ``parts``: all that it consists of."""
    return LoraConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        use_rslora=config.get("use_rslora", False),
        target_modules=sorted({_module(name) for name in tensors}),
        parts=list(parts),
    )


def merged_tensors(
    reader: HFReader, directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``reader``, the adapters of the PEFT ``directory`` added; one at a time.

    ``CheckpointError`` before the first when an adapter has no matrix, or there is none.
    """
    lora = described(config, tensors, PARTS)
    _check_config(directory, config, lora)
    modules = set(lora.target_modules)
    lost = sorted(module for module in modules if module + WEIGHT not in reader)
    lost += sorted(module for module in modules if {module + HF_A, module + HF_B} - set(tensors))
    if lost or not modules:
        where = f"{directory}: adapters without a matrix in {reader.directory}"
        raise CheckpointError(f"{where}: {listed(lost) or 'none at all'}")

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in reader.keys():  # noqa: SIM118
            module, tensor = name.removesuffix(WEIGHT), reader[name]
            if name == module + WEIGHT and module in modules:
                tensor = add_product(tensor, tensors[module + HF_A], tensors[module + HF_B], lora.scale)
            yield name, tensor

    return merged()
