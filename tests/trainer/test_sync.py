"""What a sync refuses: engines that hold, or compute, something else than the trainer."""

import numpy as np
import pytest
import ray

from megarl.config import RunConfig, TrainerConfig
from megarl.data.packing import Packing
from megarl.data.sharing import Encoding
from megarl.trainer.rl import RLTrainer
from megarl.trainer.sync import WeightSync, WeightSyncError
from megarl.trainer.turns import Turns
from megarl.types import EncodedPrompt, Media, Prompt
from megarl.utils.errors import EngineRefused
from megarl.workers.group import WorkerError

TOKENS = np.array([1, 7, 9, 2], np.int32)  # 9: a placeholder


@ray.remote(num_cpus=0)
class Engine:
    """Holds checksums; ``loses`` names tensors that never arrive, ``skews`` moves its log-probs."""

    def __init__(self, loses=(), skews=0.0):
        self.held, self.loses, self.skews = {"a": "0", "b": "0"}, loses, skews
        self.calls = []

    def pause(self):
        self.calls.append("pause")

    def resume(self):
        self.calls.append("resume")

    def called(self):
        return self.calls

    def take(self, checksums):
        self.calls.append("take")
        self.held |= {name: value for name, value in checksums.items() if name not in self.loses}

    def checksums(self, adapters=False):
        return self.held

    def score(self, tokens, media):
        self.calls.append("score")
        return np.array([-1.0, 0.0, -3.0]) + self.skews


@ray.remote(num_cpus=0)
class Rank:
    def __init__(self):
        self.weights = {"a": "1", "b": "1"}

    def step(self):
        self.weights = {name: value + "1" for name, value in self.weights.items()}

    def send_weights(self, audience, version, final):
        ray.get([listener.engine.take.remote(self.weights) for listener in audience])
        return self.weights


class Workers:
    """One rank, as ``WorkerGroup`` would drive it."""

    data_parallel_size = 1

    def __init__(self):
        self.rank = Rank.remote()

    def exporters(self):
        return [[self.rank]]

    def gather(self, refs):
        return ray.get(refs)

    def logprobs(self, bins, *, temperature, ban):
        assert bins[0][0].num_actions == 2  # 7 and 2, not the placeholder
        return [[np.array([-1.0, -3.0])]]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    if ray.is_initialized():  # by the tests of engines, whose cluster lives on
        yield
        return
    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def sync_of(config):
    def positions(tokens, media):
        return np.arange(len(tokens))[None]

    workers = Workers()
    return WeightSync(
        config,
        workers,
        turns=Turns(config, workers),
        sources=[],
        packing=Packing(64, 64, 1, positions, Encoding(num_tokens=len, cost=len, max_patches=64)),
        canary=EncodedPrompt(Prompt("t/eval/0", "t", []), TOKENS, Media()),
        banned_token_ids=[9],
    )


@pytest.fixture
def sync():
    return sync_of(RunConfig())


@pytest.mark.parametrize(
    ("max_staleness", "calls"), [(0, ["take", "score"]), (1, ["pause", "take", "resume", "score"])]
)
def test_engines_amid_their_responses_stand_still_and_answer_the_canary_afterwards(max_staleness, calls):
    engine = Engine.remote()
    config = RunConfig(trainer=TrainerConfig(max_staleness=max_staleness))
    sync_of(config).push([engine], 1, must_change=False)
    assert ray.get(engine.called.remote()) == calls


def test_what_arrived_is_counted_and_compared(sync):
    engines = [Engine.remote(), Engine.remote()]
    metrics = sync.push(engines, 0, must_change=False)
    same = {"sync/canary_abs_diff": 0, "sync/canary_probs_diff_mean": 0}
    assert metrics == {"sync/tensors": 2, "sync/verified_tensors": 2} | same
    ray.get(sync.workers.rank.step.remote())
    assert sync.push(engines, 1, must_change=True) == metrics


def test_weights_that_did_not_change_after_a_step_are_an_error(sync):
    engines = [Engine.remote()]
    sync.push(engines, 0, must_change=False)
    sync.push(engines, 1, must_change=False)
    with pytest.raises(WeightSyncError, match=r"step 2: no tensor changed since version 1"):
        sync.push(engines, 2, must_change=True)


def test_an_engine_restarted_after_the_step_does_not_hide_the_change(sync):
    engines = [Engine.remote()]
    sync.push(engines, 0, must_change=False)
    ray.get(sync.workers.rank.step.remote())
    sync.resend(dict(enumerate(engines)), 1)
    sync.push(engines, 1, must_change=True)


class Rollout:
    """An engine that is found dead once, when ``dies``, or ``refuses`` weights once."""

    def __init__(self, dies=False, refuses=False):
        self.engines, self.num_restarts, self.dies, self.refuses = ["engine"], 0, dies, refuses

    def ensure_alive(self, *, refusing=False):
        if refusing and self.refuses:
            self.num_restarts, self.refuses = self.num_restarts + 1, False
        if self.broken and self.dies:
            self.num_restarts, self.dies = self.num_restarts + 1, False

    broken = False


class Failing:
    """A sync that fails the first time."""

    def __init__(self, rollout):
        self.rollout, self.calls = rollout, 0

    def push(self, engines, version, *, must_change):
        self.calls += 1
        self.rollout.broken = True
        if self.calls == 1:
            cause = EngineRefused("no room") if self.rollout.refuses else RuntimeError("EngineDied")
            raise WorkerError("trainer rank 0 raised") from cause
        return {"sync/tensors": 2.0}


def trainer_of(rollout):
    trainer = RLTrainer.__new__(RLTrainer)
    trainer.rollout, trainer.sync, trainer.step = rollout, Failing(rollout), 3
    return trainer


def test_a_sync_that_loses_its_engine_begins_again_with_another():
    trainer = trainer_of(Rollout(dies=True))
    assert trainer.push(must_change=True) == {"sync/tensors": 2.0}
    assert trainer.sync.calls == 2


def test_a_sync_that_an_engine_refuses_begins_again_with_another():
    trainer = trainer_of(Rollout(refuses=True))
    assert trainer.push(must_change=True) == {"sync/tensors": 2.0}
    assert (trainer.sync.calls, trainer.rollout.num_restarts) == (2, 1)


def test_a_sync_that_fails_with_all_engines_alive_is_an_error():
    trainer = trainer_of(Rollout(dies=False))
    with pytest.raises(WorkerError):
        trainer.push(must_change=True)
    assert trainer.sync.calls == 1


def test_a_tensor_that_did_not_arrive_is_named(sync):
    engines = [Engine.remote(), Engine.remote(loses=["b"])]
    with pytest.raises(WeightSyncError, match=r"engine 1 does not hold version 0: 1 tensors differ \(b\)"):
        sync.push(engines, 0, must_change=False)


def test_the_canary_sees_a_model_that_computes_something_else(sync):
    with pytest.raises(WeightSyncError, match=r"engine 0 with version 0 scores the canary prompt t/eval/0 .* 0\.01"):
        sync.push([Engine.remote(skews=0.01)], 0, must_change=False)
