"""The engines ahead of the ranks: what is begun when and by which weights; dead engines wait for the right thread."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megarl.algorithms.checks import check_algorithm
from megarl.config import AlgorithmConfig, DebugConfig, RolloutConfig, RunConfig, TrainerConfig
from megarl.rollout.manager import EngineError, RolloutManager
from megarl.trainer.pipelined import PipelinedTrainer
from megarl.trainer.rl import RLTrainer
from tests.trainer.commands import EXPERIMENT, ROOT, kill_engine_when, metrics, run, start, wait_for_step


class Pipeline(PipelinedTrainer):
    """A trainer of nothing: a rollout notes the weights that it began and ended with."""

    def __init__(self, max_staleness, *, num_steps=6, deterministic=False, partial=True, seconds=0.0):
        self.config = RunConfig(
            trainer=TrainerConfig(max_staleness=max_staleness, num_steps=num_steps),
            debug=DebugConfig(deterministic=deterministic),
            rollout=RolloutConfig(partial=partial),
        )
        self.run = SimpleNamespace(stopping=False, console=SimpleNamespace(progress=print), timer=nullcontext)
        self.rollout = SimpleNamespace(replace_lost=lambda: None)
        self.sampler, self.seconds, self.version, self.begun = SimpleNamespace(sample=self.sample), seconds, 0, []
        self.thread, self.ahead = ThreadPoolExecutor(1), {}

    def sample(self, step, progress):
        self.begun.append((step, self.version))
        time.sleep(self.seconds)
        return SimpleNamespace(step=step, begun=self.begun[-1][1], ended=self.version, metrics={})

    def train(self, num_steps):
        """The steps of ``fit`` that matter here; what each was trained on."""
        rollouts = []
        for step in range(1, num_steps + 1):
            rollouts.append(self.generate(step))
            time.sleep(0.02)
            self.push(must_change=True)
        return rollouts


@pytest.fixture
def push(monkeypatch):
    def push(self, *, must_change):
        self.version += 1

    monkeypatch.setattr(RLTrainer, "push", push)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_weights_are_never_older_than_the_bound(push, max_staleness):
    pipeline = Pipeline(max_staleness)
    rollouts = pipeline.train(6)
    assert [rollout.step for rollout in rollouts] == [1, 2, 3, 4, 5, 6]
    behind = [rollout.step - 1 - rollout.begun for rollout in rollouts]  # step 1 learns with version 0
    assert behind[0] == 0
    assert max(behind) == max_staleness
    assert [step for step, _ in pipeline.begun] == [1, 2, 3, 4, 5, 6]  # none beyond the last
    assert pipeline.ahead == {}


@pytest.mark.parametrize("how", [{"deterministic": True}, {"partial": False}])
def test_a_response_may_see_new_weights_unless_it_must_not(push, how):
    assert any(r.ended > r.begun for r in Pipeline(1, seconds=0.05).train(6))
    rollouts = Pipeline(1, seconds=0.05, **how).train(6)
    assert [(r.begun, r.ended) for r in rollouts] == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_run_that_stops_begins_nothing(push):
    pipeline = Pipeline(2)
    pipeline.run.stopping = True
    pipeline.train(1)
    assert [step for step, _ in pipeline.begun] == [1]


def test_what_a_rollout_raises_reaches_the_step_that_needs_it(push):
    pipeline = Pipeline(1)
    pipeline.train(1)

    def fails(step, progress):
        raise EngineError("engine 0 is lost")

    pipeline.sampler.sample = fails
    pipeline.generate(2)
    with pytest.raises(EngineError, match="engine 0 is lost"):
        pipeline.generate(3)


class Manager(RolloutManager):
    """One engine, that is a number."""

    def __init__(self):
        self._owner, self._lock, self._closed, self._lost = threading.get_ident(), threading.Lock(), False, {}
        self.engines, self.restarted_by = [0], []

    def _restart(self, index, cause):
        self.engines[index] += 1
        time.sleep(0.05)
        self.restarted_by.append(threading.get_ident())


def test_the_thread_that_owns_the_engines_replaces_them():
    manager, back = Manager(), []

    def rollout(engine):
        manager.replace(0, engine, "it died")
        back.append(len(manager.restarted_by))

    thread = threading.Thread(target=rollout, args=(0,))
    thread.start()
    while not manager._lost:
        time.sleep(0.01)
    assert thread.is_alive()
    manager.replace_lost()
    thread.join(5)
    assert back == [1]  # it went on when the engine could serve
    assert manager.restarted_by == [threading.get_ident()]
    manager.replace(0, 0, "noticed twice")
    assert manager.engines == [1]
    thread = threading.Thread(target=rollout, args=(0,))  # it has been replaced already
    thread.start()
    thread.join(5)
    assert (manager.engines, len(back)) == ([1], 2)


def test_a_rollout_ends_with_its_engines():
    manager, errors = Manager(), []

    def rollout():
        try:
            manager.replace(0, 0, "killed")
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=rollout)
    thread.start()
    manager._closed = True
    thread.join(5)
    assert errors == ["the engines are shut down"]


def test_lag_without_a_correction_is_refused():
    config = RunConfig(trainer=TrainerConfig(max_staleness=1))
    with pytest.raises(ValueError, match=r"trainer\.max_staleness=1 .*algorithm\.rollout_correction=truncate"):
        check_algorithm(config)
    for algorithm in (AlgorithmConfig(rollout_correction="truncate"), AlgorithmConfig(bypass_old_logprobs=True)):
        check_algorithm(RunConfig(trainer=config.trainer, algorithm=algorithm))
    with pytest.raises(ValueError, match=r"trainer\.offload=\['optimizer'\].*trainer\.max_staleness=1"):
        TrainerConfig(max_staleness=1, offload=["optimizer"])


@pytest.mark.slow
def test_a_pipelined_run_is_killed_resumed_and_robbed_of_its_engine(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = ["train", EXPERIMENT, f"trainer.run_dir={folder}", f"model.path={tmp_path / 'tiny'}"]
    arguments += ["trainer.max_staleness=1", "algorithm.rollout_correction=truncate", "debug.deterministic=false"]
    arguments += ["rollout.max_new_tokens=96", "trainer.num_steps=8", "trainer.eval_every=4"]
    first = start(log, *arguments)
    wait_for_step(first, folder, 2, log)
    first.kill()
    first.wait()
    second, killed = start(log, *arguments, "weight_sync.transport=broadcast"), []
    watcher = threading.Thread(target=kill_engine_when, args=(second, folder, 4, killed))
    watcher.start()
    status = second.wait(500)
    watcher.join()
    text = log.read_text()
    assert status == 0, text[-6000:]
    assert "resumed from" in text
    assert killed, "the engine's scheduler was not found"
    rows = metrics(folder)
    assert list(rows) == list(range(9))
    for step in range(1, 9):
        assert rows[step]["rollout/staleness_max"] <= 1
        assert rows[step]["sync/verified_tensors"] == rows[step]["sync/tensors"] > 50
        assert rows[step]["sync/canary_abs_diff"] < 1e-4
        assert rows[step]["actor/ppo_kl"] == 0  # the ratio is to the trainer's own policy
    assert max(row.get("rollout/partial_fraction", 0) for row in rows.values()) > 0
    lag = [row["training/rollout_logprobs_diff_mean"] for row in rows.values() if row.get("rollout/staleness_mean")]
    assert max(lag) > 1e-3  # the engine's log-probs are those of the weights that sampled
    assert rows[1]["training/rollout_logprobs_diff_mean"] < 1e-5


@pytest.mark.slow
def test_without_lag_it_is_the_synchronous_trainer(tmp_path):
    arguments = [EXPERIMENT, f"model.path={tmp_path / 'tiny'}", "trainer.num_steps=3"]
    run(tmp_path / "log", "train", *arguments, f"trainer.run_dir={tmp_path / 'sync'}")
    program = (
        "import sys\nfrom megarl.experiment import load_experiment\nfrom megarl.launch.run import _fit\n"
        "from megarl.trainer.pipelined import PipelinedTrainer\n"
        "sys.exit(_fit(PipelinedTrainer, load_experiment(sys.argv[1], sys.argv[2:], {})))"
    )
    command = [sys.executable, "-c", program, *arguments, f"trainer.run_dir={tmp_path / 'pipelined'}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=400)
    assert metrics(tmp_path / "pipelined") == metrics(tmp_path / "sync")
