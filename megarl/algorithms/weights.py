"""Loss reductions as one weight per action.

The loss of an optimizer step is ``sum(weight * loss) / N`` over its N trained actions, so a reduction is a choice of
weights and never depends on micro-batches, packing or the parallel layout. Weights are zero where ``loss_mask`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megarl.config import AlgorithmConfig, check_choice
from megarl.types import Trajectory

# lengths [B] of trained actions, group ids [B] -> the weight [B] of an action of each trajectory, before normalisation
_SCALES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "token_mean": lambda lengths, groups: np.ones(len(lengths)),
    "sequence_mean": lambda lengths, groups: 1 / lengths,
    "prompt_mean": lambda lengths, groups: np.array([1 / lengths[groups == group].sum() for group in groups]),
}


def compute_loss_weights(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """Streams [N] float32, mean one over the trained actions of ``trajectories`` (those of one optimizer step).

    token_mean: every action counts the same (DAPO). sequence_mean: every trajectory does (GRPO). prompt_mean: every
    group does. A trajectory without actions weighs nothing.
    """
    check_choice("algorithm.loss_weights", config.loss_weights, _SCALES)
    lengths = np.array([int(t.loss_mask.sum()) for t in trajectories], np.float64)
    groups = np.array([t.group_id for t in trajectories])
    acting = lengths > 0
    scales = np.zeros(len(trajectories))
    scales[acting] = _SCALES[config.loss_weights](lengths[acting], groups[acting])
    total = (scales * lengths).sum()
    if total:
        scales *= lengths.sum() / total
    return [(t.loss_mask * scale).astype(np.float32) for t, scale in zip(trajectories, scales, strict=True)]
