"""Advantages against forms written from the papers, by hand, and where they meet nothing to compare."""

import dataclasses
import math

import numpy as np
import pytest

from megarl.algorithms.advantages import ADVANTAGES, compute_advantages, value_targets
from megarl.config import AlgorithmConfig
from megarl.types import Prompt, Trajectory
from tests.algorithms import naive
from tests.algorithms.steps import SILENT, TIED, trajectories_of


def trajectory(group, reward, mask, **fields):
    mask = np.array(mask, bool)
    return Trajectory(
        prompt=Prompt("t/train/0", "t", []),
        group_id=group,
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        reward=reward,
        **fields,
    )


def test_grpo_by_hand():
    # group 5: rewards 1, 0, 0 -> mean 1/3, unbiased std 1/sqrt(3); group 2: a tie; group 9: alone
    batch = [
        trajectory(5, 1.0, [0, 1, 1]),
        trajectory(2, 0.5, [0, 1]),
        trajectory(5, 0.0, [0, 1]),
        trajectory(2, 0.5, [1]),
        trajectory(5, 0.0, [0, 0, 1]),
        trajectory(9, 7.0, [1]),
    ]
    streams = compute_advantages(batch, AlgorithmConfig())
    std = 3**-0.5 + 1e-6
    for stream, expected in zip(
        streams, [[0, 2 / 3 / std, 2 / 3 / std], [0, 0], [0, -1 / 3 / std], [0], [0, 0, -1 / 3 / std], [0]], strict=True
    ):
        np.testing.assert_allclose(stream, expected, rtol=1e-6)
        assert stream.dtype == np.float32
    plain = compute_advantages(batch, AlgorithmConfig(std="none"))
    np.testing.assert_allclose(plain[0], [0, 2 / 3, 2 / 3], rtol=1e-6)
    limited = compute_advantages(batch, AlgorithmConfig(advantage_clip=0.5))
    np.testing.assert_allclose(limited[0], [0, 0.5, 0.5])
    np.testing.assert_allclose(limited[2], [0, -0.5])


CASES = {
    "grpo": [{}, {"std": "none"}, {"std": "step", "std_epsilon": 1e-4}],
    "grpo_passk": [{}, {"std": "none"}, {"std": "step"}],
    "gpg": [{}, {"gpg_scale": "nonzero"}],
    "multi_reward": [
        {"reward_weights": {"score": 1.0, "format": 0.2, "length": -0.5}},
        {"reward_weights": {"score": 1}},
    ],
    "gdpo": [{"reward_weights": {"score": 1.0, "format": 0.2}}],
    "reinforce_plus_plus": [{}, {"gamma": 0.9}],
    "gae": [{}, {"gamma": 0.95, "lam": 0.8}],
}


def test_every_advantage_has_a_naive_form():
    assert ADVANTAGES.keys() == naive.ADVANTAGES.keys()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_advantages_equal_the_naive_forms(name, seed):
    for knobs in CASES.get(name, [{}]):
        config = AlgorithmConfig(advantage=name, **knobs)
        batch = trajectories_of(seed, experts=name == "srft")
        if name == "max_rl":
            batch = [dataclasses.replace(t, action_rewards=None) for t in batch]
        streams = ADVANTAGES[name](batch, config)
        assert any(stream.any() for stream in streams)
        for t, stream, expected in zip(batch, streams, naive.ADVANTAGES[name](batch, config), strict=True):
            np.testing.assert_allclose(stream, expected, rtol=1e-9, atol=1e-12)
            assert not stream[~t.loss_mask].any()
        for stream, double in zip(compute_advantages(batch, config), streams, strict=True):
            np.testing.assert_array_equal(stream, double.astype(np.float32))


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_step_with_nothing_to_learn_from_gives_zeros(name):
    """All alone, all tied, nobody acted, nobody there: finite, and zero where only comparison could tell."""
    config = AlgorithmConfig(advantage=name, reward_weights={"score": 1.0})
    extra = {"greedy_reward": 0.5, "rewards": {"score": 0.5}, "values": np.zeros(2, np.float32)}
    alone = [trajectory(group, 0.5, [0, 1], **extra) for group in range(3)]
    tied = [trajectory(0, 0.5, [0, 1], **extra) for _ in range(3)]
    silent = [trajectory(0, float(i), [0, 0], **extra | {"rewards": {"score": float(i)}}) for i in range(3)]
    for batch in (alone, tied, silent, []):
        streams = compute_advantages(batch, config)
        assert len(streams) == len(batch)
        assert all(np.isfinite(stream).all() for stream in streams)
        if name != "srft":
            assert not any(stream.any() for stream in streams)


def test_ties_and_silence_are_part_of_the_table():
    batch = trajectories_of(0, shuffle=False)
    assert {t.reward for t in batch if t.group_id == TIED} == {0.5}
    assert not any(batch[index].loss_mask.any() for index in SILENT)
    assert sorted(np.bincount([t.group_id for t in batch]))[-5:] == [1, 2, 3, 4, 5]


def test_gae_by_hand_skips_the_words_of_tools():
    t = trajectory(0, 1.0, [0, 1, 0, 1], values=np.array([9, 0.5, 9, 0.25], np.float32))
    config = AlgorithmConfig(advantage="gae", gamma=0.9, lam=0.5)
    last = 1.0 - 0.25
    first = 0.9 * 0.25 - 0.5 + 0.45 * last
    np.testing.assert_allclose(value_targets([t], config)[0], [0, first + 0.5, 0, last + 0.25], rtol=1e-6)
    (whitened,) = compute_advantages([t], config)
    np.testing.assert_allclose(whitened, [0, -math.sqrt(0.5), 0, math.sqrt(0.5)], rtol=1e-6)


def test_whitening_leaves_out_what_filters_took():
    batch = trajectories_of(1)
    for index in (2, 9):
        batch[index].keep = False
    streams = compute_advantages(batch, AlgorithmConfig(advantage="reinforce_plus_plus"))
    values = np.concatenate([s[t.loss_mask] for s, t in zip(streams, batch, strict=True) if t.keep])
    np.testing.assert_allclose([values.mean(), values.std(ddof=1)], [0, 1], atol=1e-6)


def test_the_order_of_trajectories_does_not_matter():
    batch = trajectories_of(2)
    order = np.random.default_rng(0).permutation(len(batch))
    for name in ADVANTAGES:
        config = AlgorithmConfig(advantage=name, reward_weights={"score": 1.0})
        shuffled = [batch[i] for i in order]
        if name == "max_rl":
            batch = [dataclasses.replace(t, action_rewards=None) for t in batch]
            shuffled = [batch[i] for i in order]
        streams = compute_advantages(batch, config)
        for i, stream in zip(order, compute_advantages(shuffled, config), strict=True):
            np.testing.assert_allclose(stream, streams[i], rtol=1e-5, atol=1e-7)


def test_what_is_missing_is_named():
    batch = trajectories_of(0)
    with pytest.raises(ValueError, match=r"algorithm\.advantage='grop'.*did you mean 'grpo'"):
        compute_advantages([], AlgorithmConfig(advantage="grop"))
    with pytest.raises(ValueError, match=r"t/train/\d: algorithm\.reward_weights='fromat'.*did you mean 'format'"):
        compute_advantages(batch, AlgorithmConfig(advantage="multi_reward", reward_weights={"fromat": 1.0}))
    for name, field in (("remax", "greedy_reward"), ("gae", "values")):
        with pytest.raises(ValueError, match=rf"t/train/\d: algorithm\.advantage={name} needs"):
            compute_advantages(
                [dataclasses.replace(t, **{field: None}) for t in batch], AlgorithmConfig(advantage=name)
            )
    with pytest.raises(ValueError, match=r"max_rl needs rewards of at least 0, not -1"):
        compute_advantages([trajectory(0, -1.0, [1])], AlgorithmConfig(advantage="max_rl"))
