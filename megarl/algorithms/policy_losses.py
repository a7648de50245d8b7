"""Policy losses: from one microbatch of actions to one loss per action; the worker weighs and sums them.

Every tensor is a flat [N] stream of the actions of whole sequences, so packing, padding and batch layout never appear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.config import AlgorithmConfig, check_choice

MAX_LOG_RATIO = 20.0  # a ratio of e^20 is already clipped; beyond it exp overflows
Metrics = dict[str, Tensor]  # name -> [N], to be averaged with the loss weights


@dataclass
class Actions:
    """What a loss may look at: ``N`` actions of ``num_sequences`` sequences."""

    logprobs: Tensor  # [N] under the policy being trained, with gradient
    entropy: Tensor  # [N] of the policy's distribution, with gradient
    old_logprobs: Tensor  # [N] under the policy at the start of the step
    ref_logprobs: Tensor | None  # [N] under the reference; None without one
    rollout_logprobs: Tensor  # [N] as the engine sampled
    advantages: Tensor  # [N]
    loss_weights: Tensor  # [N] mean one over the optimizer step; zero where an action is not trained
    sequence_ids: Tensor  # [N] which of the sequences an action belongs to
    num_sequences: int
    # adds up a tensor over the ranks that share the sequences, with its gradient; the identity where none does
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sums [num_sequences] of ``values`` [N] over whole sequences, those actions included that other ranks hold."""
        sums = values.new_zeros(self.num_sequences).index_add(0, self.sequence_ids, values)
        return self.sum_over_ranks(sums)

    @property
    def log_ratio(self) -> Tensor:
        return (self.logprobs - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


PolicyLoss = Callable[[Actions, AlgorithmConfig], tuple[Tensor, Metrics]]
POLICY_LOSSES: dict[str, PolicyLoss] = {}


def register_policy_loss(function: PolicyLoss) -> PolicyLoss:
    """Register a policy loss under the name of its function."""
    POLICY_LOSSES[function.__name__] = function
    return function


def policy_loss(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """Loss [N] by the name in ``algorithm.policy_loss``, and what to log of it."""
    check_choice("algorithm.policy_loss", config.policy_loss, POLICY_LOSSES)
    return POLICY_LOSSES[config.policy_loss](actions, config)


@register_policy_loss
def ppo_clip(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of PPO (arXiv:1707.06347) with separate bounds (DAPO, arXiv:2503.14476) and dual clip.

    Dual clip (arXiv:1912.09729) bounds the loss of a negative advantage by ``clip_ratio_dual`` times it.
    """
    advantages, ratio = actions.advantages, actions.log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    pessimistic = torch.maximum(plain, clipped)
    bound = -advantages * config.clip_ratio_dual
    loss = torch.where(advantages < 0, torch.minimum(pessimistic, bound), pessimistic)
    metrics = {
        "actor/pg_clipfrac": (clipped > plain).float(),
        "actor/pg_clipfrac_lower": ((advantages < 0) & (pessimistic > bound)).float(),
        "actor/ppo_kl": -actions.log_ratio,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


@register_policy_loss
def sft(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """Cross entropy: the response is taken as an expert's."""
    return -actions.logprobs, {}
