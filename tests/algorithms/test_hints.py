"""How long hints are, by hand and in the mean."""

import numpy as np
import pytest

from megarl.algorithms.hints import draw_share, hint_bound
from megarl.config import AlgorithmConfig


def config(**changes):
    return AlgorithmConfig(**{"expert_strategy": "hint", "hint_low": 0.1, "hint_high": 0.9, "hint_steps": 8} | changes)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.9] * 5),
        ("linear", [0.9, 0.7, 0.5, 0.3, 0.0]),
        ("cosine", [0.9, 0.5 + 0.4 * 2**-0.5, 0.5, 0.5 - 0.4 * 2**-0.5, 0.0]),
    ],
)
def test_the_bound_falls_and_then_there_are_no_hints(schedule, expected):
    c = config(hint_schedule=schedule)
    np.testing.assert_allclose([hint_bound(step, c) for step in (0, 2, 4, 6, 8)], expected, atol=1e-12)


def test_shares_are_drawn_as_they_are_named():
    def draws(step=0, **changes):
        random, c = np.random.default_rng(0), config(**changes)
        return np.array([draw_share(random, step, c, pieces=5) for _ in range(4000)])

    uniform = draws()
    assert 0.1 <= uniform.min() < 0.11
    assert 0.89 < uniform.max() <= 0.9
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert (draws(hint_draw="fixed") == 0.9).all()
    binomial = draws(hint_draw="binomial", hint_schedule="linear", step=4)
    assert set((binomial * 5).round(9)) == {0, 1, 2, 3, 4, 5}
    assert binomial.mean() == pytest.approx(0.5, abs=0.02)
    assert binomial.std() == pytest.approx((0.5 * 0.5 / 5) ** 0.5, abs=0.01)
    for draw in ("uniform", "fixed", "binomial"):
        assert not draws(step=8, hint_schedule="cosine", hint_draw=draw).any()
