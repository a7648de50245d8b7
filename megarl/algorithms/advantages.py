"""Advantages: from the rewards of trajectories to one number per action. No model, no packing, no padding.

Each function maps the trajectories of one step to a list of streams [N] that are zero where ``loss_mask`` is False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megarl.config import AlgorithmConfig, check_choice
from megarl.types import Trajectory

Advantage = Callable[[Sequence[Trajectory], AlgorithmConfig], list[np.ndarray]]
ADVANTAGES: dict[str, Advantage] = {}


def register_advantage(function: Advantage) -> Advantage:
    """Register an advantage under the name of its function."""
    ADVANTAGES[function.__name__] = function
    return function


def compute_advantages(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """Streams [N] float32, one a trajectory, by the estimator that ``algorithm.advantage`` names."""
    check_choice("algorithm.advantage", config.advantage, ADVANTAGES)
    return ADVANTAGES[config.advantage](trajectories, config)


def group_indices(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Indices of the trajectories of each group, groups in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group_id, []).append(index)
    return [np.array(indices) for indices in groups.values()]


@register_advantage
def grpo(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """GRPO (arXiv:2402.03300): the reward minus its group's mean, over its group's (unbiased) standard deviation.

    ``algorithm.normalize_by_std=False`` leaves the division out (Dr.GRPO, arXiv:2503.20783). A group of one gets zero:
    there is nothing to compare with.
    """
    rewards = np.array([t.reward for t in trajectories], np.float64)
    scores = np.zeros_like(rewards)
    for group in group_indices(trajectories):
        scores[group] = rewards[group] - rewards[group].mean()
        if config.normalize_by_std and len(group) > 1:
            scores[group] /= rewards[group].std(ddof=1) + 1e-6
    return [(t.loss_mask * score).astype(np.float32) for t, score in zip(trajectories, scores, strict=True)]
