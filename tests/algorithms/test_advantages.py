import numpy as np
import pytest

from megarl.algorithms.advantages import compute_advantages
from megarl.algorithms.weights import compute_loss_weights
from megarl.config import AlgorithmConfig
from megarl.types import Prompt, Trajectory


def trajectory(group, reward, mask):
    mask = np.array(mask, bool)
    return Trajectory(
        prompt=Prompt("t/train/0", "t", []),
        group_id=group,
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        reward=reward,
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
    plain = compute_advantages(batch, AlgorithmConfig(normalize_by_std=False))
    np.testing.assert_allclose(plain[0], [0, 2 / 3, 2 / 3], rtol=1e-6)


def test_unknown_advantage_names_the_nearest():
    with pytest.raises(ValueError, match=r"algorithm\.advantage='grop'.*did you mean 'grpo'"):
        compute_advantages([], AlgorithmConfig(advantage="grop"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 2 + 4 actions in group 0, 3 in group 1, none in the last: N = 9
        ("token_mean", [1, 1, 1]),
        ("sequence_mean", [9 / 3 / 2, 9 / 3 / 4, 9 / 3 / 3]),
        ("prompt_mean", [9 / 2 / 6, 9 / 2 / 6, 9 / 2 / 3]),
    ],
)
def test_loss_weights_are_the_reduction(name, expected):
    batch = [
        trajectory(0, 0, [0, 1, 1]),
        trajectory(0, 0, [1, 1, 0, 1, 1]),
        trajectory(1, 0, [1, 1, 1]),
        trajectory(1, 0, [0, 0]),
    ]
    streams = compute_loss_weights(batch, AlgorithmConfig(loss_weights=name))
    for stream, t, weight in zip(streams, batch, [*expected, 0], strict=True):
        np.testing.assert_allclose(stream, t.loss_mask * weight, rtol=1e-6)
    total = sum(stream.sum() for stream in streams)
    np.testing.assert_allclose(total, 9, rtol=1e-6)  # mean one over the actions
    losses = [np.arange(len(t.loss_mask)) + 1.0 for t in batch]
    reduced = sum((stream * loss).sum() for stream, loss in zip(streams, losses, strict=True)) / 9
    by_sequence = [loss[t.loss_mask] for loss, t in zip(losses, batch, strict=True) if t.loss_mask.any()]
    direct = {
        "token_mean": np.concatenate(by_sequence).mean(),
        "sequence_mean": np.mean([loss.mean() for loss in by_sequence]),
        "prompt_mean": np.mean([np.concatenate(by_sequence[:2]).mean(), by_sequence[2].mean()]),
    }[name]
    np.testing.assert_allclose(reduced, direct, rtol=1e-6)
