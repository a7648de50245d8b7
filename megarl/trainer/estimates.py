"""What the ranks are asked about a step's samples before advantages are computed: values, and divergence."""

from __future__ import annotations

from typing import Any

import numpy as np

from megarl.algorithms.penalties import KLController, apply_kl_penalty
from megarl.config import RunConfig
from megarl.data.packing import Packing, assign_to_bins, by_sample, pack_assigned
from megarl.types import Sample
from megarl.workers.group import WorkerGroup

STREAMS = ("values", "old_logprobs", "ref_logprobs")


class Estimator:
    """Fills ``values``, ``old_logprobs`` and ``ref_logprobs`` where the algorithm needs them; steers the KL penalty."""

    def __init__(self, config: RunConfig, workers: WorkerGroup, packing: Packing) -> None:
        self.config, self.workers, self.packing = config, workers, packing
        self.controller = KLController.of(config.algorithm)

    def add_to(self, samples: list[Sample]) -> dict[str, float]:
        """Ask about ``samples``, and take the KL penalty from what their actions earn; what to log."""
        algorithm = self.config.algorithm
        if not self.config.has_critic and not algorithm.kl_in_reward:
            return {}
        bins = assign_to_bins(samples, self.packing, self.workers.data_parallel_size)
        estimates = self.workers.estimate(pack_assigned(samples, bins, self.packing))
        for name in STREAMS:
            outputs = [[getattr(estimate, name) for estimate in rank] for rank in estimates]
            if outputs[0][0] is not None:
                for sample, values in zip(samples, by_sample(samples, bins, outputs), strict=True):
                    stream = np.zeros(len(sample.loss_mask), np.float32)
                    stream[sample.loss_mask] = values
                    setattr(sample, name, stream)
        return apply_kl_penalty(samples, self.controller, algorithm.kl_estimator) if algorithm.kl_in_reward else {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"kl_coef": self.controller.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; without one, or where nothing steers the coefficient, from the configuration."""
        if self.controller.target:
            self.controller.coef = state.get("kl_coef", self.controller.coef)
