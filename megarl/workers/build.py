"""From a configuration to a sharded model, its optimizer and its learning-rate schedule, on one rank."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megarl.checkpoint.adapters import load_peft
from megarl.checkpoint.huggingface import load_hf, read_config
from megarl.config import OptimizerConfig, RunConfig
from megarl.models.common import lora
from megarl.models.common.interleaved import chunks_of
from megarl.models.family import build_stage, family_of
from megarl.models.mapping import Mapping
from megarl.parallel import mcore_cpu
from megarl.utils.checks import check_passed_through
from megarl.workers.passes import Trained

mcore_cpu.install()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402


def build_model(config: RunConfig, hf_dir: str | Path, *, weights: bool = True) -> tuple[MegatronModule, list[Mapping]]:
    """This rank's part of the model that ``hf_dir`` describes, and its mapping table; every rank of the world calls it.

    ``weights=False`` leaves the random initial values, for a checkpoint that is loaded over them.
    """
    hf_config = read_config(hf_dir)
    model = build_stage(hf_config, config.model, config.parallel)
    if torch.cuda.is_available():
        model = model.cuda()
    mappings = family_of(hf_config).mappings(hf_config)
    if weights:
        load_hf(model, mappings, hf_dir)
    return model, mappings


def add_adapters(
    config: RunConfig, model: MegatronModule, mappings: list[Mapping], *, weights: bool = True
) -> list[Mapping]:
    """Freeze ``model`` and give it the adapters of ``model.lora``; their mappings, none without them.

    ``weights=False``: ``model.lora.path`` is not read, because a checkpoint will be loaded over it.
    """
    if not config.model.lora.rank:
        return []
    adapters = lora.attach(model, mappings, config.model.lora, chunks_of(model)[0].parts, seed=config.seed)
    if config.model.lora.path and weights:
        load_peft(model, adapters, config.model.lora.path, config.model.lora, config.model.path)
    return adapters


# fields of mcore's DistributedDataParallelConfig that ``parallel.ddp`` does not take, and why
_FSDP = "checkpoints and weight sync read the buffers of mcore's own data parallelism, not of Megatron FSDP"
_STALE = "weights are read outside forward passes (engines, checkpoints, the output matrix), when they may not be there"
_QUANTISED = "parameters have model.dtype"
_DDP_REFUSED = {
    "use_distributed_optimizer": "say it with parallel.use_distributed_optimizer",
    "grad_reduce_in_fp32": "gradients of microbatches are summed in float32, or small ones are lost",
    "average_in_collective": "losses are sums over tokens that the trainer divides by their number",
    "overlap_param_gather": _STALE,
    "align_param_gather": _STALE,
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
    "use_distributed_optimizer": "say it with parallel.use_distributed_optimizer",
    "overlap_param_gather": _STALE,
    "overlap_param_gather_with_optimizer_step": _STALE,
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


def build_trainable(config: RunConfig, model: MegatronModule, c: OptimizerConfig, num_updates: int) -> Trained:
    """Wrap the chunks of ``model`` for data parallelism and give it an optimizer; frozen parts stay out of both.

    ``num_updates`` is how long the learning rate decays.
    """
    model.freeze(config.model.freeze)
    bf16 = config.model.params_dtype == "bfloat16"
    distributed, given = config.parallel.use_distributed_optimizer, config.parallel.ddp
    _check("parallel.ddp", given, DistributedDataParallelConfig, _DDP_REFUSED)
    _check("optimizer.megatron", c.megatron, MegatronOptimizerConfig, _OPTIMIZER_REFUSED)
    if c.megatron.get("optimizer_cpu_offload") and not (bf16 and torch.cuda.is_available()):
        raise ValueError("optimizer.megatron.optimizer_cpu_offload=True needs a GPU and model.dtype=bfloat16")
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True, **given)
    ddp = []
    for number, chunk in enumerate(chunks_of(model)):
        ddp.append(DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0))
        chunk.config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:  # else the first of several microbatches would send what the others add to
        no_sync = [wrapped.no_sync for wrapped in ddp]
        chunks_of(model)[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
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
            **c.megatron,
        ),
        ddp,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=c.lr,
        min_lr=c.lr if c.lr_decay_style == "constant" else c.min_lr,
        lr_warmup_steps=c.lr_warmup_steps,
        lr_decay_steps=max(num_updates, c.lr_warmup_steps + 1),
        lr_decay_style=c.lr_decay_style,
        start_wd=c.weight_decay,
        end_wd=c.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Trained(model, ddp, optimizer, scheduler)
