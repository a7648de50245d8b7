"""Engines that are busy, hang, die while they start or get weights: with stand-ins that do what they are told."""

import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError

from megarl.config import ModelConfig, RolloutConfig, RunConfig
from megarl.rollout.liveness import await_answer, is_refusal
from megarl.rollout.manager import EngineError, RolloutManager
from megarl.utils.errors import EngineRefused, RunFailure
from tests.rollout.reference import prompt
from tests.rollout.stand_in import Engine

TIMEOUT_S, LONG_S = 0.8, 2.0
ASKED = SimpleNamespace(num_samples=1)


class Manager(RolloutManager):
    """Its engines are ``lives`` in turn, the last of them again and again."""

    def __init__(self, lives, path, sync=lambda index: None, **rollout):
        self.lives, self.launched = lives, 0
        config = RolloutConfig(**({"num_engines": 1, "timeout_s": TIMEOUT_S} | rollout))
        super().__init__(RunConfig(model=ModelConfig(path=str(path)), rollout=config), path, sync=sync)

    def _launch(self, index):
        life = self.lives[min(self.launched, len(self.lives) - 1)]
        self.launched += 1
        return Engine.remote(**life)


@pytest.fixture
def make(cluster, models):
    made = []

    def start(lives, sync=lambda index: None, **rollout):
        made.append(Manager(lives, models[0], sync, **rollout))
        return made[-1]

    yield start
    for manager in made:
        manager.shutdown()


SETTINGS = {"group_size": 2, "temperature": 1.0, "max_new_tokens": 4, "step_seed": 1}


def test_an_answer_may_take_longer_than_the_timeout(make, processor):
    """Of an engine that works, and of one that stands still by order."""
    manager = make([{"seconds": LONG_S}, {"seconds": LONG_S, "works": False, "paused": True}], num_engines=2)
    start = time.monotonic()
    assert len(manager.generate([prompt(processor, 0, i) for i in range(2)], **SETTINGS)) == 4
    assert time.monotonic() - start >= LONG_S
    assert manager.num_restarts == 0
    working, _ = manager.engines
    assert len(await_answer(working.generate.remote(ASKED), working, TIMEOUT_S)) == 1


def test_an_engine_that_gets_on_with_nothing_is_replaced_in_time(make, processor, caplog):
    manager = make([{"seconds": 600, "works": False}, {"seconds": 0}])
    hanging = manager.engines[0]
    with pytest.raises(GetTimeoutError, match=r"no progress for rollout\.timeout_s=0.8 s"):
        await_answer(hanging.generate.remote(ASKED), hanging, TIMEOUT_S)
    start = time.time()
    assert len(manager.generate([prompt(processor, 0)], **SETTINGS)) == 2
    assert manager.num_restarts == 1
    assert TIMEOUT_S <= caplog.records[-1].created - start <= 1.25 * TIMEOUT_S + 1


def test_a_replacement_that_dies_at_its_start_is_a_restart(make):
    manager = make([{}, {"dies": True}, {}], max_restarts=2)
    manager.restart(0, "it was killed")
    assert (manager.num_restarts, manager.launched) == (2, 3)
    manager.lives[-1] = {"dies": True}
    with pytest.raises(EngineError, match=r"max_restarts=2 in rollout\.restart_window_s=3600 are spent"):
        manager.restart(0, "it was killed")


def test_a_replacement_that_dies_while_it_gets_weights_is_a_restart(make):
    def sync(index):
        if manager.launched == 2:
            ray.kill(manager.engines[index])
            raise RunFailure("trainer rank 0 raised: the engine died")

    manager = make([{}], sync)
    manager.restart(0, "it was killed")
    assert (manager.num_restarts, manager.launched) == (2, 3)


def test_a_sync_that_fails_with_the_replacement_alive_is_an_error(make):
    def sync(index):
        raise RunFailure("a rank has no memory left")

    manager = make([{}], sync)
    with pytest.raises(RunFailure, match="no memory"):
        manager.restart(0, "it was killed")
    assert manager.num_restarts == 1


def test_engines_that_refused_weights_are_replaced_where_none_died(make, caplog):
    manager = make([{}], num_engines=2)
    first, second = manager.engines
    refusal = "engine 1: update_weights_from_shared failed: out of memory"
    ray.get(second.refuse.remote(refusal))
    ray.kill(first)
    manager.ensure_alive(refusing=True)  # what the second refused was of the first's death
    assert (manager.num_restarts, manager.engines[1]) == (1, second)
    manager.ensure_alive(refusing=True)
    assert manager.num_restarts == 1
    ray.get(second.refuse.remote(refusal))
    manager.ensure_alive()  # before a sync: what was refused then does not matter
    assert manager.num_restarts == 1
    ray.get(second.refuse.remote(refusal))
    manager.ensure_alive(refusing=True)
    assert (manager.num_restarts, manager.engines[1] == second) == (2, False)
    assert f"engine 1 is lost: {refusal}" in caplog.text


def test_a_refusal_is_known_from_the_error_of_a_rank():
    refusal = EngineRefused("engine 0: receive_broadcast failed")
    with pytest.raises(RunFailure) as seen_by_a_rank:
        raise RunFailure("trainer rank 0: engine 0 ...") from refusal
    assert is_refusal(seen_by_a_rank.value)
    assert is_refusal(refusal)
    assert not is_refusal(RunFailure("trainer rank 0 died"))


def test_restarts_are_counted_within_a_window(make):
    manager = make([{}], max_restarts=1, restart_window_s=0.5)
    manager.restart(0, "it was killed")
    time.sleep(0.6)
    manager.restart(0, "it was killed again")
    manager._config.rollout.restart_window_s = 600.0
    with pytest.raises(EngineError, match=r"it was killed at last; rollout\.max_restarts=1"):
        manager.restart(0, "it was killed at last")
    assert manager.num_restarts == 2
