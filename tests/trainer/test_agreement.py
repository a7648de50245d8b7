"""Trainer and engine are judged by one rule, whether it is the canary of a sync or the rollouts of a step."""

import numpy as np
import pytest

from megarl.config import ModelConfig, RolloutConfig, RunConfig
from megarl.trainer.agreement import Difference, Judge

LOGPROBS = np.log(np.array([0.5, 0.9, 0.001, 0.02], np.float32))
UNLIKELY, NAN = np.array([0, 0, 0.6, 0.1], np.float32), np.float32(np.nan)


@pytest.mark.parametrize(
    ("dtype", "theirs", "failure"),
    [
        ("float32", LOGPROBS + 2e-5, ""),
        ("float32", LOGPROBS + np.array([0, 0, 3e-4, 0], np.float32), "max |log-prob difference| 0.0003 > 0.0001"),
        ("float32", LOGPROBS + NAN, "max |log-prob difference| nan > 0.0001"),
        # half a unit on an unlikely token is rounding; a tenth of the probability of every token is not
        ("bfloat16", LOGPROBS + UNLIKELY, ""),
        ("bfloat16", LOGPROBS + np.float32(0.1), "mean |probability difference| 0.0374 > 0.03"),
        ("bfloat16", LOGPROBS + NAN, "mean |probability difference| nan > 0.03"),
    ],
)
def test_the_largest_decides_in_float32_and_the_mean_in_bfloat16(dtype, theirs, failure):
    judge = Judge.of(RunConfig(model=ModelConfig(dtype=dtype)))
    assert judge.failure(Difference.between(LOGPROBS, theirs)) == failure


def test_one_side_in_bfloat16_is_enough_and_a_tolerance_is_of_what_decides():
    difference = Difference.between(LOGPROBS, LOGPROBS + UNLIKELY)
    engine = RunConfig(rollout=RolloutConfig(dtype="bfloat16"))
    assert Judge.of(engine) == Judge(rounded=True, tolerance=0.03)
    assert Judge.of(engine).failure(difference) == ""
    assert Judge.of(engine, 1e-4).failure(difference) == "mean |probability difference| 0.000731 > 0.0001"
    assert Judge.of(RunConfig(), 0.5).failure(difference) == "max |log-prob difference| 0.6 > 0.5"
