"""Metrics on disk: what is written, what survives a crash, what a resumed run forgets."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megarl.config import ObservabilityConfig, RunConfig
from megarl.observability.tracker import Tracker, read_metrics


def config(*trackers: str) -> RunConfig:
    return RunConfig(name="r", observability=ObservabilityConfig(trackers=list(trackers)))


def test_one_line_of_floats_a_step(tmp_path):
    tracker = Tracker(tmp_path, config("jsonl"))
    tracker.log(1, {"actor/grad_norm": torch.tensor(0.5), "count": 3})
    tracker.log(2, {"actor/grad_norm": 0.25})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "actor/grad_norm": 0.5, "count": 3.0}, {"step": 2, "actor/grad_norm": 0.25}]


def test_a_metric_that_is_not_a_number_is_named(tmp_path):
    with pytest.raises(ValueError, match="metric actor/lr='high' of step 3 is not a number"):
        Tracker(tmp_path, config("jsonl")).log(3, {"actor/lr": "high"})


def test_half_a_line_is_left_out_and_the_next_run_repairs_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a"')
    rows, unreadable = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert unreadable == 1
    Tracker(tmp_path, config("jsonl")).log(3, {"a": 3.0})
    assert read_metrics(path) == ([{"step": s, "a": float(s)} for s in (1, 2, 3)], 0)


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path):
    first = Tracker(tmp_path, config("jsonl"))
    for step in (1, 2, 3):
        first.log(step, {"a": step})
    second = Tracker(tmp_path, config("jsonl"))
    second.truncate(1)
    second.log(2, {"a": 20})
    rows, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["a"]) for row in rows] == [(1, 1.0), (2, 20.0)]
    with pytest.raises(RuntimeError, match="before the first log"):
        second.truncate(0)


def test_tensorboard_holds_the_same_numbers_and_hides_what_was_run_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Tracker(tmp_path, config("tensorboard"))
    for step in (1, 2, 3):
        first.log(step, {"a": step})
    first.close()
    second = Tracker(tmp_path, config("tensorboard"))
    second.truncate(1)
    second.log(2, {"a": 20})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (2, 20.0)]


def test_wandb_is_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys; from megarl.config import *; from megarl.observability.tracker import Tracker\n"
        "config = RunConfig(observability=ObservabilityConfig(trackers=['jsonl']))\n"
        f"t = Tracker({str(tmp_path)!r}, config); t.log(1, {{'a': 1}}); t.close(); print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False"


def test_wandb_offline_keeps_its_run_when_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = Tracker(tmp_path, config("wandb"))
        tracker.log(step, {"critic/score/mean": 0.5})
        tracker.close()
    run_id = (tmp_path / "wandb_run_id").read_text()
    runs = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run-")]
    assert runs
    assert all(name.endswith(run_id) for name in runs)
