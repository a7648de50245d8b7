"""Callbacks that need no run: a trainer and an engine that disagree."""

from types import SimpleNamespace

import pytest

from megarl.config import RunConfig
from megarl.trainer.callbacks import MismatchAlarm
from megarl.utils.errors import RunFailure


def alarm_of(threshold):
    config, told = RunConfig(), []
    config.debug.logprob_diff_alarm = threshold
    run = SimpleNamespace(console=SimpleNamespace(message=told.append))
    return MismatchAlarm(SimpleNamespace(config=config, run=run, step=7)), told


def test_a_mismatch_is_told_once_or_ends_the_run():
    apart, near = ({"training/rollout_logprobs_diff_mean": value} for value in (0.2, 0.01))
    callback, told = alarm_of(0.0)
    for metrics in (near, apart, apart, {}):
        callback.on_step([], metrics)
    assert len(told) == 1
    assert told[0].startswith("step 7: the trainer's log-probs and the engine's differ by 0.2 in the mean")
    callback, told = alarm_of(0.1)
    callback.on_step([], near)
    callback.on_logged()
    callback.on_step([], apart)
    with pytest.raises(RunFailure, match=r"step 7: .* more than 0\.1"):
        callback.on_logged()  # after the step that says why is in the log
    assert told == []
