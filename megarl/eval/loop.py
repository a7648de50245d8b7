"""Evaluation on held-out prompts, greedy unless asked otherwise, one sample a prompt."""

from __future__ import annotations

from megarl.config import RunConfig
from megarl.data.processors import Processor
from megarl.eval.generate import SEED_STRIDE, Progress, generate_rewarded
from megarl.eval.metrics import validation_metrics
from megarl.rewards.runner import RewardRunner
from megarl.rollout.manager import RolloutManager
from megarl.tasks.task import Task
from megarl.types import Sample


class Evaluation:
    """The first ``trainer.eval_prompts`` held-out prompts of every task, encoded once."""

    def __init__(
        self,
        config: RunConfig,
        tasks: dict[str, Task],
        processor: Processor,
        rollout: RolloutManager,
        rewards: RewardRunner,
    ) -> None:
        self.config, self.rollout, self.rewards = config, rollout, rewards
        prompts = []
        for task in tasks.values():
            available = task.num_prompts("eval")
            wanted = config.trainer.eval_prompts
            count = wanted if available is None else min(available, wanted)
            prompts += [processor.encode(task.prompt("eval", index)) for index in range(count)]
        self.prompts = [p for p in prompts if len(p.tokens) <= config.data.max_prompt_length]
        self.overlong = len(prompts) - len(self.prompts)
        self.samples: list[Sample] = []  # of the last run

    def run(self, step: int, progress: Progress | None = None) -> dict[str, float]:
        """Generate, reward and average; metrics as ``val-core/<task>/score/mean@1`` and so on."""
        c = self.config.rollout
        self.samples, dropped = generate_rewarded(
            self.rollout,
            self.rewards,
            self.prompts,
            group_size=1,
            temperature=c.eval_temperature,
            max_new_tokens=c.max_new_tokens,
            step_seed=self.config.seed * SEED_STRIDE - step - 1,
            progress=progress,
        )
        counts = {"val-aux/overlong_dropped": float(self.overlong), "val-aux/reward_dropped": float(dropped)}
        return validation_metrics(self.samples) | counts
