"""A critic: it predicts what a policy will earn from each state on, and learns it from what was earned.

The value of an action is that of the state before it: the head reads the hidden state whose next token is the action.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megarl.algorithms.policy_losses import Metrics, value_loss
from megarl.config import RunConfig
from megarl.models.common.interleaved import chunks_of
from megarl.models.common.value_head import ValueHead
from megarl.workers.action import ActionKind
from megarl.workers.build import add_adapters, build_model, build_trainable
from megarl.workers.microbatch import MicroBatch
from megarl.workers.offload import Offload
from megarl.workers.passes import Outputs, Totals, forward_only

from megatron.core.transformer.module import MegatronModule  # isort: skip


def add_value_head(model: MegatronModule) -> None:
    """Give the last stage of ``model`` a head; called before an optimizer is built."""
    last = chunks_of(model)[-1]
    if last.post_process:
        last.value_head = ValueHead(last.config).to(next(last.parameters()).device)


def action_values(model: MegatronModule, m: MicroBatch, hidden: Tensor) -> Tensor:
    """Values [N] of the actions, from the hidden states [T / cp, H] of the last stage."""
    return chunks_of(model)[-1].value_head(hidden[m.inputs.rows])


def value_losses(model: MegatronModule, m: MicroBatch, hidden: Tensor, clip: float) -> tuple[Tensor, Metrics]:
    """The loss [N] of the values of the actions, and what to log of it."""
    values = action_values(model, m, hidden)
    loss, metrics = value_loss(values, m.values, m.returns, clip)
    return loss, metrics | {"critic/vf_loss": loss.detach(), "critic/vpred_mean": values.detach()}


class Critic:
    """A rank's shard of a model with a value head and an optimizer of its own."""

    def __init__(self, config: RunConfig, kind: ActionKind, *, weights: bool) -> None:
        """``weights=False``: a checkpoint will be loaded over the initial values; adapters are all that it holds."""
        self.config, self.kind = config, kind
        path, lora = config.critic.path or config.model.path, config.model.lora
        self.model, mappings = build_model(config, path, weights=weights or lora.rank > 0)
        own = replace(config, model=replace(config.model, path=path, lora=replace(lora, path="")))
        add_adapters(own, self.model, mappings)
        last = chunks_of(self.model)[-1]
        if last.post_process and not last.share_embeddings_and_output_weights:
            last.output_weight().requires_grad_(False)  # nothing reads it
        add_value_head(self.model)
        self.updates = config.algorithm.num_minibatches * config.algorithm.num_epochs
        optimizer = replace(
            config.optimizer, lr=config.critic.lr, min_lr=min(config.optimizer.min_lr, config.critic.lr)
        )
        self.trained = build_trainable(config, self.model, optimizer, self.updates * config.trainer.num_steps)
        self.offload = Offload([self.model], self.trained.ddp, self.trained.optimizer)

    @property
    def is_warming_up(self) -> bool:
        """Whether the policy waits for the critic in the step that comes."""
        return self.trained.scheduler.num_steps < self.updates * self.config.critic.warmup_steps

    def values(self, microbatches: list[MicroBatch]) -> list[Tensor]:
        """Values [N] of each microbatch on the last stage, nothing elsewhere."""
        self.offload.restore("parameters")
        return forward_only(self.model, microbatches, self.kind.forward, partial(action_values, self.model))

    def train(self, minibatches: list[list[MicroBatch]], totals: Totals) -> None:
        """The step's optimizer updates; the policy's pass counts the actions."""
        self.offload.restore("parameters", "gradients", "optimizer")
        for _ in range(self.config.algorithm.num_epochs):
            for minibatch in minibatches:
                outputs, grad_norm, lr = self.trained.update(minibatch, self.kind.forward, self._loss)
                totals.add(outputs)
                totals.values |= {"critic/grad_norm": grad_norm, "critic/lr": lr}
        self.trained.gather_parameters()

    def _loss(self, m: MicroBatch, hidden: Tensor) -> Outputs:
        """The sum over the actions, which the schedule divides by their number; every action weighs the same."""
        loss, metrics = value_losses(self.model, m, hidden, self.config.critic.clip)
        count = torch.full((), len(m), dtype=torch.int, device=hidden.device)
        return loss.sum(), count, (0, {name: value.sum() for name, value in metrics.items()}, {})
