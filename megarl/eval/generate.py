"""Prompts in, rewarded samples out: rewards are computed while other prompts still generate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

from megarl.rewards.runner import RewardRunner, Score
from megarl.rollout.manager import RolloutManager
from megarl.types import EncodedPrompt, Sample

Progress = Callable[[int, int], None]  # finished prompts, all prompts

logger = logging.getLogger(__name__)

SEED_STRIDE = 1 << 32  # between the seeds of two runs; steps count up from a run's, evaluations down


def generate_rewarded(
    rollout: RolloutManager,
    rewards: RewardRunner,
    prompts: list[EncodedPrompt],
    *,
    group_size: int,
    temperature: float,
    max_new_tokens: int,
    step_seed: int,
    greedy: bool = False,
    first_group: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Sample], int]:
    """``group_size`` samples of each prompt with their rewards, and how many were dropped for want of one.

    With ``greedy`` each of them knows the reward of one more response, at temperature 0; where that has none, the group
    is dropped. Groups are numbered from ``first_group``.

    Raises ``RewardError`` unless ``rewards.on_error`` is drop, and when nothing would be left.
    """
    pending: dict[int, Future[Score]] = {}

    def submit(group: list[Sample]) -> None:
        pending.update({id(sample): rewards.submit(sample.prompt, sample.response) for sample in group})

    samples = rollout.generate(
        prompts,
        group_size=group_size,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        step_seed=step_seed,
        greedy=greedy,
        first_group=first_group,
        on_samples=submit,
        progress=progress,
    )
    scores = rewards.gather(pending[id(sample)] for sample in samples)
    kept, baselines = [], dict[int, float]()  # by group, when greedy
    for index, (sample, score) in enumerate(zip(samples, scores, strict=True)):
        if score.error is not None:
            continue
        sample.rewards, sample.reward = score.rewards, score.rewards["score"]
        if greedy and index % (group_size + 1) == group_size:
            baselines[sample.group_id] = sample.reward
        else:
            kept.append(sample)
    if greedy:
        kept = [sample for sample in kept if sample.group_id in baselines]
        for sample in kept:
            sample.greedy_reward = baselines[sample.group_id]
    errors = [score.error for score in scores if score.error is not None]
    if errors:
        logger.warning("%d of %d samples have no reward; the first: %s", len(errors), len(samples), errors[0])
        if not kept:
            raise errors[0]
    return kept, len(prompts) * group_size - len(kept)
