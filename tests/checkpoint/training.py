"""A few training steps of a tiny model on the ranks of the pool: what the checkpoint tests interrupt."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from megarl.checkpoint.huggingface import load_hf, read_config
from megarl.config import ModelConfig, ParallelConfig, RunConfig
from megarl.families import family_of
from megarl.kernels.logprob import linear_logprob
from megarl.models.common.interleaved import chunks_of
from megarl.models.mapping import Mapping
from megarl.models.stage import build_stage
from megarl.parallel import groups
from megarl.parallel.pipeline import forward_backward
from megarl.utils.checksum import tensor_checksum
from megarl.workers.build import add_adapters
from tests.models.families import FAMILIES
from tests.models.parity import MICROBATCHES, packed
from tests.models.reference import BANNED, Batch, Reference, trained


@dataclass
class Trainable:
    config: RunConfig
    model: MegatronModule
    mappings: list[Mapping]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def ddp(self) -> MegatronModule:
        """What a checkpoint is made of: wrapped, so that parameters still on their way are waited for."""
        return self.chunks[0] if len(self.chunks) == 1 else self.model


def tiny(name: str, directory: Path, dtype: torch.dtype = torch.float32, *, family: str = "qwen2_5_vl") -> Reference:
    """Write the tiny model ``name`` to ``directory``; its samples with weight one on every prediction."""
    case = FAMILIES[family]
    model = case.model(name).to(dtype)
    model.save_pretrained(directory)
    samples = case.samples(model, seed=0)
    return Reference(str(directory), samples, [torch.ones(len(trained(s))) for s in samples])


def run_config(directory: str | Path, layout: tuple[int, ...], **model: object) -> RunConfig:
    """layout: tensor and pipeline parallel size, then context, virtual pipeline and expert where they matter."""
    tp, pp, cp, vpp, ep = layout + (1, 1, 1, 0, 1)[len(layout) :]
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        sequence_parallel=tp > 1,
    )
    return RunConfig(model=ModelConfig(path=str(directory), **model), parallel=parallel)


def build_model(config: RunConfig, *, weights: bool = True, seed: int = 0) -> tuple[MegatronModule, list[Mapping]]:
    """Process groups and this rank's shard of the model; ``weights=False`` leaves random values."""
    groups.initialize(config.parallel, seed)
    hf = read_config(config.model.path)
    model, mappings = build_stage(hf, config.model, config.parallel), family_of(hf).mappings(hf)
    if weights or config.model.lora.rank:  # a checkpoint of adapters holds nothing else
        load_hf(model, mappings, config.model.path)
    add_adapters(config, model, mappings, weights=weights)
    return model, mappings


def build(config: RunConfig, *, weights: bool = True, seed: int = 0, overlap: bool = False) -> Trainable:
    model, mappings = build_model(config, weights=weights, seed=seed)
    model.freeze(config.model.freeze)
    bf16, sharded = config.model.dtype == "bfloat16", config.parallel.use_distributed_optimizer
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=sharded,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    chunks = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks_of(model)]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-3,
        adam_beta2=0.95,
        adam_eps=1e-4,
        weight_decay=0.01,
        clip_grad=1.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=sharded,
    )
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Trainable(config, model, mappings, chunks, optimizer, scheduler)


def noise() -> float:
    """One draw from every generator of this rank."""
    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return random.random() + float(np.random.rand()) + float(torch.rand(())) + tracked


def step(trainable: Trainable, reference: Reference, *, noisy: bool = False) -> float:
    """One optimizer step on the whole batch; the mean loss, the same on every rank."""
    model = trainable.model
    batches = packed(reference, MICROBATCHES, trainable.config.parallel)
    batches = batches[ps.get_data_parallel_rank() :: ps.get_data_parallel_world_size()]
    scale = torch.tensor(1.0 + 0.1 * noise() if noisy else 1.0)
    dist.broadcast(scale, src=0)  # ranks draw differently; they must train alike
    totals = torch.zeros(2)

    def loss(batch: Batch, hidden: torch.Tensor) -> tuple:
        rows, targets, weights = batch.local(ps.get_context_parallel_world_size(), ps.get_context_parallel_rank())
        logprobs, _, _ = linear_logprob(
            hidden[rows],
            model.output_weight(),
            targets,
            temperature=1.0,
            banned_ids=BANNED,
            vocab_size=model.vocab_size,
            tp_group=ps.get_tensor_model_parallel_group(),
        )
        value = (-logprobs * weights).sum()
        totals.add_(torch.stack([value.detach(), torch.tensor(float(len(rows)))]))
        return value * scale, torch.tensor(len(rows), dtype=torch.int), {}

    def forward(iterator, model):
        batch = next(iterator)
        return model(*batch.forward), partial(loss, batch)

    for chunk in trainable.chunks:
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    forward_backward(forward, trainable.chunks, batches, train=True)
    trainable.optimizer.step()
    trainable.scheduler.step(increment=1)
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


def fingerprint(trainable: Trainable) -> dict[str, str]:
    """Checksums of every parameter and optimizer tensor of this rank, and a draw from its generators."""
    tensors = dict(trainable.model.named_parameters())
    for i, optimizer in enumerate(trainable.optimizer.chained_optimizers):
        for j, state in enumerate(optimizer.optimizer.state.values()):
            tensors |= {f"{i}.{j}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
        steps = [group["step"] for group in optimizer.optimizer.param_groups]
        tensors[f"{i}.step"] = torch.tensor(steps)
        for k, group in enumerate(optimizer.optimizer.param_groups):
            tensors |= {f"{i}.{k}.main.{j}": parameter for j, parameter in enumerate(group["params"])}
    result = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    return result | {"noise": repr(noise()), "lr": repr(trainable.scheduler.num_steps)}
