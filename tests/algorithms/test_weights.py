"""Loss reductions: the weights are what the formulas say, by hand and against them."""

import numpy as np
import pytest
import torch

from megarl.algorithms.weights import LOSS_WEIGHTS, compute_loss_weights
from megarl.config import AlgorithmConfig
from tests.algorithms import naive
from tests.algorithms.steps import LONGEST, pad, trajectories_of
from tests.algorithms.test_advantages import trajectory


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 2 + 4 actions in group 0, 3 in group 1, none in the last: N = 9, of 3 trajectories
        ("token_mean", [1, 1, 1]),
        ("sequence_mean", [9 / 3 / 2, 9 / 3 / 4, 9 / 3 / 3]),
        ("sequence_sum", [9 / 3, 9 / 3, 9 / 3]),
        ("sequence_sum_norm", [9 / 3 / 16, 9 / 3 / 16, 9 / 3 / 16]),
        ("prompt_mean", [9 / 2 / 6, 9 / 2 / 6, 9 / 2 / 3]),
    ],
)
def test_loss_weights_by_hand(name, expected):
    batch = [
        trajectory(0, 0, [0, 1, 1]),
        trajectory(0, 0, [1, 1, 0, 1, 1]),
        trajectory(1, 0, [1, 1, 1]),
        trajectory(1, 0, [0, 0]),
    ]
    streams = compute_loss_weights(batch, AlgorithmConfig(loss_weights=name), longest=16)
    for stream, t, weight in zip(streams, batch, [*expected, 0], strict=True):
        np.testing.assert_allclose(stream, t.loss_mask * weight, rtol=1e-6)
        assert stream.dtype == np.float32


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(LOSS_WEIGHTS))
def test_loss_weights_are_the_reduction(name, seed):
    batch = trajectories_of(seed)
    batch[4].keep = batch[11].keep = False
    streams = compute_loss_weights(batch, AlgorithmConfig(loss_weights=name), longest=LONGEST)
    losses = torch.randn(len(batch), LONGEST, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = pad([t.loss_mask & t.keep for t in batch])
    expected = naive.reduce(losses, mask, [t.group_id for t in batch], name, LONGEST)
    torch.testing.assert_close((pad(streams) * losses).sum() / mask.sum(), expected, rtol=1e-6, atol=1e-8)


def test_own_and_expert_actions_may_be_reduced_by_themselves():
    batch = trajectories_of(0, experts=True)
    config = AlgorithmConfig(loss_weights="sequence_mean", expert_weights="separate")
    weights = pad(compute_loss_weights(batch, config))
    expert, mask = pad([t.expert_mask for t in batch]), pad([t.loss_mask for t in batch])
    losses = torch.randn(len(batch), LONGEST, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = [t.group_id for t in batch]
    parts = [naive.reduce(losses, part, groups, "sequence_mean", LONGEST) for part in (mask & expert, mask & ~expert)]
    assert (mask & expert).any()
    torch.testing.assert_close((weights * losses).sum() / mask.sum(), sum(parts), rtol=1e-6, atol=1e-8)


def test_nothing_to_train_weighs_nothing():
    silent = [trajectory(0, 1.0, [0, 0]), trajectory(1, 0.0, [0])]
    for name in LOSS_WEIGHTS:
        config = AlgorithmConfig(loss_weights=name)
        assert not any(stream.any() for stream in compute_loss_weights(silent, config, 16))
        assert compute_loss_weights([], config, 16) == []
    with pytest.raises(ValueError, match="sequence_sum_norm needs the length of the longest response"):
        compute_loss_weights(silent, AlgorithmConfig(loss_weights="sequence_sum_norm"))
