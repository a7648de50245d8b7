"""How tests train a model: with production's model, wrapping, optimizer and schedule, on batches of a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarl.config import RunConfig
from megarl.kernels.logprob import linear_logprob
from megarl.models.mapping import Mapping
from megarl.parallel import groups
from megarl.parallel.pipeline import forward_backward
from megarl.workers.build import add_adapters, build_model, build_trainable
from tests.models.reference import BANNED, ENTROPY_COEF, TEMPERATURE, Batch

from megatron.core import parallel_state as ps  # isort: skip
from megatron.core.distributed import DistributedDataParallel  # isort: skip
from megatron.core.optimizer import MegatronOptimizer  # isort: skip
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip

NUM_UPDATES = 10  # that the learning rate decays over


@dataclass
class Trainable:
    config: RunConfig
    model: MegatronModule
    mappings: list[Mapping]
    adapters: list[Mapping]  # of model.lora
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def build_shard(
    config: RunConfig, *, weights: bool = True, seed: int = 0
) -> tuple[MegatronModule, list[Mapping], list[Mapping]]:
    """Process groups and this rank's part of the model, with the mappings of its weights and of its adapters.

    ``weights=False`` leaves random values, but not under adapters: a checkpoint of them holds nothing else.
    """
    groups.initialize(config.parallel, seed)
    model, mappings = build_model(config, config.model.path, weights=weights or config.model.lora.rank > 0)
    return model, mappings, add_adapters(config, model, mappings, weights=weights)


def build(config: RunConfig, *, weights: bool = True, seed: int = 0) -> Trainable:
    """``build_shard`` and what trains it."""
    model, mappings, adapters = build_shard(config, weights=weights, seed=seed)
    trained = build_trainable(config, model, config.optimizer, NUM_UPDATES)
    return Trainable(config, model, mappings, adapters, trained.ddp, trained.optimizer, trained.scheduler)


def token_loss(
    model: MegatronModule,
    batch: Batch,
    hidden: Tensor,
    *,
    temperature: float = TEMPERATURE,
    entropy_coef: float = ENTROPY_COEF,
) -> tuple[Tensor, Tensor]:
    """``reference.loss_of`` the predictions on this context-parallel rank, and their number."""
    rows, targets, weights = batch.local(ps.get_context_parallel_world_size(), ps.get_context_parallel_rank())
    logprobs, entropy, _ = linear_logprob(
        hidden[rows],
        model.output_weight(),
        targets,
        temperature=temperature,
        banned_ids=BANNED,
        vocab_size=model.vocab_size,
        tp_group=ps.get_tensor_model_parallel_group(),
        chunk_size=7,
    )
    return (weights * (-logprobs - entropy_coef * entropy)).sum(), torch.tensor(len(rows), dtype=torch.int)


def run(
    chunks: list[torch.nn.Module],
    batches: list[Batch],
    loss: Callable[[Batch, Tensor], tuple[Tensor, Tensor]],
    **options: bool,
) -> None:
    """Send ``batches`` through ``chunks``, with the options of ``forward_backward``; ``loss`` gets hidden states."""

    def after(batch: Batch, hidden: Tensor) -> tuple:
        return *loss(batch, hidden), {}

    def forward(iterator: Any, chunk: torch.nn.Module) -> tuple:
        batch = next(iterator)
        return chunk(*batch.forward), partial(after, batch)

    forward_backward(forward, chunks, batches, **options)


def train(
    t: Trainable, batches: list[Batch], loss: Callable[[Batch, Tensor], tuple[Tensor, Tensor]], **options: bool
) -> None:
    """The gradients of ``batches``, in ``main_grad``; the step is the caller's."""
    for chunk in t.ddp:
        chunk.zero_grad_buffer()
    t.optimizer.zero_grad()
    run(t.ddp, batches, loss, train=True, **options)
