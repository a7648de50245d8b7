"""Penalties that join the policy loss: divergence from the reference model, and lack of entropy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megarl.algorithms.policy_losses import MAX_LOG_RATIO, Actions, Metrics
from megarl.config import AlgorithmConfig, check_choice

# log-ratio u = log(reference / policy) of the sampled action -> estimate of KL(policy || reference)
# (Schulman, "Approximating KL divergence", 2020). k3 is what GRPO uses.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda u: -u,
    "abs": lambda u: u.abs(),
    "k2": lambda u: 0.5 * u.square(),
    "k3": lambda u: u.exp() - u - 1,
}


def penalties(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """What ``algorithm.kl_coef`` and ``algorithm.entropy_coef`` add to the loss [N], and what to log of it."""
    loss, metrics = -config.entropy_coef * actions.entropy, {"actor/entropy": actions.entropy.detach()}
    if actions.ref_logprobs is not None:
        check_choice("algorithm.kl_estimator", config.kl_estimator, KL_ESTIMATORS)
        log_ratio = (actions.ref_logprobs - actions.logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = KL_ESTIMATORS[config.kl_estimator](log_ratio)
        loss, metrics = loss + config.kl_coef * kl, metrics | {"actor/kl_loss": kl.detach()}
    return loss, metrics
