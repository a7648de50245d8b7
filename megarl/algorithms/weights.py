"""Loss reductions as one weight per action.

The loss of an optimizer step is ``sum(weight * loss) / N`` over its N trained actions, so a reduction is a choice of
weights and never depends on micro-batches, packing or the parallel layout. Weights are zero where ``loss_mask`` is, and
on trajectories that filters took out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megarl.config import AlgorithmConfig
from megarl.types import Trajectory
from megarl.utils.checks import check_choice

# lengths [B] > 0 of trained actions, group ids [B], longest response -> what the loss of one action of each trajectory
# is multiplied by, [B]
Scale = Callable[[np.ndarray, np.ndarray, int | None], np.ndarray]


def _prompt_mean(lengths: np.ndarray, groups: np.ndarray, longest: int | None) -> np.ndarray:
    _, group = np.unique(groups, return_inverse=True)
    tokens = np.bincount(group, weights=lengths)
    return 1 / (len(tokens) * tokens[group])


LOSS_WEIGHTS: dict[str, Scale] = {
    "token_mean": lambda lengths, groups, longest: np.full(len(lengths), 1 / lengths.sum()),
    "sequence_mean": lambda lengths, groups, longest: 1 / (len(lengths) * lengths),
    "sequence_sum": lambda lengths, groups, longest: np.full(len(lengths), 1 / len(lengths)),
    "sequence_sum_norm": lambda lengths, groups, longest: np.full(len(lengths), 1 / (len(lengths) * longest)),
    "prompt_mean": _prompt_mean,
}


def compute_loss_weights(
    trajectories: Sequence[Trajectory], config: AlgorithmConfig, longest: int | None = None
) -> list[np.ndarray]:
    """Streams [N] float32 for the ``trajectories`` of one optimizer step.

    token_mean: the mean over actions (DAPO). sequence_mean: over trajectories, of their means over actions (GRPO).
    sequence_sum: over trajectories, of their sums. sequence_sum_norm: those sums over the constant ``longest``, the
    longest response there can be (Dr.GRPO). prompt_mean: over groups, of their means over actions. A trajectory without
    trained actions does not count. ``algorithm.expert_weights=separate`` reduces own and expert actions by themselves.
    """
    check_choice("algorithm.loss_weights", config.loss_weights, LOSS_WEIGHTS)
    if config.loss_weights == "sequence_sum_norm" and not longest:
        raise ValueError("algorithm.loss_weights=sequence_sum_norm needs the length of the longest response")
    trained = [t.loss_mask & t.keep for t in trajectories]
    expert = [np.zeros_like(t.loss_mask) if t.expert_mask is None else t.expert_mask for t in trajectories]
    parts = [trained]
    if config.expert_weights == "separate":
        parts = [
            [mask & e for mask, e in zip(trained, expert, strict=True)],
            [mask & ~e for mask, e in zip(trained, expert, strict=True)],
        ]
    groups = np.array([t.group_id for t in trajectories])
    num_actions = sum(int(mask.sum()) for mask in trained)
    streams = [np.zeros(len(t.loss_mask), np.float32) for t in trajectories]
    for masks in parts:
        lengths = np.array([mask.sum() for mask in masks], np.float64)
        acting = np.flatnonzero(lengths)
        if len(acting):
            scales = num_actions * LOSS_WEIGHTS[config.loss_weights](lengths[acting], groups[acting], longest)
            for index, scale in zip(acting, scales, strict=True):
                streams[index][masks[index]] = scale
    return streams
