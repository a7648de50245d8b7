"""Penalties: divergence from the reference model, in the loss or in the reward, and lack of entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarl.algorithms.policy_losses import MAX_LOG_RATIO, Actions, Metrics
from megarl.config import AlgorithmConfig
from megarl.types import Trajectory
from megarl.utils.checks import check_choice

MAX_KL = 10.0  # of one action by k3, which is exponential
# log-ratio u = log(reference / policy) of the sampled action -> estimate of KL(policy || reference)
# (Schulman, "Approximating KL divergence", 2020). k3 is what GRPO uses.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda u: -u,
    "abs": lambda u: u.abs(),
    "k2": lambda u: 0.5 * u.square(),
    "k3": lambda u: (u.exp() - u - 1).clamp(max=MAX_KL),
}
# Their values are estimates of the divergence; only the gradient of k2 is one of its gradient. So k1+ is k1 in value
# and k2 in gradient, and so on.
KL_CHOICES = [*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS)]


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimates [N] of the divergence from the reference, by the name in ``algorithm.kl_estimator``."""
    check_choice("algorithm.kl_estimator", estimator, KL_CHOICES)
    log_ratio = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = KL_ESTIMATORS[estimator.removesuffix("+")](log_ratio)
    if not estimator.endswith("+"):
        return kl
    k2 = KL_ESTIMATORS["k2"](log_ratio)
    return k2 - k2.detach() + kl.detach()


def penalties(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """What ``algorithm.kl_coef`` and ``algorithm.entropy_coef`` add to the loss [N], and what to log of it."""
    loss, metrics = torch.zeros_like(actions.logprobs), {}
    if actions.entropy is not None:
        loss, metrics = -config.entropy_coef * actions.entropy, {"actor/entropy": actions.entropy.detach()}
    elif config.entropy_coef:
        raise ValueError(f"algorithm.entropy_coef={config.entropy_coef}: these actions have no entropy")
    if actions.ref_logprobs is not None and config.kl_placement == "loss":
        kl = kl_divergence(actions.logprobs, actions.ref_logprobs, config.kl_estimator)
        if actions.expert_mask is not None:  # an estimate from actions that the policy sampled
            kl = kl.masked_fill(actions.expert_mask, 0)
        loss, metrics = loss + config.kl_coef * kl, metrics | {"actor/kl_loss": kl.detach()}
    return loss, metrics


@dataclass
class KLController:
    """The coefficient of the KL in the reward, fixed or steered to a target (arXiv:1909.08593)."""

    coef: float
    target: float = 0.0  # 0: fixed
    horizon: int = 10000  # samples

    @classmethod
    def of(cls, config: AlgorithmConfig) -> KLController:
        """As ``algorithm.kl_controller`` says."""
        return cls(config.kl_coef, config.kl_target if config.kl_controller == "adaptive" else 0.0, config.kl_horizon)

    def update(self, kl: float, num_samples: int) -> None:
        """Take in the mean divergence of ``num_samples`` samples."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * num_samples / self.horizon


def apply_kl_penalty(trajectories: Sequence[Trajectory], controller: KLController, estimator: str) -> dict[str, float]:
    """Take from what every own action earns its divergence from the reference, and steer; what to log, as verl does.

    Trajectories have ``ref_logprobs``, and ``old_logprobs`` unless the engine's stand for them.
    """
    coef, means = controller.coef, []
    for trajectory in trajectories:
        policy = trajectory.rollout_logprobs if trajectory.old_logprobs is None else trajectory.old_logprobs
        kl = kl_divergence(torch.from_numpy(policy), torch.from_numpy(trajectory.ref_logprobs), estimator).numpy()
        kl = np.where(trajectory.own_mask, kl, 0).astype(np.float32)
        earned = 0.0 if trajectory.action_rewards is None else trajectory.action_rewards
        trajectory.action_rewards = (earned - coef * kl).astype(np.float32)
        if trajectory.own_mask.any():
            means.append(kl[trajectory.own_mask].mean())
    mean = float(np.mean(means)) if means else 0.0
    controller.update(mean, len(trajectories))
    return {"actor/reward_kl_penalty": mean, "actor/reward_kl_penalty_coeff": coef}
