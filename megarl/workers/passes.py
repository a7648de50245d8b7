"""Passes of a rank's microbatches through a model, forward or with an optimizer step, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarl.models.common.interleaved import chunks_of
from megarl.parallel.context import collect
from megarl.parallel.pipeline import forward_backward
from megarl.workers.microbatch import MicroBatch

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import DistributedDataParallel  # isort: skip
from megatron.core.optimizer import MegatronOptimizer  # isort: skip
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip

Outputs = tuple[Tensor, Tensor, Any]  # loss, number of actions, what is returned for the microbatch
Forward = Callable[[nn.Module, MicroBatch], Tensor]  # of a kind of action
After = Callable[[MicroBatch, Tensor], Outputs]  # from the last stage's output on a microbatch


@dataclass
class Totals:
    """What a rank has to say about the actions it trained; sums are over actions."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)  # the same on every rank, of the last optimizer step
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    def add(self, outputs: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]) -> None:
        """Take in the (count, sums, maxima) of microbatches."""
        numbers = _read([value for _, *named in outputs for values in named for value in values.values()])
        for count, sums, maxima in outputs:
            self.count += count
            for name in sums:
                self.sums[name] = self.sums.get(name, 0.0) + next(numbers)
            for name in maxima:
                self.maxima[name] = max(self.maxima.get(name, 0.0), next(numbers))


def _read(scalars: list[Tensor]) -> Iterator[float]:
    """The numbers of ``scalars``, in one copy to the host."""
    return iter(torch.stack([scalar.double() for scalar in scalars]).tolist() if scalars else [])


@dataclass
class Trained:
    """A model, wrapped for data parallelism, with its optimizer and learning-rate schedule."""

    model: MegatronModule
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def begin(self) -> None:
        """Initialise the optimizer's state before its first step: a checkpoint of a model that waits needs one."""
        for part in self.optimizer.chained_optimizers:
            if part.optimizer is None or part.init_state_fn is None:  # none with optimizer_cpu_offload
                continue
            if part.config.use_precision_aware_optimizer:  # mcore's function leaves out an argument
                for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                    part.optimizer.initialize_state(parameter, store_param_remainders=False)
            else:
                part.init_state_fn(part.optimizer, part.config)
            for group in part.optimizer.param_groups:
                group.setdefault("step", 0)

    def update(self, microbatches: list[MicroBatch], forward: Forward, after: After) -> tuple[list[Any], float, float]:
        """An optimizer step on ``microbatches``; results by ``after``, the gradient's norm and the learning rate."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = run_schedule(self.ddp, microbatches, forward, self._with_own_weights(after), train=True)
        self.scheduler.step(increment=1)
        _, grad_norm, _ = self.optimizer.step()
        for chunk in self._overlapping(hooked=False):
            chunk.enable_forward_pre_hook()
        if not np.isfinite(grad_norm):
            rank = dist.get_rank()
            raise FloatingPointError(f"rank {rank}: the gradient norm is {grad_norm}; the step was not saved")
        return outputs, float(grad_norm), self.optimizer.param_groups[0]["lr"]

    def gather_parameters(self) -> None:
        """Complete what ``overlap_param_gather`` leaves to the next ``update``: others read the weights now.

        Every rank calls it. Until the next ``update`` forward passes look for no gather.
        """
        for chunk in self._overlapping(hooked=True):
            chunk.disable_forward_pre_hook(param_sync=True)

    def _overlapping(self, *, hooked: bool) -> list[DistributedDataParallel]:
        """Chunks with ``overlap_param_gather`` whose modules wait for their parameters in a forward pass, or do not."""
        return [c for c in self.ddp if c.use_forward_hook and bool(c.remove_forward_pre_hook_handles) == hooked]

    def _with_own_weights(self, after: After) -> After:
        """``after`` once all parameters are there: it reads some outside of a module's forward (output matrix)."""
        chunks = self._overlapping(hooked=True)

        def wait(m: MicroBatch, output: Tensor) -> Outputs:
            for chunk in chunks:
                for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)
            return after(m, output)

        return wait if chunks else after


def run_schedule(
    chunks: Sequence[nn.Module], microbatches: list[MicroBatch], forward: Forward, after: After, *, train: bool
) -> list[Any]:
    """Send ``microbatches`` through the pipeline; what ``after`` returns for each of them on the last stage."""

    def step(iterator: Iterator[MicroBatch], module: nn.Module) -> tuple[Tensor, Callable]:
        m = next(iterator)
        return forward(module, m), partial(after, m)

    return forward_backward(step, chunks, microbatches, train=train)


def forward_only(
    model: MegatronModule,
    microbatches: list[MicroBatch],
    forward: Forward,
    of: Callable[[MicroBatch, Tensor], Tensor],
) -> list[Tensor]:
    """``of`` the actions [N] of each microbatch on the last stage, without gradient; nothing elsewhere."""

    def after(m: MicroBatch, output: Tensor) -> Outputs:
        return output.new_zeros(()), torch.zeros((), dtype=torch.int, device=output.device), of(m, output)

    with torch.no_grad():
        return run_schedule(chunks_of(model), microbatches, forward, after, train=False)


def gather_context_parallel(microbatches: list[MicroBatch], outputs: list[Tensor]) -> list[np.ndarray] | None:
    """The ``outputs`` [N] of ``forward_only`` with those of other context-parallel ranks; None where others answer."""
    group = parallel_state.get_context_parallel_group()
    everything = [
        collect(output, m.places, m.num_actions, group)
        for m, output in zip(microbatches, outputs, strict=bool(outputs))
    ]
    return [output.cpu().numpy() for output in everything] if is_reporting_rank() and group.rank() == 0 else None


def is_reporting_rank() -> bool:
    """Whether this rank answers for its actions: of the ranks that have the same, one does."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
