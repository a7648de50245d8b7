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
from megarl.models.common.lora import HF_A, HF_B, WEIGHT, add_product, projections
from megarl.models.mapping import Mapping
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# what PEFT takes where adapter_config.json says nothing
_DEFAULTS = {"peft_type": None, "r": 8, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True}
# init_lora_weights that only choose the first A and B; the others (pissa, olora, corda, loftq, lora_ga) take B A out of
# the model's weights, again whenever PEFT loads the adapters
_BASE_STAYS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
# says where adapters are, which the tensors do too, how they were trained, or by what
_DESCRIPTIVE = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("peft_version", "megatron_config", "megatron_core", "runtime_config"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
}
_UNSET = (None, False, "none", {}, [])


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


def read_peft_config(directory: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory, with PEFT's defaults; ``CheckpointError`` without one."""
    directory = Path(directory)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: not a PEFT directory: it has no {file}")
    try:
        return _DEFAULTS | json.loads((directory / CONFIG_FILE).read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{directory}/{CONFIG_FILE}: {error}") from error


def read_peft(directory: str | Path, hf_dir: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the canonically named tensors of a PEFT directory; ``CheckpointError`` if it is none.

    ``hf_dir`` holds the model that they adapt.
    """
    directory, canonical_name = Path(directory), canonical_names(Path(hf_dir))
    config = read_peft_config(directory)
    try:
        stored = load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    return config, {canonical_name(name.removeprefix(PREFIX)): tensor for name, tensor in stored.items()}


def check_peft(directory: str | Path, config: dict[str, Any], lora: LoraConfig) -> None:
    """Raise unless the adapters of a PEFT directory are those that ``model.lora`` describes, B A beside W and no more.

    ``config`` is its ``adapter_config.json``. What it holds besides ``_DESCRIPTIVE`` must be unset, so that a field of
    a PEFT to come is refused as well.
    """
    file = f"{directory}/{CONFIG_FILE}"
    expected = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora}
    if config["peft_type"] == "LORA" and str(config["init_lora_weights"]).lower() not in _BASE_STAYS:
        raise CheckpointError(
            f"{file}: init_lora_weights={config['init_lora_weights']} is not known to leave the model's weights as "
            "they are: have PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*expected, "init_lora_weights", *_DESCRIPTIVE}
    foreign = [f"{key}={value}" for key, value in config.items() if key not in known and value not in _UNSET]
    if foreign:
        raise CheckpointError(f"{file}: adapters are read without {listed(foreign)}")
    wrong = [f"{key}={config[key]} (not {value})" for key, value in expected.items() if config[key] != value]
    if wrong:
        raise CheckpointError(f"{file} does not fit model.lora: {listed(wrong)}")


@torch.no_grad()
def load_peft(
    model: nn.Module, adapters: list[Mapping], directory: str | Path, lora: LoraConfig, hf_dir: str | Path
) -> None:
    """Fill the adapters of ``model`` from a PEFT directory; every rank calls it. ``CheckpointError`` says what differs.

    ``adapters``: their mappings; ``hf_dir``: of the frozen model. Before an optimizer is built, or call its
    ``reload_model_params()`` afterwards.
    """
    config, tensors = read_peft(directory, hf_dir)
    check_peft(directory, config, lora)
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
    reader: HFReader,
    mappings: list[Mapping],
    directory: str | Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``reader``, the adapters of the PEFT ``directory`` added; one at a time.

    ``mappings`` are the model's. ``CheckpointError`` before the first when an adapter is on no linear layer, as those
    of embeddings and output heads are, or there is none.
    """
    lora = described(config, tensors, PARTS)
    check_peft(directory, config, lora)
    modules = set(lora.target_modules)
    halves = {module for module in modules if {module + HF_A, module + HF_B} - set(tensors)}
    lost = sorted(halves | {module for module in modules if module + WEIGHT not in reader})
    if lost or not modules:
        where = f"{directory}: adapters without a matrix in {reader.directory}"
        raise CheckpointError(f"{where}: {listed(lost) or 'none at all'}")
    unfit = sorted(modules - {name for mapping in mappings for name in projections(mapping)})
    if unfit:
        raise CheckpointError(f"{directory}: adapters on what is no linear layer of the model's parts: {listed(unfit)}")

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in reader.keys():  # noqa: SIM118
            module, tensor = name.removesuffix(WEIGHT), reader[name]
            if name == module + WEIGHT and module in modules:
                tensor = add_product(tensor, tensors[module + HF_A], tensors[module + HF_B], lora.scale)
            yield name, tensor

    return merged()
