"""Whose memory is where: the order of moves in a step, and that nothing moves twice."""

import pytest

from megarl.config import RunConfig, TrainerConfig
from megarl.rollout.manager import RolloutManager
from megarl.trainer.turns import Turns

PARTS = ["optimizer", "gradients", "parameters", "reference"]


class Log:
    """Ranks and engines that note what they are told to move."""

    def __init__(self):
        self.moves = []

    def ranks(self, parts):
        self.moves.append(("ranks lend", *parts))
        return 2_000_000_000

    def engines(self, name):
        def move(kinds):
            self.moves.append((f"engines {name}", *kinds))
            return True

        return move

    def taken(self):
        moves, self.moves = self.moves, []
        return moves


class Workers:
    def __init__(self, log):
        self.release = log.ranks


class Engines:
    memory_gb = {"weights": 15.0, "kv_cache": 40.0, "cuda_graph": 1.0}  # noqa: RUF012

    def __init__(self, log):
        self.release, self.reclaim = log.engines("lend"), log.engines("take")


@pytest.fixture
def log():
    return Log()


def turns_of(log, **trainer):
    turns = Turns(RunConfig(trainer=TrainerConfig(**trainer)), Workers(log))
    turns.rollout = Engines(log)
    return turns


def test_the_moves_of_a_colocated_step(log):
    turns = turns_of(log, placement="colocated", offload=PARTS)
    assert turns.shared
    turns.engines()
    assert log.taken() == [("ranks lend", *PARTS), ("engines take", "weights", "kv_cache", "cuda_graph")]
    turns.training()  # new weights come afterwards
    assert log.taken() == [("engines lend", "weights", "kv_cache", "cuda_graph")]
    turns.sending()
    assert log.taken() == [
        ("ranks lend", "optimizer", "gradients", "reference"),
        ("engines lend", "kv_cache", "cuda_graph"),
        ("engines take", "weights"),
    ]
    turns.ranks()  # a checkpoint: no new weights follow
    assert log.taken() == [("engines lend", "kv_cache", "cuda_graph")]
    metrics = turns.metrics()
    assert set(metrics) == {
        "timing_s/offload",
        "timing_s/engine_release",
        "timing_s/engine_reclaim",
        "perf/offloaded_gb",
        "perf/engine_released_gb",
    }
    assert (metrics["perf/offloaded_gb"], metrics["perf/engine_released_gb"]) == (2, 56)
    assert turns.metrics() == {}


def test_what_engines_keep_is_never_moved(log):
    config = RunConfig(trainer=TrainerConfig(placement="colocated", offload=["optimizer"]))
    config.rollout.release = ["kv_cache"]
    turns = Turns(config, Workers(log))
    turns.rollout = Engines(log)
    turns.training()
    turns.sending()
    assert log.taken() == [("engines lend", "kv_cache"), ("ranks lend", "optimizer"), ("engines lend", "kv_cache")]


def test_split_engines_lend_nothing(log):
    turns = turns_of(log, placement="split", offload=[])
    for turn in (turns.engines, turns.training, turns.sending, turns.ranks, turns.make_room):
        turn()
    assert log.taken() == []
    assert not turns.shared


def test_an_engine_moves_only_what_is_not_there_yet(monkeypatch):
    told = []

    class Method:
        def __init__(self, name):
            self.name = name

        def remote(self, kinds):
            told.append((self.name, kinds))

    class Engine:
        release, reclaim = Method("release"), Method("reclaim")

    monkeypatch.setattr("megarl.rollout.manager.ray.get", lambda call, timeout: None)
    manager = RolloutManager.__new__(RolloutManager)
    manager._config, manager.engines, manager._lent, manager._lost = (
        RunConfig(),
        [Engine(), Engine()],
        [set(), set()],
        {},
    )
    assert manager.release(["weights", "kv_cache"])
    manager._lent[1] = set()  # it was restarted, and has everything
    assert manager.release(["kv_cache"])
    assert manager.reclaim(["weights", "kv_cache", "cuda_graph"])
    assert not manager.reclaim(["weights"])
    first, second = ("release", ["weights", "kv_cache"]), ("reclaim", ["weights", "kv_cache"])
    assert told == [first, first, ("release", ["kv_cache"]), second, ("reclaim", ["kv_cache"])]
