"""Every formula again, written from its paper: padded tensors in float64, loops over trajectories and actions.

Nothing here is shared with the code under test but the names of the knobs (``c``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarl.config import AlgorithmConfig
from megarl.types import Trajectory

# ---- advantages -----------------------------------------------------------------------------------------------------


def reward(t: Trajectory) -> float:
    extra = (
        0.0
        if t.action_rewards is None
        else sum(float(r) for r, m in zip(t.action_rewards, t.loss_mask, strict=True) if m)
    )
    return t.reward + extra


def others(
    trajectories: Sequence[Trajectory], t: Trajectory, of: Callable[[Trajectory], float] = reward
) -> list[float]:
    """What the members of the group of ``t`` earned, itself included."""
    return [of(o) for o in trajectories if o.group_id == t.group_id]


def spread_of(trajectories, t, c, of=reward) -> float:
    if c.std == "none":
        return 1.0
    values = others(trajectories, t, of) if c.std == "group" else [of(o) for o in trajectories]
    return statistics.stdev(values) + c.std_epsilon


def everywhere(t: Trajectory, score: float) -> list[float]:
    return [score if m else 0.0 for m in t.loss_mask]


def sequence_level(score: Callable) -> Callable:
    """An estimator that gives all actions of a trajectory ``score(trajectories, t, c)``; zero to one that is alone."""

    def estimator(trajectories, c):
        alone = [len(others(trajectories, t)) == 1 for t in trajectories]
        return [
            everywhere(t, 0.0 if single else score(trajectories, t, c))
            for t, single in zip(trajectories, alone, strict=True)
        ]

    return estimator


def whitened(estimator: Callable) -> Callable:
    def estimate(trajectories, c):
        streams = estimator(trajectories, c)
        values = [
            a for t, s in zip(trajectories, streams, strict=True) for a, m in zip(s, t.loss_mask, strict=True) if m
        ]
        mean, variance = statistics.fmean(values), statistics.variance(values)
        return [
            [(a - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for a, m in zip(s, t.loss_mask, strict=True)]
            for t, s in zip(trajectories, streams, strict=True)
        ]

    return estimate


def grpo(ts, t, c):
    return (reward(t) - statistics.fmean(others(ts, t))) / spread_of(ts, t, c)


def rloo(ts, t, c):
    rest = [reward(o) for o in ts if o.group_id == t.group_id and o is not t]
    return reward(t) - statistics.fmean(rest)


def opo(ts, t, c):
    group = [o for o in ts if o.group_id == t.group_id]
    lengths = [int(o.loss_mask.sum()) for o in group]
    if not sum(lengths):
        lengths = [1] * len(group)
    return reward(t) - sum(n * reward(o) for n, o in zip(lengths, group, strict=True)) / sum(lengths)


def gpg(ts, t, c):
    if c.gpg_scale == "informative":
        counted = sum(len(set(others(ts, o))) > 1 for o in ts)
    else:
        counted = sum(reward(o) != 0 for o in ts)
    return len(ts) / max(1, counted) * (reward(t) - statistics.fmean(others(ts, t)))


def grpo_passk(ts, t, c):
    first, second = sorted(others(ts, t), reverse=True)[:2]
    return (first - second) / spread_of(ts, t, c) if reward(t) == first else 0.0


def max_rl(ts, t, c):
    mean = statistics.fmean(others(ts, t))
    return (reward(t) - mean) / (mean + c.std_epsilon)


def multi_reward(ts, t, c):
    total = 0.0
    for name, weight in c.reward_weights.items():

        def of(o, name=name):
            return o.rewards[name]

        total += weight * (of(t) - statistics.fmean(others(ts, t, of))) / spread_of(ts, t, c, of)
    return total


def steps_of(t: Trajectory) -> list[tuple[int, float]]:
    """(place, reward) of each of the policy's actions; the last one earns ``t.reward`` too."""
    places = [i for i, m in enumerate(t.loss_mask) if m]
    rewards = [0.0 if t.action_rewards is None else float(t.action_rewards[i]) for i in places]
    if rewards:
        rewards[-1] += t.reward
    return list(zip(places, rewards, strict=True))


def reinforce_plus_plus(ts, c):
    streams = []
    for t in ts:
        stream, steps = [0.0] * len(t.loss_mask), steps_of(t)
        for k, (place, _) in enumerate(steps):
            stream[place] = sum(c.gamma ** (j - k) * r for j, (_, r) in enumerate(steps) if j >= k)
        streams.append(stream)
    return streams


def remax(ts, c):
    streams = []
    for t in ts:
        stream, steps = [0.0] * len(t.loss_mask), steps_of(t)
        for k, (place, _) in enumerate(steps):
            stream[place] = sum(r for _, r in steps[k:]) - t.greedy_reward
        streams.append(stream)
    return streams


def gae_plain(ts, c):
    """A_t as the sum over l of (gamma lambda)^l delta_{t+l}."""
    streams = []
    for t in ts:
        stream, steps = [0.0] * len(t.loss_mask), steps_of(t)
        value = [float(t.values[place]) for place, _ in steps] + [0.0]
        delta = [r + c.gamma * value[k + 1] - value[k] for k, (_, r) in enumerate(steps)]
        for k, (place, _) in enumerate(steps):
            stream[place] = sum((c.gamma * c.lam) ** (j - k) * delta[j] for j in range(k, len(steps)))
        streams.append(stream)
    return streams


def mean_baseline(ts, c):
    mean = statistics.fmean(reward(t) for t in ts)
    return [everywhere(t, reward(t) - mean) for t in ts]


def srft_advantage(ts, c):
    expert = sequence_level(grpo)(ts, c)
    return [
        stream
        if t.expert_mask is not None and t.expert_mask.any()
        else everywhere(t, 1.0 if t.reward >= c.success_reward else -1.0)
        for t, stream in zip(ts, expert, strict=True)
    ]


ADVANTAGES: dict[str, Callable[[Sequence[Trajectory], AlgorithmConfig], list[list[float]]]] = {
    "grpo": sequence_level(grpo),
    "dr_grpo": sequence_level(lambda ts, t, c: reward(t) - statistics.fmean(others(ts, t))),
    "rloo": sequence_level(rloo),
    "opo": sequence_level(opo),
    "gpg": sequence_level(gpg),
    "grpo_passk": sequence_level(grpo_passk),
    "max_rl": sequence_level(max_rl),
    "mean_baseline": mean_baseline,
    "multi_reward": sequence_level(multi_reward),
    "gdpo": whitened(sequence_level(multi_reward)),
    "reinforce_plus_plus": whitened(reinforce_plus_plus),
    "reinforce_plus_plus_baseline": whitened(
        sequence_level(lambda ts, t, c: reward(t) - statistics.fmean(others(ts, t)))
    ),
    "remax": remax,
    "gae": whitened(gae_plain),
    "srft": srft_advantage,
}


# ---- reductions -----------------------------------------------------------------------------------------------------


def reduce(losses: Tensor, mask: Tensor, groups: Sequence[int], how: str, longest: int) -> Tensor:
    """``losses`` [B, L] to one number; ``mask`` says what counts."""
    sums = [(losses[b] * mask[b]).sum() for b in range(len(losses)) if mask[b].any()]
    lengths = [int(mask[b].sum()) for b in range(len(losses)) if mask[b].any()]
    owners = [groups[b] for b in range(len(losses)) if mask[b].any()]
    if not sums:
        return losses.sum() * 0
    if how == "token_mean":
        return sum(sums) / sum(lengths)
    if how == "sequence_mean":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    if how == "sequence_sum":
        return sum(sums) / len(sums)
    if how == "sequence_sum_norm":
        return sum(sums) / len(sums) / longest
    assert how == "prompt_mean"
    prompts = [
        sum(s for s, o in zip(sums, owners, strict=True) if o == owner)
        / sum(n for n, o in zip(lengths, owners, strict=True) if o == owner)
        for owner in sorted(set(owners))
    ]
    return sum(prompts) / len(prompts)


# ---- policy losses: [B, L] each -------------------------------------------------------------------------------------


def each(p, formula: Callable[..., Tensor]) -> Tensor:
    """``formula(new, old, advantage)`` of every action, one by one."""
    rows = []
    for b in range(len(p.mask)):
        rows.append(
            torch.stack([formula(p.new[b, t], p.old[b, t], p.advantages[b, t]) for t in range(p.mask.shape[1])])
        )
    return torch.stack(rows)


def surrogate(r: Tensor, a: Tensor, c: AlgorithmConfig) -> Tensor:
    """PPO's L^CLIP, to be maximised."""
    clipped = min(max(float(r.detach()), 1 - c.clip_ratio_low), 1 + c.clip_ratio_high)
    inside = clipped == float(r.detach())
    return min(r * a, (r if inside else r.detach() * 0 + clipped) * a, key=Tensor.detach)


def ppo(p, c):
    def formula(new, old, a):
        value = surrogate(torch.exp(new - old), a, c)
        if a < 0 and c.clip_ratio_dual:
            value = max(value, c.clip_ratio_dual * a, key=Tensor.detach)
        return -value

    return each(p, formula)


def sequence_means(p, values: Tensor) -> Tensor:
    """[B, 1]"""
    return torch.stack(
        [values[b][p.mask[b]].mean() if p.mask[b].any() else values[b].sum() * 0 for b in range(len(values))]
    )[:, None]


def gspo(p, c):
    """s_i = (pi(y|x) / pi_old(y|x))^(1/|y|); the token form s_i,t = sg(s_i) pi_t / sg(pi_t)."""
    s = sequence_means(p, p.new - p.old).exp().detach()
    token = s * p.new.exp() / p.new.exp().detach()
    rows = [
        [-surrogate(token[b, t], p.advantages[b, t], c) for t in range(p.mask.shape[1])] for b in range(len(p.mask))
    ]
    return torch.stack([torch.stack(row) for row in rows])


def gmpo(p, c):
    """The geometric mean over t of min(r^s, clip(r, e^-low, e^high)^s)^s with s the sign of the advantage, times it."""
    out = []
    for b in range(len(p.mask)):
        places = p.mask[b].nonzero()[:, 0].tolist()
        if not places:
            out.append(p.new[b] * 0)
            continue
        a = p.advantages[b, places].mean()
        s = 1.0 if a > 0 else -1.0
        product = torch.ones((), dtype=torch.float64)
        for t in places:
            r = torch.exp(p.new[b, t] - p.old[b, t])
            bounded = r.clamp(math.exp(-c.clip_ratio_low), math.exp(c.clip_ratio_high))
            product = product * min(r**s, bounded**s, key=Tensor.detach) ** s
        out.append((-a * product ** (1 / len(places))).expand(p.mask.shape[1]))
    return torch.stack(out)


def cispo(p, c):
    def formula(new, old, a):
        weight = min(max(math.exp((new - old).detach()), 1 - c.clip_ratio_low), 1 + c.clip_ratio_high)
        return -weight * a * new

    return each(p, formula)


def sapo(p, c):
    def formula(new, old, a):
        tau = c.sapo_tau_positive if a > 0 else c.sapo_tau_negative
        return -a * (4 / tau) / (1 + torch.exp(-tau * (torch.exp(new - old) - 1)))

    return each(p, formula)


def covariance(p) -> dict[tuple[int, int], float]:
    at = [(b, t) for b, t in p.mask.nonzero().tolist()]
    lp, a = ({k: float(x[k]) for k in at} for x in (p.old, p.advantages))
    mean_lp, mean_a = statistics.fmean(lp.values()), statistics.fmean(a.values())
    return {k: (lp[k] - mean_lp) * (a[k] - mean_a) for k in at}


def clip_cov(p, c):
    """The drawn ones lose their gradient."""
    cov = covariance(p)
    inside = sorted((float(p.uniform[k]), k) for k, v in cov.items() if c.clip_cov_low < v < c.clip_cov_high)
    loss = each(p, lambda new, old, a: -surrogate(torch.exp(new - old), a, c))
    for _, k in inside[: max(1, int(c.clip_cov_ratio * len(cov)))]:
        loss = loss.clone()
        loss[k] = 0
    return loss


def kl_cov(p, c):
    cov = covariance(p)
    top = sorted(cov, key=lambda k: (-cov[k], float(p.uniform[k])))[: max(1, int(c.kl_cov_ratio * len(cov)))]
    penalty = torch.zeros_like(p.old)
    for k in top:
        penalty[k] = c.kl_cov_coef
    return each(p, lambda new, old, a: -a * torch.exp(new - old)) + penalty * (p.new - p.old).abs()


def luffy_f(lp: Tensor, c: AlgorithmConfig) -> Tensor:
    q = torch.exp(lp)
    return {
        "none": lambda: q,
        "logp": lambda: c.reshape_weight * torch.log(q),
        "p_logp": lambda: q + c.reshape_weight * torch.log(q),
        "square_root": lambda: torch.sqrt(q),
        "pow": lambda: q**c.reshape_exponent,
        "p_div_p": lambda: q / (q + c.reshape_weight),
    }[c.off_policy_reshape]()


def luffy_off(p, c):
    if c.off_policy_reshape == "reject":
        taken = (p.uniform < p.new.exp()).double()
        return -p.advantages * taken / p.new.detach().exp() * p.new.exp()
    return -p.advantages * luffy_f(p.new, c)


def luffy_on(p, c):
    d, w = p.new - p.old, c.reshape_weight
    r = {
        "none": lambda: d.exp(),
        "logp": lambda: d,
        "p_logp": lambda: d.exp() + w * d,
        "square_root": lambda: d.exp().sqrt(),
        "pow": lambda: d.exp() ** c.reshape_exponent,
        "p_div_p": lambda: p.new.exp() / (p.new.exp() + w) / (p.old.exp() / (p.old.exp() + w)),
    }[c.on_policy_reshape]()
    rows = [[-surrogate(r[b, t], p.advantages[b, t], c) for t in range(p.mask.shape[1])] for b in range(len(p.mask))]
    return torch.stack([torch.stack(row) for row in rows])


def srft_on(p, c):
    h = sequence_means(p, p.entropy.detach())
    return torch.where(p.advantages > 0, -0.1 * h.exp() * p.advantages * p.new, -p.advantages * p.new)


def srft_off(p, c):
    h = sequence_means(p, p.entropy.detach())
    f = luffy_f(p.new, c)
    rows = [[-surrogate(f[b, t], p.advantages[b, t], c) for t in range(p.mask.shape[1])] for b in range(len(p.mask))]
    return torch.stack([torch.stack(row) for row in rows]) - 0.5 * (-h).exp() * p.new


def mu(step: int, c: AlgorithmConfig) -> float:
    w, d, peak, valley = c.chord_mu_warmup_steps, c.chord_mu_decay_steps, c.chord_mu_peak, c.chord_mu_valley
    if step < w:
        return step / w * peak
    return valley if step >= w + d else valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - w) / d))


def chord_off(p, c):
    q = p.new.detach().exp()
    return -mu(p.step, c) * (q * (1 - q) if c.chord_phi else 1.0) * p.new


# name -> loss of own actions, and where there are experts the loss of theirs
LOSSES: dict[str, tuple[Callable, Callable | None]] = {
    "ppo_clip": (ppo, None),
    "reinforce": (lambda p, c: -p.advantages * p.new, None),
    "gspo": (gspo, None),
    "gmpo": (gmpo, None),
    "cispo": (cispo, None),
    "sapo": (sapo, None),
    "clip_cov": (clip_cov, None),
    "kl_cov": (kl_cov, None),
    "sft": (lambda p, c: -p.new, None),
    "luffy": (luffy_on, luffy_off),
    "srft": (srft_on, srft_off),
    "ppo_sft": (ppo, lambda p, c: -c.sft_coef * p.new),
    "chord": (lambda p, c: (1 - mu(p.step, c)) * ppo(p, c), chord_off),
}


def kl(p, c) -> Tensor:
    r = torch.exp(p.ref - p.new)  # Schulman's r = p / q
    value = {
        "k1": lambda: -torch.log(r),
        "abs": lambda: torch.log(r).abs(),
        "k2": lambda: torch.log(r) ** 2 / 2,
        "k3": lambda: (r - 1) - torch.log(r),
    }[c.kl_estimator.rstrip("+")]()
    if c.kl_estimator.endswith("+"):  # the gradient of k2 is (log q - log p) grad log q
        return value.detach() + (p.new - p.ref).detach() * (p.new - p.new.detach())
    return value


def correction(p, c) -> Tensor:
    """The weight of every action [B, L] for what engine and trainer differ by."""
    out = torch.ones_like(p.old)
    if c.rollout_correction == "none":
        return out
    trainer = p.new.detach() if c.bypass_old_logprobs else p.old

    def ratio(b: int, t: int) -> float:
        return math.exp(trainer[b, t] - p.rollout[b, t])

    for b, t in p.mask.nonzero().tolist():  # the engine did not sample what an expert wrote
        if p.expert[b, t]:
            continue
        ratios = [ratio(b, j) for j in (p.mask[b] & ~p.expert[b]).nonzero()[:, 0].tolist()]
        rho = {
            "token": ratio(b, t),
            "sequence": math.prod(ratios),
            "geometric": math.prod(ratios) ** (1 / len(ratios)),
        }[c.rollout_correction_level]
        inside = c.rollout_correction_low <= rho <= c.rollout_correction_high
        out[b, t] = {
            "truncate": min(rho, c.rollout_correction_high),
            "mask": rho if inside else 0.0,
            "reject": float(inside),
        }[c.rollout_correction]
    return out


def step_loss(p, groups: Sequence[int], c: AlgorithmConfig, longest: int) -> Tensor:
    """Everything together: policy loss, correction, KL and entropy, reduced."""
    own, expert = LOSSES[c.policy_loss]
    weight = correction(p, c)
    entropy = -c.entropy_coef * p.entropy
    losses = own(p, c) * weight + entropy + (c.kl_coef * kl(p, c) if c.kl_coef else 0.0)
    if expert is None:
        return reduce(losses, p.mask, groups, c.loss_weights, longest)
    theirs = expert(p, c) + entropy  # no KL: its estimators take actions that the policy sampled
    if c.expert_weights == "joint":
        return reduce(torch.where(p.expert, theirs, losses), p.mask, groups, c.loss_weights, longest)
    return reduce(losses, p.mask & ~p.expert, groups, c.loss_weights, longest) + reduce(
        theirs, p.mask & p.expert, groups, c.loss_weights, longest
    )
