"""What a step's samples say about it, under verl's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megarl.algorithms.advantages import total_rewards
from megarl.types import Sample


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Statistics of rewards, advantages and lengths, and parts of rewards by task, without experts' whole answers."""
    samples = [sample for sample in samples if not sample.is_expert]
    metrics: dict[str, float] = {}

    def spread(name: str, values: Sequence[float]) -> None:
        if len(values):
            metrics.update(
                {f"{name}/mean": np.mean(values), f"{name}/max": np.max(values), f"{name}/min": np.min(values)}
            )

    spread("critic/score", [s.reward for s in samples])
    spread("critic/rewards", total_rewards(samples))
    spread("critic/advantages", np.concatenate([s.advantages[s.loss_mask] for s in samples]))
    acted = [s for s in samples if s.returns is not None and s.loss_mask.any()]
    if acted:
        values, returns = (
            np.concatenate([getattr(s, name)[s.loss_mask] for s in acted]) for name in ("values", "returns")
        )
        spread("critic/values", values)
        spread("critic/returns", returns)
        metrics["critic/vf_explained_var"] = 1 - np.var(returns - values) / (np.var(returns) + 1e-5)
    spread("response_length", [s.own_mask.sum() for s in samples if not s.is_expert])
    spread("prompt_length", [len(s.tokens) - s.response_length for s in samples])
    metrics["response_length/clip_ratio"] = np.mean([s.finish_reason == "length" for s in samples])
    parts: dict[str, list[float]] = defaultdict(list)
    groups: dict[int, list[float]] = defaultdict(list)
    for s in samples:
        groups[s.group_id].append(s.reward)
        for name, value in s.rewards.items():
            parts[f"reward/{s.prompt.task}/{name}"].append(value)
    metrics.update({name: np.mean(values) for name, values in parts.items()})
    metrics["critic/zero_std_ratio"] = np.mean([np.ptp(rewards) == 0 for rewards in groups.values()])
    metrics["perf/total_num_tokens"] = sum(len(s.tokens) for s in samples)
    return {name: float(value) for name, value in metrics.items()}


def staleness_metrics(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """How many steps older than ``version`` the weights were that chose the actions, and who saw several."""
    spans = [s.weight_versions[s.own_mask] for s in samples if s.weight_versions is not None and s.own_mask.any()]
    if not spans:
        return {}
    staleness = version - np.concatenate(spans)
    return {
        "rollout/staleness_mean": float(staleness.mean()),
        "rollout/staleness_max": float(staleness.max()),
        "rollout/partial_fraction": float(np.mean([np.ptp(versions) > 0 for versions in spans])),
    }
