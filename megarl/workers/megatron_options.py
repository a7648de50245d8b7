"""``parallel.ddp`` and ``optimizer.megatron``: what of them reaches mcore's configurations, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import Any

import torch

from megarl.config import OptimizerConfig, RunConfig
from megarl.parallel import mcore_cpu
from megarl.utils.checks import check_choice, check_passed_through

mcore_cpu.install()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # noqa: E402

# fields of mcore's DistributedDataParallelConfig that ``parallel.ddp`` does not take, and why
_FSDP = "checkpoints and weight sync read the buffers of mcore's own data parallelism, not of Megatron FSDP"
_QUANTISED = "parameters have model.dtype"
_DDP_REFUSED = {
    "use_distributed_optimizer": "say it with parallel.use_distributed_optimizer",
    "grad_reduce_in_fp32": "gradients of microbatches are summed in float32, or small ones are lost",
    "average_in_collective": "losses are sums over tokens that the trainer divides by their number",
    "align_param_gather": "each stage gathers when its own forward pass needs the weights",
    "num_distributed_optimizer_instances": "the process groups are made for one",
    "delay_wgrad_compute": "weight gradients are there when the backward pass is",
    "fp8_param_gather": _QUANTISED,
    "reuse_grad_buf_for_mxfp8_param_ag": _QUANTISED,
    "keep_fp8_transpose_cache": _QUANTISED,
    "use_megatron_fsdp": _FSDP,
    "use_custom_fsdp": _FSDP,
    "data_parallel_sharding_strategy": _FSDP,
    "outer_dp_sharding_strategy": _FSDP,
    "gradient_reduce_div_fusion": _FSDP,
    "suggested_communication_unit_size": _FSDP,
    "preserve_fp32_weights": _FSDP,
    "nccl_ub": _FSDP,
    "fsdp_double_buffer": _FSDP,
    "fsdp_manual_registration": _FSDP,
    "disable_symmetric_registration": _FSDP,
}

# the same of mcore's OptimizerConfig and ``optimizer.megatron``
_ADAM = "the optimizer is Adam"
_SCALED = "losses are not scaled: parameters are float32 or bfloat16"
_ONE_RATE = "all parameters have one learning rate"
_OPTIMIZER_REFUSED = {
    "lr": "say it with optimizer.lr",
    "min_lr": "say it with optimizer.min_lr",
    "weight_decay": "say it with optimizer.weight_decay",
    "clip_grad": "say it with optimizer.clip_grad",
    "adam_beta1": "say it with optimizer.betas",
    "adam_beta2": "say it with optimizer.betas",
    "adam_eps": "say it with optimizer.eps",
    "bf16": "say it with model.dtype",
    "fp16": "say it with model.dtype",
    "params_dtype": "say it with model.dtype",
    "store_param_remainders": "checkpoints hold main parameters whole",
    "main_grads_dtype": "gradients are summed in float32",
    "use_distributed_optimizer": "say it with parallel.use_distributed_optimizer",
    "overlap_param_gather": "say it with parallel.ddp.overlap_param_gather",
    "overlap_param_gather_with_optimizer_step": "mcore has it for interleaved pipelines that align their gathers",
    "fp8_recipe": _QUANTISED,
    "reuse_grad_buf_for_mxfp8_param_ag": _QUANTISED,
    "optimizer": _ADAM,
    "sgd_momentum": _ADAM,
    **{field.name: _ADAM for field in fields(MegatronOptimizerConfig) if field.name.startswith("muon_")},
    "decoupled_lr": _ONE_RATE,
    "decoupled_min_lr": _ONE_RATE,
    "loss_scale": _SCALED,
    "initial_loss_scale": _SCALED,
    "min_loss_scale": _SCALED,
    "loss_scale_window": _SCALED,
    "hysteresis": _SCALED,
    "timers": "the trainer has its own",
}


def _check(key: str, given: dict[str, Any], upstream: type, refused: dict[str, str]) -> None:
    check_passed_through(key, given, [field.name for field in fields(upstream) if field.init], refused)


_DTYPES = ("float32", "bfloat16", "float16", "uint8")


def ddp_options(config: RunConfig) -> DistributedDataParallelConfig:
    """``parallel.ddp`` and what the trainer decides; ``ValueError`` that names the key."""
    given, distributed = config.parallel.ddp, config.parallel.use_distributed_optimizer
    _check("parallel.ddp", given, DistributedDataParallelConfig, _DDP_REFUSED)
    if given.get("overlap_param_gather") and not (distributed and given.get("overlap_grad_reduce")):
        raise ValueError(
            "parallel.ddp.overlap_param_gather=True needs parallel.ddp.overlap_grad_reduce=True and "
            "parallel.use_distributed_optimizer=True"
        )
    return DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True, **given)


def optimizer_options(config: RunConfig, c: OptimizerConfig) -> MegatronOptimizerConfig:
    """``c`` (the policy's or the critic's optimizer) with ``optimizer.megatron``; ``ValueError`` that names the key."""
    key, bf16 = "optimizer.megatron", config.model.params_dtype == "bfloat16"
    _check(key, c.megatron, MegatronOptimizerConfig, _OPTIMIZER_REFUSED)
    given = {
        name: _dtype(f"{key}.{name}", value) if name.endswith("_dtype") else value for name, value in c.megatron.items()
    }
    distributed = config.parallel.use_distributed_optimizer
    offload, aware = "optimizer_cpu_offload", "use_precision_aware_optimizer"
    if given.get(offload):
        given.setdefault(aware, True)  # whose code mcore's offloaded optimizer shares
        given.setdefault("optimizer_offload_fraction", 1.0)  # mcore's default offloads nothing
        if not (bf16 and given[aware]):
            raise ValueError(f"{key}.{offload}=True needs model.dtype=bfloat16 and {key}.{aware}=True")
    if given.get(aware):
        if not distributed:
            raise ValueError(f"{key}.{aware}=True needs parallel.use_distributed_optimizer=True")
        if importlib.util.find_spec("transformer_engine") is None:
            raise ValueError(f"{key}.{aware}=True needs Transformer Engine")
    elif narrow := [name for name in given if name.endswith("_dtype") and given[name] != torch.float32]:
        raise ValueError(f"{key}.{narrow[0]} needs {key}.{aware}=True")
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=c.lr,
        min_lr=c.min_lr,
        adam_beta1=c.betas[0],
        adam_beta2=c.betas[1],
        adam_eps=c.eps,
        weight_decay=c.weight_decay,
        clip_grad=c.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
        overlap_param_gather=config.parallel.ddp.get("overlap_param_gather", False),
        store_param_remainders=False,
        **given,
    )


def _dtype(key: str, name: Any) -> torch.dtype:
    """The dtype that a configuration calls ``name``."""
    check_choice(key, name, _DTYPES)
    return getattr(torch, name)
