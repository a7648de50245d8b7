"""Which trajectories of a step are trained on, and what length costs them. Rewards and flags only: no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarl.algorithms.advantages import group_indices, named_rewards
from megarl.config import AlgorithmConfig
from megarl.types import Sample, Trajectory


def informative_groups(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> np.ndarray:
    """DAPO's dynamic sampling (arXiv:2503.14476): [B] bool, True where a group has something to teach.

    The rewards named ``algorithm.filter_key`` differ in it, and their mean lies between ``filter_low`` and
    ``filter_high``. Name the accuracy: a total that includes the format differs where nobody is right.
    """
    keep = np.ones(len(trajectories), bool)
    if config.filter_key:
        rewards = named_rewards(trajectories, config.filter_key, "algorithm.filter_key")
        for group in group_indices(trajectories):
            differ = len(group) == 1 or np.ptp(rewards[group]) > 0
            keep[group] = differ and config.filter_low < rewards[group].mean() < config.filter_high
    return keep


def drop_reasons(samples: Sequence[Sample], config: AlgorithmConfig) -> dict[int, str]:
    """Why ``informative_groups`` keeps a group from training, by ``group_id``; groups that it keeps are not there.

    Equal rewards: all_truncated (every response was cut), all_right (``algorithm.success_reward`` or more), all_wrong
    (0 or less), all_same. Others: low or high, by the bound that their mean does not keep.
    """
    keep = informative_groups(samples, config)
    reasons = {}
    for group in group_indices(samples):
        if keep[group].all():
            continue
        members = [samples[index] for index in group]
        rewards = named_rewards(members, config.filter_key, "algorithm.filter_key")
        if len(group) == 1 or np.ptp(rewards) > 0:
            reason = "low" if rewards.mean() <= config.filter_low else "high"
        elif all(sample.finish_reason == "length" for sample in members):
            reason = "all_truncated"
        elif rewards.min() >= config.success_reward:
            reason = "all_right"
        else:
            reason = "all_wrong" if rewards.max() <= 0 else "all_same"
        reasons[members[0].group_id] = reason
    return reasons


def refill(missing: int, kept: int, drawn: int, most: int) -> int:
    """Groups to draw so that ``missing`` more are likely kept, after ``kept`` of ``drawn`` were; at most ``most``."""
    return min(most, -(-missing * (drawn + 1) // (kept + 1)))


def overlong_punishment(lengths: np.ndarray, longest: int, buffer: float) -> np.ndarray:
    """DAPO's soft over-long punishment: [B] from 0 to -1, linear over the last ``buffer`` tokens of ``longest``."""
    if buffer <= 0:
        return np.where(lengths > longest, -1.0, 0.0)
    return -((lengths - (longest - buffer)) / buffer).clip(0, 1)


def expert_gate(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> np.ndarray:
    """HPT's switch (arXiv:2509.04419): [B] bool, True for what a group learns from.

    At most ``algorithm.expert_gate`` of its own responses are right: the expert's alone. Otherwise: its own alone.
    A group without an expert keeps its own.
    """
    keep = np.ones(len(trajectories), bool)
    if config.expert_gate >= 0:
        expert = np.array([t.has_expert for t in trajectories])
        right = np.array([t.reward >= config.success_reward for t in trajectories])
        for group in group_indices(trajectories):
            num_right = (right[group] & ~expert[group]).sum()
            imitate = expert[group].any() and num_right <= config.expert_gate
            keep[group] = expert[group] if imitate else ~expert[group]
    return keep


def apply_filters(samples: Sequence[Sample], config: AlgorithmConfig, longest: int) -> dict[str, float]:
    """Set ``keep``, and the punishment for length as what the last action earns besides; what to log.

    longest: the most tokens that a response may have.
    """
    keep = informative_groups(samples, config) & expert_gate(samples, config)
    metrics = {"filter/kept_ratio": float(keep.mean())} if config.filter_key or config.expert_gate >= 0 else {}
    if config.filter_truncated:
        truncated = np.array([sample.finish_reason == "length" for sample in samples])
        keep &= ~truncated
        metrics["filter/truncated_ratio"] = float(truncated.mean())
    for sample, kept in zip(samples, keep, strict=True):
        sample.keep = bool(kept)
    if config.overlong_buffer:
        lengths = np.array([sample.response_length for sample in samples])
        punishment = overlong_punishment(lengths, longest, config.overlong_buffer * longest)
        punishment[[sample.is_expert for sample in samples]] = 0.0  # an expert is imitated, however long
        for sample, value in zip(samples, config.overlong_penalty * punishment, strict=True):
            sample.rewards["overlong"] = float(value)
            earned = np.zeros(len(sample.loss_mask), np.float32)
            earned[np.flatnonzero(sample.loss_mask)[-1:]] = value
            sample.action_rewards = earned if sample.action_rewards is None else sample.action_rewards + earned
        metrics["filter/overlong_ratio"] = float((punishment < 0).mean())
    return metrics
