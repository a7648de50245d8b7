"""Random steps of trajectories, as the code under test sees them (flat streams) and as papers do (padded [B, L])."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarl.algorithms.advantages import compute_advantages
from megarl.algorithms.corrections import correction_weights
from megarl.algorithms.penalties import penalties
from megarl.algorithms.policy_losses import Actions, policy_loss
from megarl.algorithms.selections import SELECTIONS, action_uniforms
from megarl.algorithms.weights import compute_loss_weights
from megarl.config import AlgorithmConfig
from megarl.types import Prompt, Trajectory

LONGEST = 16
GROUPS = [3, 3, 3, 3, 7, 7, 0, 5, 5, 5, 9, 9, 9, 9, 9]  # sizes 4, 2, 1, 3, 5
TIED = 5  # the group whose rewards are all the same
SILENT = [1, 12]  # trajectories without a trained action


def trajectories_of(seed: int, *, experts: bool = False, shuffle: bool = True) -> list[Trajectory]:
    """A step with groups of several sizes, one of them alone, one tied; tools within responses; silent ones."""
    random = np.random.default_rng(seed)
    trajectories = []
    for index, group in enumerate(GROUPS):
        length = int(random.integers(3, LONGEST + 1))
        mask = (np.arange(length) >= 2) & (random.random(length) < 0.8) & (index not in SILENT)
        reward = 0.5 if group == TIED else float(random.choice([0.0, 0.0, 0.25, 1.0]))
        trajectories.append(
            Trajectory(
                prompt=Prompt(f"t/train/{group}", "t", []),
                group_id=group,
                loss_mask=mask,
                rollout_logprobs=(-random.exponential(size=length) * mask).astype(np.float32),
                rewards={"score": reward, "format": float(random.integers(2)), "length": float(random.normal())},
                reward=reward,
                action_rewards=(0.1 * random.normal(size=length)).astype(np.float32) if index % 3 else None,
                greedy_reward=float(group % 2),
                values=random.normal(size=length).astype(np.float32),
                expert_mask=mask & (index in (3, 5, 7, 14) or (np.arange(length) < 5)) if experts else None,
            )
        )
    if shuffle:
        random.shuffle(trajectories)
    return trajectories


@dataclass
class Padded:
    """The same with every stream [B, L] float64, and what a policy says of it."""

    mask: Tensor  # bool
    rollout: Tensor  # log-probs
    old: Tensor
    new: Tensor  # with gradient
    ref: Tensor
    entropy: Tensor  # with gradient
    advantages: Tensor
    expert: Tensor  # bool
    uniform: Tensor  # in [0, 1)
    step: int = 300

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Fresh ``new`` and ``entropy``, put in place of the present ones."""
        self.new = self.new.detach().clone().requires_grad_()
        self.entropy = self.entropy.detach().clone().requires_grad_()
        return self.new, self.entropy


def pad(streams: Sequence[np.ndarray]) -> Tensor:
    """[B, L], zero behind each."""
    rows = [np.pad(stream, (0, LONGEST - len(stream))) for stream in streams]
    return torch.from_numpy(np.stack(rows))


def padded_of(trajectories: Sequence[Trajectory], config: AlgorithmConfig, seed: int = 0, scale: float = 0.3) -> Padded:
    """Random log-probs around those of the rollout, and the advantages that ``config`` gives."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(len(trajectories), LONGEST, generator=g, dtype=torch.float64)

    for trajectory, stream in zip(trajectories, compute_advantages(trajectories, config), strict=True):
        trajectory.advantages = stream
    rollout = pad([t.rollout_logprobs for t in trajectories]).double()
    old = (rollout + 0.5 * scale * normal()).clamp(max=-1e-3)
    uniform = [
        action_uniforms(np.arange(len(t.loss_mask)), np.ones(len(t.loss_mask), int), t.rollout_logprobs, t.advantages)
        for t in trajectories
    ]
    return Padded(
        mask=pad([t.loss_mask for t in trajectories]),
        rollout=rollout,
        old=old,
        new=(old + scale * normal()).clamp(max=-1e-3).requires_grad_(),
        ref=old + scale * normal(),
        entropy=normal().abs().requires_grad_(),
        advantages=pad([t.advantages for t in trajectories]).double(),
        expert=pad([t.expert_mask if t.expert_mask is not None else t.loss_mask & False for t in trajectories]),
        uniform=pad(uniform),
    )


def flat_loss(
    trajectories: Sequence[Trajectory], p: Padded, config: AlgorithmConfig, microbatches: Sequence[Sequence[int]]
) -> Tensor:
    """The step's loss as the worker computes it, the trajectories dealt to ``microbatches`` in that order."""
    weights = pad(compute_loss_weights(trajectories, config, LONGEST)).double()
    rows = [(b, t) for microbatch in microbatches for b in microbatch for t in weights[b].nonzero()[:, 0].tolist()]
    at = tuple(torch.tensor(rows, dtype=torch.long).reshape(-1, 2).T)
    selected = torch.zeros_like(p.mask)
    if config.policy_loss in SELECTIONS:
        selected[at] = SELECTIONS[config.policy_loss](p.old[at], p.advantages[at], p.uniform[at], config)
    total = torch.zeros((), dtype=torch.float64)
    for microbatch in microbatches:
        places = [(s, b, t) for s, b in enumerate(microbatch) for t in weights[b].nonzero()[:, 0].tolist()]
        sequence, b, t = torch.tensor(places, dtype=torch.long).reshape(-1, 3).T
        actions = Actions(
            logprobs=p.new[b, t],
            entropy=p.entropy[b, t],
            old_logprobs=p.old[b, t],
            ref_logprobs=p.ref[b, t] if config.kl_coef else None,
            rollout_logprobs=p.rollout[b, t],
            advantages=p.advantages[b, t],
            loss_weights=weights[b, t],
            sequence_ids=sequence,
            num_sequences=len(microbatch),
            selected=selected[b, t],
            uniform=p.uniform[b, t],
            expert_mask=p.expert[b, t],
            step=p.step,
        )
        loss, _ = policy_loss(actions, config)
        correction, _ = correction_weights(actions, config)
        penalty, _ = penalties(actions, config)
        total = total + ((loss * correction + penalty) * actions.loss_weights).sum()
    return total / max(len(rows), 1)
