"""The samples of a step: prompts are drawn and answered until enough of their groups have something to teach.

Synchronous and pipelined trainers share it. It knows prompts, engines and rewards, and nothing of the ranks.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megarl.algorithms.filters import drop_reasons, refill
from megarl.config import RunConfig
from megarl.data.source import PromptSource
from megarl.eval.generate import SEED_STRIDE, Progress, generate_rewarded
from megarl.rewards.runner import RewardRunner
from megarl.rollout.manager import RolloutManager
from megarl.trainer.demonstrations import Demonstrator
from megarl.types import Sample
from megarl.utils.errors import RunFailure

_TELL_EVERY = 10  # rounds: a task may have nothing left to teach

logger = logging.getLogger(__name__)


@dataclass
class Rollout:
    """What a step is trained on."""

    samples: list[Sample]  # rewarded, groups in the order of their prompts
    metrics: dict[str, float]
    stream: list[Sample]  # an expert's answers beside them
    positions: dict[str, Any]  # behind the last prompt of the step: source, and ``Demonstrator.state_dict``
    reward_dropped: int  # samples without a reward


class StepSampler:
    """Draws prompts from ``source`` and gets ``rollout.group_size`` rewarded samples of each.

    With ``algorithm.filter_key`` a step is refilled (DAPO's dynamic sampling): prompts are drawn, each round as many as
    will likely do, until ``data.prompts_per_step`` groups are informative or ``algorithm.filter_max_rounds`` are over.
    Groups beyond that are dropped, as in verl: kept for the next step they would be of older weights.
    """

    def __init__(
        self,
        config: RunConfig,
        source: PromptSource,
        rollout: RolloutManager,
        rewards: RewardRunner,
        demonstrator: Demonstrator,
    ) -> None:
        self.config, self.source, self.demonstrator = config, source, demonstrator
        self.rollout, self.rewards = rollout, rewards

    def sample(self, step: int, progress: Progress | None = None) -> Rollout:
        """The samples of ``step``; which prompts are drawn depends on the source and the rewards alone.

        Raises ``RunFailure`` where ``filter_max_rounds`` bring no group that could be trained on.
        """
        start, algorithm, wanted = time.perf_counter(), self.config.algorithm, self.config.data.prompts_per_step
        samples: list[Sample] = []
        drawn, rounds, lost, draw = 0, 0, 0, wanted
        while True:
            more, without_reward = self._draw(draw, drawn, step, progress)
            samples, lost, drawn, rounds = samples + more, lost + without_reward, drawn + draw, rounds + 1
            reasons = drop_reasons(samples, algorithm)
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons.values()).items()))
            kept = [group for group in dict.fromkeys(s.group_id for s in samples) if group not in reasons]
            if not algorithm.filter_key or len(kept) >= wanted or rounds == algorithm.filter_max_rounds:
                break
            draw = refill(wanted - len(kept), len(kept), drawn, wanted)
            if rounds % _TELL_EVERY == 0:
                logger.warning("step %d: %d of %d groups after %d rounds: %s", step, len(kept), wanted, rounds, why)
        if not kept:
            raise RunFailure(
                f"step {step}: none of {drawn} groups in {rounds} rounds has anything to teach ({why}): "
                f"algorithm.filter_key={algorithm.filter_key} finds the prompts too easy or too hard"
            )
        surplus = set(kept[wanted:])
        metrics = {"timing_s/gen": time.perf_counter() - start}
        if algorithm.filter_key:
            metrics |= {"filter/rounds": rounds, "filter/drawn_groups": drawn, "filter/surplus_groups": len(surplus)}
            metrics |= {"filter/kept_groups": len(kept) - len(surplus), "filter/dropped_groups": len(reasons)}
            metrics |= {f"filter/dropped_{reason}": count for reason, count in Counter(reasons.values()).items()}
        return Rollout(
            samples=[sample for sample in samples if sample.group_id not in surplus],
            metrics={name: float(value) for name, value in metrics.items()},
            stream=self.demonstrator.stream(),
            positions={"source": self.source.state_dict()} | self.demonstrator.state_dict(),
            reward_dropped=lost,
        )

    def _draw(
        self, num_prompts: int, first_group: int, step: int, progress: Progress | None
    ) -> tuple[list[Sample], int]:
        """Groups of the next prompts, numbered from ``first_group``, and how many samples had no reward."""
        c = self.config.rollout
        return generate_rewarded(
            self.rollout,
            self.rewards,
            self.demonstrator.demonstrate(self.source.next(num_prompts), step - 1),
            group_size=c.group_size,
            temperature=c.temperature,
            max_new_tokens=c.max_new_tokens,
            step_seed=self.config.seed * SEED_STRIDE + step,
            greedy=self.config.algorithm.advantage == "remax",
            first_group=first_group,
            progress=progress,
        )
