"""Advantages: from the rewards of trajectories to one number per action. No model, no packing, no padding.

Each function maps the trajectories of one step to a list of streams [N] that are zero where ``loss_mask`` is False.
Groups are compared within; a trajectory that is alone in its group has nothing to compare with and gets zero. Standard
deviations are unbiased.

Shapes: B trajectories, N actions of one of them (n of them the policy's), G trajectories of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megarl.config import AlgorithmConfig
from megarl.types import Trajectory
from megarl.utils.checks import check_choice

Advantage = Callable[[Sequence[Trajectory], AlgorithmConfig], list[np.ndarray]]
ADVANTAGES: dict[str, Advantage] = {}


def register_advantage(function: Advantage) -> Advantage:
    """Register an advantage under the name of its function."""
    if function.__name__ in ADVANTAGES:
        raise ValueError(f"the advantage {function.__name__!r} is registered already")
    ADVANTAGES[function.__name__] = function
    return function


def compute_advantages(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """Streams [N] float32, one a trajectory, by the estimator that ``algorithm.advantage`` names.

    An expert's answer that ``algorithm.expert_gate`` closed out is not compared with.
    """
    check_choice("algorithm.advantage", config.advantage, ADVANTAGES)
    compared = [config.expert_gate < 0 or t.keep or not t.has_expert for t in trajectories]
    members = [t for t, in_it in zip(trajectories, compared, strict=True) if in_it]
    computed = iter(ADVANTAGES[config.advantage](members, config))
    streams = [next(computed) if c else np.zeros(len(t.loss_mask)) for t, c in zip(trajectories, compared, strict=True)]
    return [stream.clip(-config.advantage_clip, config.advantage_clip).astype(np.float32) for stream in streams]


# ---- what estimators are made of -----------------------------------------------------------------------------------


def group_indices(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Indices of the trajectories of each group, groups in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group_id, []).append(index)
    return [np.array(indices) for indices in groups.values()]


def total_rewards(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """What each trajectory earned in all, [B] float64."""
    return np.array([_rewards_of_actions(t).sum() if t.loss_mask.any() else t.reward for t in trajectories])


def named_rewards(trajectories: Sequence[Trajectory], name: str, key: str) -> np.ndarray:
    """The reward of that name, [B] float64; ``key`` is the knob that asked for it."""
    for trajectory in trajectories:
        if name not in trajectory.rewards:
            check_choice(f"{trajectory.prompt.id}: {key}", name, trajectory.rewards)
    return np.array([t.rewards[name] for t in trajectories], np.float64)


def _rewards_of_actions(trajectory: Trajectory) -> np.ndarray:
    """[n] float64: ``reward`` at the policy's last action, on top of what single actions earned."""
    rewards = np.zeros(int(trajectory.loss_mask.sum()))
    if trajectory.action_rewards is not None:
        rewards += trajectory.action_rewards[trajectory.loss_mask]
    rewards[-1:] += trajectory.reward
    return rewards


def _on_actions(trajectories: Sequence[Trajectory], scores: np.ndarray) -> list[np.ndarray]:
    """``scores`` [B] at every action of the policy."""
    return [trajectory.loss_mask * score for trajectory, score in zip(trajectories, scores, strict=True)]


def _spread(trajectory: Trajectory, values: np.ndarray) -> np.ndarray:
    """``values`` [n] at the policy's actions [N]."""
    stream = np.zeros(len(trajectory.loss_mask))
    stream[trajectory.loss_mask] = values
    return stream


def _by_group(
    trajectories: Sequence[Trajectory], rewards: np.ndarray, score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """``score(rewards [G], lengths [G])`` of every group of more than one: [B]."""
    lengths = np.array([t.loss_mask.sum() for t in trajectories], np.float64)
    scores = np.zeros(len(trajectories))
    for group in group_indices(trajectories):
        if len(group) > 1:
            scores[group] = score(rewards[group], lengths[group])
    return scores


def _centered(trajectories: Sequence[Trajectory], rewards: np.ndarray) -> np.ndarray:
    return _by_group(trajectories, rewards, lambda r, _: r - r.mean())


def _over_deviation(
    trajectories: Sequence[Trajectory], scores: np.ndarray, rewards: np.ndarray, config: AlgorithmConfig
) -> np.ndarray:
    """``scores`` [B] over the deviation of ``rewards`` [B] in what ``algorithm.std`` names."""
    scores = scores.copy()
    parts = {"none": [], "group": group_indices(trajectories), "step": [np.arange(len(rewards))]}[config.std]
    for part in parts:
        if len(part) > 1:
            scores[part] /= rewards[part].std(ddof=1) + config.std_epsilon
    return scores


def _normalized(trajectories: Sequence[Trajectory], rewards: np.ndarray, config: AlgorithmConfig) -> np.ndarray:
    """Rewards minus their group's mean, over that deviation: [B]."""
    return _over_deviation(trajectories, _centered(trajectories, rewards), rewards, config)


def _to_go(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Sums [n] of ``rewards`` [n] from each action on, those of later ones discounted."""
    if discount == 1:
        return rewards[::-1].cumsum()[::-1]
    sums, total = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        total = rewards[t] + discount * total
        sums[t] = total
    return sums


def _whiten(trajectories: Sequence[Trajectory], streams: list[np.ndarray]) -> list[np.ndarray]:
    """Mean zero and variance one over the step's trained actions."""
    trained = [stream[t.loss_mask] for t, stream in zip(trajectories, streams, strict=True) if t.keep]
    values = np.concatenate([*trained, np.zeros(0)])
    mean = values.mean() if len(values) else 0.0
    scale = (values.var(ddof=1) + 1e-8) ** -0.5 if len(values) > 1 else 1.0
    return [(stream - mean) * scale * t.loss_mask for t, stream in zip(trajectories, streams, strict=True)]


# ---- estimators ------------------------------------------------------------------------------------------------------


@register_advantage
def grpo(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """GRPO (arXiv:2402.03300): the reward minus its group's mean, over the deviation that ``algorithm.std`` names.

    Flow-GRPO (arXiv:2505.05470) divides by that of the whole step (``std=step``) or of the group, with
    ``std_epsilon=1e-4``.
    """
    return _on_actions(trajectories, _normalized(trajectories, total_rewards(trajectories), config))


@register_advantage
def dr_grpo(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """Dr.GRPO (arXiv:2503.20783): the reward minus its group's mean."""
    return _on_actions(trajectories, _centered(trajectories, total_rewards(trajectories)))


@register_advantage
def rloo(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """RLOO (arXiv:2402.14740): the reward minus the mean of the others in its group."""

    def leave_one_out(rewards: np.ndarray, _: np.ndarray) -> np.ndarray:
        return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)

    return _on_actions(trajectories, _by_group(trajectories, total_rewards(trajectories), leave_one_out))


@register_advantage
def opo(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """OPO (arXiv:2505.23585): the baseline is the mean of the group, each reward weighed by its response's length."""

    def minus_optimum(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return rewards - np.average(rewards, weights=lengths if lengths.any() else None)

    return _on_actions(trajectories, _by_group(trajectories, total_rewards(trajectories), minus_optimum))


@register_advantage
def mean_baseline(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """REINFORCE with the mean reward of the whole step as its baseline."""
    rewards = total_rewards(trajectories)
    return _on_actions(trajectories, rewards - rewards.mean() if len(rewards) else rewards)


@register_advantage
def gpg(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """GPG (arXiv:2504.02546, eq. 7): alpha times the reward minus its group's mean.

    alpha makes up for groups that teach nothing: all trajectories over those in groups whose rewards differ, or over
    those with a reward other than zero, as the authors' code counts (``algorithm.gpg_scale=nonzero``).
    """
    rewards = total_rewards(trajectories)
    keep = np.array([t.keep for t in trajectories], bool)  # of the others the loss has no share already
    if config.gpg_scale == "nonzero":
        counted = np.count_nonzero(rewards[keep])
    else:
        groups = group_indices(trajectories)
        counted = sum(int(keep[group].sum()) for group in groups if np.ptp(rewards[group]) > 0)
    return _on_actions(trajectories, _centered(trajectories, rewards) * keep.sum() / max(counted, 1))


@register_advantage
def grpo_passk(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """Pass@k (arXiv:2503.19595): only the best of a group learns, by what it has more than the second best.

    Over the deviation that ``algorithm.std`` names. A tie for the best teaches nothing.
    """
    rewards = total_rewards(trajectories)

    def gain(rewards: np.ndarray, _: np.ndarray) -> np.ndarray:
        second, first = np.sort(rewards)[-2:]
        return np.where(rewards == first, first - second, 0.0)

    gains = _by_group(trajectories, rewards, gain)
    return _on_actions(trajectories, _over_deviation(trajectories, gains, rewards, config))


@register_advantage
def max_rl(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """MaxRL (arXiv:2602.02710): the reward minus its group's mean, over that mean; rewards must not be negative."""
    rewards = total_rewards(trajectories)
    if (rewards < 0).any():
        trajectory = trajectories[int(rewards.argmin())]
        raise ValueError(
            f"{trajectory.prompt.id}: algorithm.advantage=max_rl needs rewards of at least 0, not {rewards.min()}"
        )
    return _on_actions(
        trajectories, _by_group(trajectories, rewards, lambda r, _: (r - r.mean()) / (r.mean() + config.std_epsilon))
    )


@register_advantage
def multi_reward(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """The advantages of ``grpo`` for every reward of ``algorithm.reward_weights``, weighed and added up.

    MixGRPO's advantage_aggr (arXiv:2507.21802): a reward of large spread does not drown the others.
    """
    scores = np.zeros(len(trajectories))
    for name, weight in config.reward_weights.items():
        rewards = named_rewards(trajectories, name, "algorithm.reward_weights")
        scores += weight * _normalized(trajectories, rewards, config)
    return _on_actions(trajectories, scores)


@register_advantage
def gdpo(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """GDPO (arXiv:2601.05242): ``multi_reward``, then mean zero and variance one over the step."""
    return _whiten(trajectories, multi_reward(trajectories, config))


@register_advantage
def reinforce_plus_plus(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """REINFORCE++ (arXiv:2501.03262): discounted sums of rewards to go, mean zero and variance one over the step."""
    streams = [_spread(t, _to_go(_rewards_of_actions(t), config.gamma)) for t in trajectories]
    return _whiten(trajectories, streams)


@register_advantage
def reinforce_plus_plus_baseline(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """REINFORCE++ with its group's mean as the baseline: ``dr_grpo``, mean zero and variance one over the step."""
    return _whiten(trajectories, dr_grpo(trajectories, config))


@register_advantage
def remax(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """ReMax (arXiv:2310.10505): rewards to go minus what the greedy response to the same prompt earned."""
    for trajectory in trajectories:
        if trajectory.greedy_reward is None:
            raise ValueError(f"{trajectory.prompt.id}: algorithm.advantage=remax needs the reward of a greedy response")
    return [_spread(t, _to_go(_rewards_of_actions(t), 1.0) - t.greedy_reward) for t in trajectories]


@register_advantage
def gae(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """GAE (arXiv:1506.02438) of the critic's ``values``, mean zero and variance one over the step."""
    return _whiten(trajectories, [_gae(trajectory, config) for trajectory in trajectories])


def value_targets(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """Returns [N] float32 that the critic is to learn: its values plus the advantages before whitening."""
    return [(_gae(t, config) + t.values * t.loss_mask).astype(np.float32) for t in trajectories]


def _gae(trajectory: Trajectory, config: AlgorithmConfig) -> np.ndarray:
    """[N]; words of tools are skipped: the action after them follows the one before."""
    if trajectory.values is None:
        raise ValueError(f"{trajectory.prompt.id}: algorithm.advantage=gae needs a critic's values")
    values = trajectory.values[trajectory.loss_mask].astype(np.float64)
    errors = _rewards_of_actions(trajectory) + config.gamma * np.append(values[1:], 0.0)[: len(values)] - values
    return _spread(trajectory, _to_go(errors, config.gamma * config.lam))


@register_advantage
def srft(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> list[np.ndarray]:
    """SRFT (arXiv:2506.19767): 1 for the policy's right responses and -1 for its wrong ones; an expert's as in grpo."""
    scores = _normalized(trajectories, total_rewards(trajectories), config)
    for index, trajectory in enumerate(trajectories):
        if not trajectory.has_expert:
            scores[index] = 1.0 if trajectory.reward >= config.success_reward else -1.0
    return _on_actions(trajectories, scores)
