"""Losses, penalties and corrections against forms written from the papers: values and gradients, in float64."""

import dataclasses

import pytest
import torch

from megarl.algorithms.policy_losses import POLICY_LOSSES, Actions, chord_mu, policy_loss, value_loss
from megarl.algorithms.selections import SELECTIONS
from megarl.config import AlgorithmConfig
from tests.algorithms import naive
from tests.algorithms.steps import LONGEST, flat_loss, padded_of, trajectories_of

WITH_EXPERTS = {name for name, (_, expert) in naive.LOSSES.items() if expert is not None}
COV = {"clip_cov_ratio": 0.1, "clip_cov_low": 0.05, "clip_cov_high": 2.0, "kl_cov_ratio": 0.1, "kl_cov_coef": 0.7}
CASES = {
    "ppo_clip": [
        {"clip_ratio_high": 0.28, "clip_ratio_dual": 1.5},
        {"clip_ratio_dual": 0.0},
        {"clip_ratio_low": float("inf"), "clip_ratio_high": float("inf"), "clip_ratio_dual": 0.0},
    ],
    "gspo": [{"clip_ratio_low": 0.02, "clip_ratio_high": 0.03}],
    "gmpo": [{"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}],
    "cispo": [{}, {"clip_ratio_low": 1.0, "clip_ratio_high": 0.1}],
    "sapo": [{"sapo_tau_positive": 1.2, "sapo_tau_negative": 2.0}],
    "clip_cov": [COV],
    "kl_cov": [COV],
    "luffy": [
        *({"off_policy_reshape": name, "clip_ratio_dual": 0.0} for name in ("none", "logp", "p_logp", "reject")),
        *({"off_policy_reshape": name, "clip_ratio_dual": 0.0} for name in ("square_root", "pow", "p_div_p")),
        *({"on_policy_reshape": name, "clip_ratio_dual": 0.0} for name in ("logp", "p_logp", "square_root", "pow")),
        {"on_policy_reshape": "p_div_p", "reshape_weight": 0.3, "reshape_exponent": 0.3, "clip_ratio_dual": 0.0},
    ],
    "srft": [{"advantage": "srft", "expert_weights": "separate", "off_policy_reshape": "none"}],
    "ppo_sft": [{"expert_weights": "separate", "sft_coef": 0.3}],
    "chord": [{"expert_weights": "separate"}, {"expert_weights": "separate", "chord_phi": False}],
}


def assert_equal_to_naive(config: AlgorithmConfig, seed: int, scale: float = 0.3) -> None:
    batch = trajectories_of(seed, experts=config.policy_loss in WITH_EXPERTS)
    p = padded_of(batch, config, seed, scale)
    groups = [t.group_id for t in batch]
    leaves = p.leaves()
    loss = flat_loss(batch, p, config, [range(len(batch))])
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    leaves = p.leaves()
    expected = naive.step_loss(p, groups, config, LONGEST)
    expected_gradients = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # loss weights travel in float32
    assert expected_gradients[0].any()
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-9)


def test_every_policy_loss_has_a_naive_form():
    assert POLICY_LOSSES.keys() == naive.LOSSES.keys()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_policy_losses_equal_the_naive_forms(name, seed):
    for knobs in CASES.get(name, [{}]):
        assert_equal_to_naive(AlgorithmConfig(policy_loss=name, **knobs), seed)


@pytest.mark.parametrize(
    "reduction", ["token_mean", "sequence_mean", "sequence_sum", "sequence_sum_norm", "prompt_mean"]
)
@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gmpo"])
def test_reductions_equal_the_naive_forms(name, reduction):
    assert_equal_to_naive(AlgorithmConfig(policy_loss=name, loss_weights=reduction), seed=4)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+"])
def test_kl_and_entropy_equal_the_naive_forms(estimator):
    assert_equal_to_naive(AlgorithmConfig(kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.02), seed=5)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(
    ("correction", "low", "high"),
    [("truncate", 0.0, 1.05), ("mask", 0.0, 1.1), ("mask", 0.9, 1.1), ("reject", 0.9, 1.1)],
)
def test_corrections_equal_the_naive_forms(correction, low, high, level):
    config = AlgorithmConfig(
        rollout_correction=correction,
        rollout_correction_level=level,
        rollout_correction_low=low,
        rollout_correction_high=high,
    )
    assert_equal_to_naive(config, seed=6, scale=0.05)
    assert_equal_to_naive(dataclasses.replace(config, policy_loss="luffy", clip_ratio_dual=0.0), seed=7, scale=0.05)
    assert_equal_to_naive(
        dataclasses.replace(config, policy_loss="reinforce", bypass_old_logprobs=True), seed=8, scale=0.05
    )


def actions_of(n=64, seed=0, **fields):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, generator=g, dtype=torch.float64) - 0.1
    streams = {
        "logprobs": (old + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_(),
        "entropy": torch.rand(n, generator=g, dtype=torch.float64),
        "old_logprobs": old,
        "ref_logprobs": None,
        "rollout_logprobs": old,
        "advantages": torch.randn(n, generator=g, dtype=torch.float64),
        "loss_weights": torch.ones(n, dtype=torch.float64),
        "sequence_ids": torch.zeros(n, dtype=torch.long),
        "num_sequences": 1,
    }
    return Actions(**streams | fields)


def test_ppo_clip_tells_what_it_clipped():
    a = actions_of()
    _, metrics = policy_loss(a, AlgorithmConfig(clip_ratio_high=0.28, clip_ratio_dual=1.5))
    ratio = (a.logprobs - a.old_logprobs).exp()
    clipped = ((a.advantages > 0) & (ratio > 1.28)) | ((a.advantages < 0) & (ratio < 0.8))
    assert metrics["actor/pg_clipfrac"].bool().equal(clipped)
    assert metrics["actor/pg_clipfrac_lower"].bool().equal((a.advantages < 0) & (ratio > 1.5))
    torch.testing.assert_close(metrics["actor/ppo_kl"], a.old_logprobs - a.logprobs.detach())
    assert 0 < clipped.sum() < len(ratio)
    assert metrics["actor/pg_clipfrac_lower"].sum() > 0


OWN = sorted(POLICY_LOSSES.keys() - WITH_EXPERTS - {"sft"})


@pytest.mark.parametrize("name", OWN)
def test_on_policy_gradient_is_reinforce(name):
    """With nothing clipped and one sequence's advantage everywhere, all of them start out the same."""
    a = actions_of(advantages=torch.full((64,), -0.7, dtype=torch.float64))
    a.old_logprobs, a.selected = a.logprobs.detach(), torch.zeros(64, dtype=torch.bool)
    loss, _ = policy_loss(a, AlgorithmConfig(policy_loss=name))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), a.logprobs)[0], -a.advantages)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_extremes_stay_finite_and_nothing_is_nothing(name):
    config = AlgorithmConfig(policy_loss=name, advantage="grpo")
    huge = actions_of(selected=torch.ones(64, dtype=torch.bool), expert_mask=torch.zeros(64, dtype=torch.bool), step=0)
    huge.old_logprobs = huge.logprobs.detach() + 1000 * torch.randn(64, dtype=torch.float64).sign()
    loss, _ = policy_loss(huge, config)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), huge.logprobs)[0]).all()
    nothing = actions_of(
        0, selected=torch.ones(0, dtype=torch.bool), expert_mask=torch.zeros(0, dtype=torch.bool), step=0
    )
    loss, metrics = policy_loss(nothing, config)
    assert loss.shape == (0,)
    assert all(value.shape == (0,) for value in metrics.values())


def test_what_a_loss_misses_is_named():
    with pytest.raises(ValueError, match=r"algorithm\.policy_loss='ppo'.*ppo_clip"):
        policy_loss(actions_of(), AlgorithmConfig(policy_loss="ppo"))
    for name in WITH_EXPERTS:
        with pytest.raises(ValueError, match=f"policy_loss={name} needs"):
            policy_loss(actions_of(), AlgorithmConfig(policy_loss=name))
    for name in SELECTIONS:
        with pytest.raises(ValueError, match=f"policy_loss={name} needs a selection over the whole step"):
            policy_loss(actions_of(), AlgorithmConfig(policy_loss=name))


def test_chord_goes_up_and_down():
    config = AlgorithmConfig(chord_mu_warmup_steps=10, chord_mu_decay_steps=20, chord_mu_peak=0.6, chord_mu_valley=0.2)
    assert [chord_mu(step, config) for step in (0, 5, 10)] == pytest.approx([0, 0.3, 0.6])
    assert [chord_mu(step, config) for step in (20, 30, 99)] == pytest.approx([0.4, 0.2, 0.2])
    assert chord_mu(0, AlgorithmConfig(chord_mu_warmup_steps=0, chord_mu_decay_steps=0)) == 0.02


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 2.0, 0.2], requires_grad=True)
    loss, metrics = value_loss(values, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0]), clip=0.5)
    # unclipped; clipped to 1.5, but the worse counts; clipped to 0.5, and the worse is the plain one
    torch.testing.assert_close(loss, torch.tensor([0.5, 2.0, 0.32]))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), values)[0], torch.tensor([1.0, 2.0, -0.8]))
    far, metrics = value_loss(values, torch.zeros(3), torch.tensor([1.0, 2.0, 0.2]), clip=0.1)
    torch.testing.assert_close(far, 0.5 * torch.tensor([0.9, 1.9, 0.1]).square())
    assert metrics["critic/vf_clipfrac"].tolist() == [1, 1, 1]
