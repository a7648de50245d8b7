"""One rank of the trainer in a step: a shard of the policy (and of the reference), scored and trained.

A worker executes streams. It knows no prompt, no reward and no algorithm beyond the names in its configuration; what an
action is, only its kind of action knows. Every public method is called on every rank with the arguments of the rank's
data-parallel group.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megarl.algorithms.corrections import correction_weights, mismatch_metrics
from megarl.algorithms.penalties import penalties
from megarl.algorithms.policy_losses import Actions, policy_loss
from megarl.algorithms.selections import SELECTIONS
from megarl.config import RunConfig
from megarl.models.common.interleaved import chunks_of
from megarl.models.common.lora import adapters_off
from megarl.parallel.context import sum_over
from megarl.types import Estimates, PackedBatch
from megarl.workers.critic import action_values, value_losses
from megarl.workers.exporting import ExportingRank
from megarl.workers.microbatch import MicroBatch
from megarl.workers.passes import (
    Outputs,
    Totals,
    forward_only,
    gather_context_parallel,
    is_reporting_rank,
    run_schedule,
)
from megarl.workers.saving import SavingRank
from megarl.workers.selection import mark_selected
from megarl.workers.utilisation import device_metrics, microbatch_flops

from megatron.core import parallel_state  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip


class PolicyWorker(ExportingRank, SavingRank):
    """A step: ``load`` it, ``score`` it, ``train`` on it. ``estimate`` comes before where advantages need models."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        super().__init__(config, rank)
        self.microbatches: list[list[MicroBatch]] = []  # [optimizer step][microbatch]
        self.run_step: int | None = None  # that they belong to, from 0

    def load(self, minibatches: list[list[PackedBatch]], step: int | None = None) -> None:
        """Take this rank's bins of a step, ``[optimizer step][microbatch]``, and begin to decode its share of images.

        ``step``: of the run, from 0, where the loss may ask for it.
        """
        with self.timer("load"):
            self.microbatches = self.kind.place(minibatches, step or 0)
        self.run_step = step

    def _unload(self) -> None:
        self.microbatches = []
        self.kind.clear()

    def estimate(self, batches: list[PackedBatch]) -> list[Estimates] | None:
        """What advantages are made of besides rewards, for each bin; None where it is not computed.

        Decoded images stay for ``load``, which shows them again.
        """
        self.load([batches])
        (microbatches,), self.microbatches = self.microbatches, []
        algorithm, streams = self.config.algorithm, {}
        if self.config.has_critic:
            with self.timer("values"):
                streams["values"] = gather_context_parallel(microbatches, self._values(microbatches))
        if algorithm.kl_in_reward:
            self.offload.restore("parameters")
            if not algorithm.bypass_old_logprobs:
                with self.timer("old_log_prob"):
                    outputs = self._logprobs(microbatches, self.model)
                    streams["old_logprobs"] = gather_context_parallel(microbatches, outputs)
            with self.timer("ref"):
                streams["ref_logprobs"] = gather_context_parallel(microbatches, self._ref_logprobs(microbatches))
        if any(stream is None for stream in streams.values()):
            return None
        return [Estimates(**dict(zip(streams, bin, strict=True))) for bin in zip(*streams.values(), strict=True)]

    def score(self) -> None:
        """Keep ``old_logprobs``, ``ref_logprobs`` and ``selected`` beside the actions of the step.

        With a single optimizer step the old policy is the trained one, so its log-probs come with the training pass
        unless a selection needs them before. What ``estimate`` made came with the batches and is not made again.
        """
        self.offload.restore("parameters")
        flat, algorithm = [m for minibatch in self.microbatches for m in minibatch], self.config.algorithm
        select = SELECTIONS.get(algorithm.policy_loss)
        if algorithm.bypass_old_logprobs:
            for microbatch in flat:
                microbatch.old_logprobs = microbatch.rollout_logprobs
        elif not algorithm.kl_in_reward and (len(self.microbatches) * algorithm.num_epochs > 1 or select is not None):
            with self.timer("old_log_prob"):
                _set(flat, "old_logprobs", self._logprobs(flat, self.model))
        if select is not None and parallel_state.is_pipeline_last_stage():
            mark_selected(flat, select, algorithm)
        if algorithm.kl_coef > 0 and not algorithm.kl_in_reward:
            with self.timer("ref"):
                _set(flat, "ref_logprobs", self._ref_logprobs(flat))

    def train(self) -> Totals | None:
        """Run the step's optimizer updates; what the rank counted, or None where the loss is not computed."""
        totals, frozen = Totals(values={"actor/grad_norm": 0.0, "actor/lr": 0.0}), False
        if self.critic is not None:
            frozen = self.critic.is_warming_up
            with self.timer("update_critic"):
                self.critic.train(self.microbatches, totals)
        self.offload.restore("parameters", "gradients", "optimizer")
        with self.timer("update_actor"):
            for _ in range(self.config.algorithm.num_epochs):
                for minibatch in self.microbatches:
                    (self._evaluate if frozen else self._update)(minibatch, totals)
            self.trained.gather_parameters()
        if self.device.type == "cuda":
            totals.values |= device_metrics(0.0 if frozen else self._flops(), self.seconds["update_actor"])
        self._unload()
        for offload in self._offloads():
            if offload.restored:
                self.seconds["restore"] += offload.seconds
                totals.maxima["perf/restored_gb"] = totals.maxima.get("perf/restored_gb", 0.0) + offload.restored / 1e9
                offload.seconds, offload.restored = 0.0, 0
        totals.seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return totals if is_reporting_rank() else None

    def _flops(self) -> float:
        """Of the step's optimizer updates, on this rank."""
        chunks, cp_size = chunks_of(self.model), self.config.parallel.context_parallel_size
        flat = [m for minibatch in self.microbatches for m in minibatch]
        once = sum(microbatch_flops(chunks, m, cp_size=cp_size) for m in flat)
        return once * self.config.algorithm.num_epochs

    def logprobs(self, batches: list[PackedBatch], temperature: float, ban: bool) -> list[np.ndarray] | None:
        """Log-probs [N] of the actions of each bin, or None where they are not computed; ``ban`` as in sampling."""
        self.offload.restore("parameters")
        self.load([batches])
        (microbatches,) = self.microbatches
        outputs = self._logprobs(microbatches, self.model, temperature, ban)
        logprobs = gather_context_parallel(microbatches, outputs)
        self._unload()
        return logprobs

    def validate(self, batches: list[PackedBatch]) -> Totals | None:
        """The loss on ``batches`` without training on them."""
        self.offload.restore("parameters")
        self.load([batches])
        totals = Totals()
        self._evaluate(self.microbatches[0], totals)
        self._unload()
        return totals if is_reporting_rank() else None

    def sync_reference(self) -> None:
        """Move the reference by ``algorithm.reference_sync_mix`` of its way to the policy."""
        self.offload.restore("parameters", "reference")
        self.moving_reference.mix(self.model, self.config.algorithm.reference_sync_mix)

    def _update(self, minibatch: list[MicroBatch], totals: Totals) -> None:
        outputs, grad_norm, lr = self.trained.update(minibatch, self.kind.forward, self._loss)
        totals.add(outputs)
        totals.values |= {"actor/grad_norm": grad_norm, "actor/lr": lr}
        if self.ema is not None:
            self.trained.gather_parameters()
            self.ema.update()

    def _evaluate(self, minibatch: list[MicroBatch], totals: Totals) -> None:
        """What ``_update`` would log, and no update."""
        with torch.no_grad():
            totals.add(run_schedule(chunks_of(self.model), minibatch, self.kind.forward, self._loss, train=False))

    def _logprobs(
        self,
        microbatches: list[MicroBatch],
        model: MegatronModule,
        temperature: float | None = None,
        ban: bool = True,
    ) -> list[Tensor]:
        """Log-probs [N] of each microbatch on the last stage, nothing elsewhere; ``temperature`` None: of sampling."""
        if temperature is None:
            temperature = self.config.rollout.temperature

        def logprobs(m: MicroBatch, output: Tensor) -> Tensor:
            return self.kind.likelihood(model, m, output, temperature=temperature, ban=ban).logprobs

        return forward_only(model, microbatches, self.kind.forward, logprobs)

    def _ref_logprobs(self, microbatches: list[MicroBatch]) -> list[Tensor]:
        self.offload.restore("reference")
        with adapters_off(self.model):
            return self._logprobs(microbatches, self.model if self.adapters else self.reference)

    def _values(self, microbatches: list[MicroBatch]) -> list[Tensor]:
        if self.critic is not None:
            return self.critic.values(microbatches)
        self.offload.restore("parameters")
        return forward_only(self.model, microbatches, self.kind.forward, partial(action_values, self.model))

    def _loss(self, m: MicroBatch, output: Tensor) -> Outputs:
        """The sum of the weighted losses of the actions, their number, and sums for the log."""
        config = self.config.algorithm
        supervised = config.policy_loss == "sft"
        temperature = 1.0 if supervised else self.config.rollout.temperature
        found = self.kind.likelihood(self.model, m, output, temperature=temperature, ban=not supervised)
        logprobs = found.logprobs
        actions = Actions(
            logprobs=logprobs,
            entropy=found.entropy,
            old_logprobs=logprobs.detach() if m.old_logprobs is None else m.old_logprobs,
            ref_logprobs=m.ref_logprobs,
            rollout_logprobs=m.rollout_logprobs,
            advantages=m.advantages,
            loss_weights=m.loss_weights,
            sequence_ids=m.sequence_ids,
            num_sequences=m.num_sequences,
            sum_over_ranks=partial(sum_over, group=parallel_state.get_context_parallel_group()),
            selected=m.selected,
            uniform=m.uniform,
            expert_mask=None if config.expert_strategy == "none" else m.expert_mask,
            step=self.run_step,
        )
        loss, metrics = policy_loss(actions, config)
        if supervised:
            metrics |= {
                "train/token_loss": -logprobs.detach(),
                "train/token_accuracy": found.likeliest.to(logprobs.dtype),
            }
        else:
            weights, correction_metrics = correction_weights(actions, config)
            loss, metrics = loss * weights, metrics | correction_metrics | mismatch_metrics(actions, config)
        penalty, penalty_metrics = penalties(actions, config)
        metrics |= penalty_metrics | {"actor/pg_loss": loss.detach() * m.loss_weights}
        total = ((loss + penalty) * m.loss_weights).sum()
        if self.config.has_critic and self.config.critic.shared_trunk:
            errors, value_metrics = value_losses(self.model, m, output, self.config.critic.clip)
            total, metrics = total + self.config.critic.coef * errors.sum(), metrics | value_metrics
        sums = {name: value.sum() for name, value in metrics.items()}
        apart = ("training/rollout_probs_diff", "training/rollout_logprobs_diff")
        largest = {f"{name}_max": metrics.get(f"{name}_mean") for name in apart}
        maxima = {name: value.max() for name, value in largest.items() if value is not None and len(value)}
        count = torch.full((), len(m), dtype=torch.int, device=self.device)
        return total, count, (len(m), sums, maxima)


def _set(microbatches: list[MicroBatch], name: str, outputs: list[Tensor]) -> None:
    """Keep ``outputs`` beside the actions; the last stage has some, the others have none."""
    for microbatch, output in zip(microbatches, outputs, strict=bool(outputs)):
        setattr(microbatch, name, output)
