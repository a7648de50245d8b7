"""Actions that a loss singles out among all of a step: chosen once, before the first update, by what they are.

A choice by microbatch would depend on how a step is cut. Here a function sees the step's actions from all ranks and
microbatches, in any order, and draws by numbers that belong to the actions; so whatever the cut, the same are chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megarl.config import AlgorithmConfig

# log-probs [N] of the policy at the start of the step, advantages [N], uniform [N] -> bool [N], over the whole step
Selection = Callable[[Tensor, Tensor, Tensor, AlgorithmConfig], Tensor]


def covariances(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """What each action adds to the covariance of log-probability and advantage (arXiv:2505.22617, eq. 10): [N]."""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def _clip_cov(logprobs: Tensor, advantages: Tensor, uniform: Tensor, config: AlgorithmConfig) -> Tensor:
    """Drawn among those whose covariance lies between ``clip_cov_low`` and ``clip_cov_high``."""
    covariance = covariances(logprobs, advantages)
    inside = (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
    drawn = uniform.masked_fill(~inside, torch.inf)
    return _smallest(drawn, torch.zeros_like(drawn), _share(config.clip_cov_ratio, logprobs)) & inside


def _kl_cov(logprobs: Tensor, advantages: Tensor, uniform: Tensor, config: AlgorithmConfig) -> Tensor:
    """Those of the largest covariance; among equals it is drawn."""
    return _smallest(-covariances(logprobs, advantages), uniform, _share(config.kl_cov_ratio, logprobs))


SELECTIONS: dict[str, Selection] = {"clip_cov": _clip_cov, "kl_cov": _kl_cov}  # by policy loss


def _share(ratio: float, actions: Tensor) -> int:
    return min(len(actions), max(1, int(ratio * len(actions))))


def _smallest(values: Tensor, ties: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest of ``values`` [N], equal ones in the order of ``ties``: bool [N]."""
    order = torch.argsort(ties, stable=True)
    order = order[torch.argsort(values[order], stable=True)]
    marks = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    marks[order[:count]] = True
    return marks


def action_uniforms(
    positions: np.ndarray, tokens: np.ndarray, rollout_logprobs: np.ndarray, advantages: np.ndarray, step: int = 0
) -> np.ndarray:
    """A number in [0, 1) for every action [N] that is the same wherever the action is: a hash of all it came with.

    positions: [N] in its sequence; tokens: [N]; rollout_logprobs, advantages: [N] float32 as the driver sent them;
    step: of the run, because an expert's answer comes with the same again and again.
    """
    state = np.full(len(positions), step, np.uint64)
    for words in (positions, tokens, rollout_logprobs.view(np.uint32), advantages.view(np.uint32)):
        state = _mix(state ^ words.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(words: np.ndarray) -> np.ndarray:
    """One round of splitmix64 (Steele et al. 2014): [N] uint64; overflow is meant."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
