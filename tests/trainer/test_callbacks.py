"""Callbacks that need no run: a trainer and an engine that disagree."""

from types import SimpleNamespace

import pytest

from megarl.config import AlgorithmConfig, DebugConfig, ModelConfig, RunConfig, TrainerConfig, WeightSyncConfig
from megarl.trainer.callbacks import MismatchAlarm
from megarl.utils.errors import RunFailure


def alarm_of(**changes):
    """The alarm of a run with ``changes``, and what it told."""
    told = []
    run = SimpleNamespace(console=SimpleNamespace(message=told.append))
    return MismatchAlarm(SimpleNamespace(config=RunConfig(**changes), run=run, step=7)), told


def differing(mean, largest):
    return {"training/rollout_probs_diff_mean": mean, "training/rollout_logprobs_diff_max": largest}


BFLOAT16 = ModelConfig(dtype="bfloat16")
UNLIKELY, WRONG = differing(0.005, 0.6), differing(0.04, 0.6)


@pytest.mark.parametrize(
    ("changes", "metrics", "text"),
    [
        ({}, differing(1e-7, 2e-5), ""),
        ({}, UNLIKELY, "max |log-prob difference| 0.6 > 0.0001"),
        ({"model": BFLOAT16}, UNLIKELY, ""),
        ({"model": BFLOAT16}, WRONG, "mean |probability difference| 0.04 > 0.03"),
        ({"model": BFLOAT16, "weight_sync": WeightSyncConfig(canary_tolerance=0.1)}, WRONG, ""),
        ({"trainer": TrainerConfig(max_staleness=1)}, UNLIKELY, ""),  # of older weights
        ({"algorithm": AlgorithmConfig(bypass_old_logprobs=True)}, UNLIKELY, "max |log-prob difference| 0.6 > 0.0001"),
        ({"algorithm": AlgorithmConfig(bypass_old_logprobs=True, num_epochs=2)}, UNLIKELY, ""),  # of newer weights
    ],
)
def test_a_step_is_judged_as_the_canary_is(changes, metrics, text):
    callback, told = alarm_of(**changes)
    callback.on_step([], metrics)
    callback.on_logged()
    assert [text in message for message in told] == ([True] if text else [])


def test_a_mismatch_is_told_once_or_ends_the_run():
    callback, told = alarm_of()
    for metrics in (UNLIKELY, WRONG, {}):
        callback.on_step([], metrics)
    assert len(told) == 1
    assert told[0].startswith("step 7: trainer and engine differ on the rollouts: max |log-prob difference| 0.6")
    callback, told = alarm_of(debug=DebugConfig(logprob_diff_alarm=0.01), model=BFLOAT16)
    callback.on_step([], UNLIKELY)
    callback.on_logged()
    callback.on_step([], WRONG)
    with pytest.raises(RunFailure, match=r"step 7: .* mean \|probability difference\| 0\.04 > 0\.01"):
        callback.on_logged()  # after the step that says why is in the log
    assert told == []
