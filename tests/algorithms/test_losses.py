"""Losses and penalties against forms written from the papers: values and gradients, in float64."""

import pytest
import torch

from megarl.algorithms.penalties import penalties
from megarl.algorithms.policy_losses import Actions, policy_loss
from megarl.config import AlgorithmConfig

N = 64


def actions(seed=0, *, reference=True):
    g = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(N, generator=g, dtype=torch.float64)

    old = -normal().abs() - 0.1
    return Actions(
        logprobs=(old + normal(0.5)).requires_grad_(),
        entropy=normal().abs().requires_grad_(),
        old_logprobs=old,
        ref_logprobs=old + normal(0.3) if reference else None,
        rollout_logprobs=old,
        advantages=normal(),
        loss_weights=torch.ones(N, dtype=torch.float64),
        sequence_ids=torch.zeros(N, dtype=torch.long),
        num_sequences=1,
    )


def naive_ppo(new, old, advantage, low, high, dual):
    ratio = torch.exp(new - old)
    surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return -max(surrogate, dual * advantage) if advantage < 0 else -surrogate


@pytest.mark.parametrize("seed", range(3))
def test_ppo_clip_equals_the_naive_form(seed):
    a = actions(seed)
    c = AlgorithmConfig(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=1.5)
    loss, metrics = policy_loss(a, c)
    new = a.logprobs.detach().clone().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    naive = torch.stack(
        [
            naive_ppo(x, o, v, one * 0.2, one * 0.28, 1.5)
            for x, o, v in zip(new, a.old_logprobs, a.advantages, strict=True)
        ]
    )
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), a.logprobs)[0], torch.autograd.grad(naive.sum(), new)[0])
    ratio = (a.logprobs - a.old_logprobs).exp()
    clipped = ((a.advantages > 0) & (ratio > 1.28)) | ((a.advantages < 0) & (ratio < 0.8))
    assert metrics["actor/pg_clipfrac"].bool().equal(clipped)
    assert metrics["actor/pg_clipfrac_lower"].bool().equal((a.advantages < 0) & (ratio > 1.5))
    assert 0 < clipped.sum() < N
    assert metrics["actor/pg_clipfrac_lower"].sum() > 0


def test_on_policy_gradient_is_reinforce():
    a = actions()
    a.old_logprobs = a.logprobs.detach()
    loss, _ = policy_loss(a, AlgorithmConfig())
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), a.logprobs)[0], -a.advantages)


def test_sft_is_cross_entropy():
    a = actions()
    loss, _ = policy_loss(a, AlgorithmConfig(policy_loss="sft"))
    torch.testing.assert_close(loss, -a.logprobs)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),  # of u = log reference - log policy, and their derivative by log policy
    [
        ("k1", lambda u: -u, lambda u: torch.ones_like(u)),
        ("abs", lambda u: u.abs(), lambda u: -u.sign()),
        ("k2", lambda u: u * u / 2, lambda u: -u),
        ("k3", lambda u: u.exp() - 1 - u, lambda u: 1 - u.exp()),
    ],
)
def test_kl_estimators(estimator, value, slope):
    a = actions()
    c = AlgorithmConfig(kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.01)
    loss, metrics = penalties(a, c)
    u = (a.ref_logprobs - a.logprobs).detach()
    torch.testing.assert_close(loss, 0.3 * value(u) - 0.01 * a.entropy)
    torch.testing.assert_close(metrics["actor/kl_loss"], value(u))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), a.logprobs)[0], 0.3 * slope(u))


def test_a_huge_ratio_stays_finite():
    a = actions(reference=False)
    a.old_logprobs = a.logprobs.detach() - 1000
    loss, _ = policy_loss(a, AlgorithmConfig())
    penalty, _ = penalties(a, AlgorithmConfig())
    assert torch.isfinite(loss + penalty).all()
    with pytest.raises(ValueError, match=r"algorithm\.policy_loss='ppo'.*ppo_clip"):
        policy_loss(a, AlgorithmConfig(policy_loss="ppo"))
