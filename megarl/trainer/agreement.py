"""Whether trainer and engine compute the same: one rule for the canary of a weight sync and for the rollouts of a step.

Of the same tokens, p and p' are the probabilities on the two sides. In float32 the largest |log p - log p'| decides. In
bfloat16 right implementations differ by half a unit on some unlikely token, so there the mean |p - p'| decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megarl.config import RunConfig

FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 0.03


@dataclass(frozen=True)
class Difference:
    """How far two sides are apart."""

    mean: float  # of |p - p'|
    largest: float  # |log p - log p'|

    @classmethod
    def between(cls, ours: np.ndarray, theirs: np.ndarray) -> Difference:
        """Of log-probs [N]."""
        return cls(float(np.abs(np.exp(ours) - np.exp(theirs)).mean()), float(np.abs(ours - theirs).max()))


@dataclass(frozen=True)
class Judge:
    """``tolerance``: of the statistic that decides in this precision."""

    rounded: bool  # one of the sides is in bfloat16
    tolerance: float

    @classmethod
    def of(cls, config: RunConfig, tolerance: float = 0.0) -> Judge:
        """For the precisions of a run; ``tolerance`` 0: the default."""
        rounded = "bfloat16" in (config.model.params_dtype, config.rollout.dtype)
        return cls(rounded, tolerance or (BFLOAT16_TOLERANCE if rounded else FLOAT32_TOLERANCE))

    def failure(self, difference: Difference) -> str:
        """Why ``difference`` is too large, or nothing; one that is not a number is."""
        if self.rounded:
            name, value = "mean |probability difference|", difference.mean
        else:
            name, value = "max |log-prob difference|", difference.largest
        return "" if value <= self.tolerance else f"{name} {value:.3g} > {self.tolerance:.3g}"
