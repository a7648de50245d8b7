"""Which groups are trained, what length costs, and who learns from an expert."""

import numpy as np
import pytest

from megarl.algorithms.advantages import compute_advantages, total_rewards
from megarl.algorithms.filters import (
    apply_filters,
    drop_reasons,
    expert_gate,
    informative_groups,
    overlong_punishment,
    refill,
)
from megarl.algorithms.weights import compute_loss_weights
from megarl.config import AlgorithmConfig
from megarl.types import Media, Prompt, Sample
from tests.algorithms.test_advantages import trajectory


def graded(group, **rewards):
    t = trajectory(group, sum(rewards.values()), [0, 1, 1])
    t.rewards = rewards
    return t


def test_groups_without_a_difference_in_the_named_reward_are_dropped():
    batch = [
        *(graded(0, accuracy=a, format=1.0) for a in (0.0, 1.0)),
        *(graded(1, accuracy=0.0, format=f) for f in (0.0, 1.0)),  # only the format differs
        *(graded(2, accuracy=1.0, format=1.0) for _ in range(2)),
        *(graded(3, accuracy=a, format=0.0) for a in (-1.0, 1.0)),  # rewards of -1 and 1 will do
        graded(4, accuracy=0.0, format=0.0),  # alone: nothing to compare with, nothing to drop
    ]
    keep = informative_groups(batch, AlgorithmConfig(filter_key="accuracy"))
    assert keep.tolist() == [True, True, False, False, False, False, True, True, True]
    assert informative_groups(batch, AlgorithmConfig()).all()
    bounded = informative_groups(batch, AlgorithmConfig(filter_key="accuracy", filter_low=0.01, filter_high=0.99))
    assert bounded.tolist() == [True, True, *[False] * 7]
    with pytest.raises(ValueError, match=r"t/train/0: algorithm\.filter_key='acuracy'.*did you mean 'accuracy'"):
        informative_groups(batch, AlgorithmConfig(filter_key="acuracy"))


def test_overlong_punishment_by_hand():
    # DAPO eq. 13 with L_max = 20, L_cache = 8
    lengths = np.array([5, 12, 13, 16, 20, 25])
    np.testing.assert_allclose(overlong_punishment(lengths, 20, 8), [0, 0, -1 / 8, -0.5, -1, -1])
    np.testing.assert_allclose(overlong_punishment(lengths, 20, 0), [0, 0, 0, 0, 0, -1])


def sample(group, reward, length, finish_reason="stop"):
    mask = np.arange(length + 2) >= 2
    return Sample(
        prompt=Prompt("t/train/0", "t", []),
        group_id=group,
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        rewards={"score": reward},
        reward=reward,
        tokens=np.zeros(len(mask), np.int32),
        media=Media(),
        finish_reason=finish_reason,
    )


def test_what_is_dropped_has_a_reason():
    batch = [
        *(sample(0, reward, 4) for reward in (0.0, 1.0)),
        *(sample(1, 1.0, 4) for _ in range(2)),
        *(sample(2, 0.0, 4) for _ in range(2)),
        *(sample(3, 0.5, 4) for _ in range(2)),
        *(sample(4, 0.0, 9, "length") for _ in range(2)),
        *(sample(5, reward, 4) for reward in (0.0, 0.1)),
        *(sample(6, reward, 4) for reward in (0.9, 1.0)),
    ]
    config = AlgorithmConfig(filter_key="score", filter_low=0.1, filter_high=0.9)
    assert drop_reasons(batch, config) == {
        **{1: "all_right", 2: "all_wrong", 3: "all_same", 4: "all_truncated"},
        **{5: "low", 6: "high"},
    }
    assert drop_reasons(batch, AlgorithmConfig()) == {}


def test_a_refill_is_as_large_as_the_last_rounds_say():
    assert refill(missing=4, kept=4, drawn=8, most=8) == 8  # 4 * 9 / 5 = 7.2
    assert refill(missing=1, kept=7, drawn=8, most=8) == 2
    assert refill(missing=1, kept=15, drawn=15, most=16) == 1  # never fewer than are missing
    assert refill(missing=8, kept=0, drawn=8, most=8) == 8


def test_filters_write_streams():
    batch = [sample(0, 1.0, 4), sample(0, 0.0, 10, "length"), sample(1, 1.0, 9), sample(1, 1.0, 4)]
    config = AlgorithmConfig(filter_key="score", filter_truncated=True, overlong_buffer=0.4, overlong_penalty=0.5)
    metrics = apply_filters(batch, config, longest=10)
    assert [s.keep for s in batch] == [True, False, False, False]
    assert metrics == {"filter/kept_ratio": 0.5, "filter/truncated_ratio": 0.25, "filter/overlong_ratio": 0.5}
    np.testing.assert_allclose(total_rewards(batch), [1, -0.5, 1 - 0.375, 1])
    assert [s.reward for s in batch] == [1, 0, 1, 1]  # the score stays what it was
    assert [s.rewards["overlong"] for s in batch] == [0, -0.5, -0.375, 0]
    # what is cut is compared with, and weighs nothing
    assert compute_advantages(batch, config)[0][-1] == pytest.approx(0.5**0.5, rel=1e-5)
    weights = compute_loss_weights(batch, config)
    assert [w.any() for w in weights] == [True, False, False, False]
    assert weights[0].sum() == 4
    assert apply_filters(batch, AlgorithmConfig(), longest=10) == {}
    assert all(s.keep for s in batch)


def test_an_experts_length_is_not_punished():
    batch = [sample(0, 1.0, 10), sample(0, 1.0, 20)]
    batch[1].expert_mask = batch[1].loss_mask
    apply_filters(batch, AlgorithmConfig(overlong_buffer=0.2), longest=10)
    assert total_rewards(batch).tolist() == [0, 1]


def test_gpg_makes_up_for_what_the_loss_still_counts():
    def coefficient(key):
        batch = [sample(0, 1.0, 4), sample(0, 0.0, 4), *(sample(1, 1.0, 4) for _ in range(6))]
        config = AlgorithmConfig(advantage="gpg", filter_key=key)
        apply_filters(batch, config, longest=10)
        advantages, weights = compute_advantages(batch, config), compute_loss_weights(batch, config)
        return (advantages[0] * weights[0]).sum() / sum(w.sum() for w in weights)

    assert coefficient("") == pytest.approx(coefficient("score"))


def test_the_gate_takes_the_expert_where_nobody_is_right():
    def member(group, reward, expert=False):
        t = trajectory(group, reward, [0, 1, 1])
        t.expert_mask = t.loss_mask & expert
        return t

    batch = [
        *(member(0, 0.0), member(0, 0.0), member(0, 1.0, expert=True)),
        *(member(1, 0.0), member(1, 1.0), member(1, 1.0, expert=True)),
        *(member(2, 0.0), member(2, 0.0)),  # no expert here
    ]
    assert expert_gate(batch, AlgorithmConfig(expert_gate=0)).tolist() == [
        *(False, False, True),
        *(True, True, False),
        *(True, True),
    ]
    assert expert_gate(batch, AlgorithmConfig(expert_gate=1)).tolist()[3:6] == [False, False, True]
    assert expert_gate(batch, AlgorithmConfig()).all()
