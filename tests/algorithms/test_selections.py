"""Selections over a step: as many as asked for, whatever the order, and by numbers that belong to the actions."""

import numpy as np
import torch

from megarl.algorithms.selections import SELECTIONS, action_uniforms, covariances
from megarl.config import AlgorithmConfig


def step_of(n=1000, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64)
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    return logprobs, advantages, torch.rand(n, generator=g, dtype=torch.float64)


def test_kl_cov_takes_the_largest_and_breaks_ties_by_lot():
    logprobs, advantages, uniform = step_of()
    config = AlgorithmConfig(kl_cov_ratio=0.02)
    chosen = SELECTIONS["kl_cov"](logprobs, advantages, uniform, config)
    covariance = covariances(logprobs, advantages)
    assert chosen.sum() == 20
    assert covariance[chosen].min() >= covariance[~chosen].max()
    tied = SELECTIONS["kl_cov"](logprobs, torch.zeros(1000), uniform, config)
    assert tied.nonzero()[:, 0].tolist() == sorted(uniform.argsort()[:20].tolist())
    assert SELECTIONS["kl_cov"](logprobs[:3], advantages[:3], uniform[:3], config).sum() == 1  # at least one


def test_clip_cov_draws_between_its_bounds():
    logprobs, advantages, uniform = step_of(seed=1)
    config = AlgorithmConfig(clip_cov_ratio=0.03, clip_cov_low=0.1, clip_cov_high=0.4)
    chosen = SELECTIONS["clip_cov"](logprobs, advantages, uniform, config)
    covariance = covariances(logprobs, advantages)
    assert chosen.sum() == 30
    assert covariance[chosen].min() > 0.1
    assert covariance[chosen].max() < 0.4
    other = SELECTIONS["clip_cov"](logprobs, advantages, step_of(seed=2)[2], config)
    assert not chosen.equal(other)
    narrow = AlgorithmConfig(clip_cov_low=100.0, clip_cov_high=101.0)
    assert not SELECTIONS["clip_cov"](logprobs, advantages, uniform, narrow).any()


def test_selections_do_not_depend_on_the_order():
    logprobs, advantages, uniform = step_of(seed=3)
    advantages = advantages.round()  # ties
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    config = AlgorithmConfig(kl_cov_ratio=0.1, clip_cov_ratio=0.1, clip_cov_low=0.01)
    for select in SELECTIONS.values():
        chosen = select(logprobs, advantages, uniform, config)
        shuffled = select(logprobs[order], advantages[order], uniform[order], config)
        assert shuffled.equal(chosen[order])
        empty = logprobs[:0]
        assert select(empty, empty, empty, config).shape == (0,)


def test_every_action_has_a_number_of_its_own():
    n, random = 20000, np.random.default_rng(0)
    identity = [
        np.arange(n) % 500,
        random.integers(0, 1000, n),
        -random.random(n).astype(np.float32),
        np.repeat(random.normal(size=n // 500), 500).astype(np.float32),
    ]
    uniform = action_uniforms(*identity)
    assert 0 <= uniform.min() < uniform.max() < 1
    assert len(np.unique(uniform)) == n
    assert np.histogram(uniform, bins=10, range=(0, 1))[0].std() < 4 * (n / 10 * 0.9) ** 0.5
    order = random.permutation(n)
    np.testing.assert_array_equal(action_uniforms(*(stream[order] for stream in identity)), uniform[order])
    assert action_uniforms(*(stream[:0] for stream in identity)).shape == (0,)
