"""A few training steps of a tiny model on the ranks of the pool: what the checkpoint tests interrupt."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megarl.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megarl.utils.checksum import tensor_checksum
from tests.models.families import FAMILIES
from tests.models.parity import MICROBATCHES, packed
from tests.models.reference import Batch, Reference, trained
from tests.models.training import Trainable, token_loss, train


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
    return RunConfig(
        model=ModelConfig(path=str(directory), **model),
        parallel=parallel,
        optimizer=OptimizerConfig(
            lr=1e-2,
            min_lr=1e-3,
            lr_warmup_steps=2,
            lr_decay_style="linear",
            betas=(0.9, 0.95),
            eps=1e-4,
            weight_decay=0.01,
        ),
    )


def noise() -> float:
    """One draw from every generator of this rank."""
    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return random.random() + float(np.random.rand()) + float(torch.rand(())) + tracked


def step(trainable: Trainable, reference: Reference, *, noisy: bool = False) -> float:
    """One optimizer step on the whole batch; the mean loss, the same on every rank."""
    batches = packed(reference, MICROBATCHES, trainable.config.parallel)
    batches = batches[ps.get_data_parallel_rank() :: ps.get_data_parallel_world_size()]
    scale = torch.tensor(1.0 + 0.1 * noise() if noisy else 1.0)
    dist.broadcast(scale, src=0)  # ranks draw differently; they must train alike
    totals = torch.zeros(2)

    def loss(batch: Batch, hidden: torch.Tensor) -> tuple:
        value, count = token_loss(trainable.model, batch, hidden, temperature=1.0, entropy_coef=0.0)
        totals.add_(torch.stack([value.detach(), count.float()]))
        return value * scale, count

    train(trainable, batches, loss)
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
