"""From a configuration to a sharded model, its optimizer and its learning-rate schedule, on one rank."""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.checkpoint.adapters import load_peft
from megarl.checkpoint.huggingface import load_hf, read_config
from megarl.config import OptimizerConfig, RunConfig
from megarl.families import family_of
from megarl.models.common import lora
from megarl.models.common.interleaved import chunks_of
from megarl.models.mapping import Mapping
from megarl.models.stage import build_stage
from megarl.parallel import mcore_cpu
from megarl.workers.megatron_options import ddp_options, optimizer_options
from megarl.workers.passes import Trained

mcore_cpu.install()

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
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


def build_trainable(config: RunConfig, model: MegatronModule, c: OptimizerConfig, num_updates: int) -> Trained:
    """Wrap the chunks of ``model`` for data parallelism and give it an optimizer; frozen parts stay out of both.

    ``num_updates`` is how long the learning rate decays.
    """
    model.freeze(config.model.freeze)
    ddp_config = ddp_options(config)
    ddp = []
    for number, chunk in enumerate(chunks_of(model)):
        ddp.append(DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0))
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if ddp_config.overlap_param_gather:  # the weights are there until the first update
            ddp[-1].disable_forward_pre_hook(param_sync=False)
    if ddp_config.overlap_grad_reduce:  # else the first of several microbatches would send what the others add to
        no_sync = [wrapped.no_sync for wrapped in ddp]
        chunks_of(model)[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer = get_megatron_optimizer(optimizer_options(config, c), ddp)
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
