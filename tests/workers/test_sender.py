"""The order in which a rank gathers and sends, and what it does when an engine fails on the way."""

import pytest
import torch

from megarl.config import ParallelConfig, RunConfig, TrainerConfig, WeightSyncConfig
from megarl.utils.checksum import tensor_checksum
from megarl.workers import sender
from megarl.workers.sender import Listener, WeightSender


class Call:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def remote(self, *args):
        self.log.append(self.name)
        return self.name


class Engine:
    def __init__(self, log):
        self.forget, self.destroy_broadcast = Call(log, "forget"), Call(log, "leave")


class Logged(WeightSender):
    """Delivers into a log; the delivery of ``fails`` never arrives."""

    def __init__(self, log, config, rank=0, fails=None):
        super().__init__(config, rank)
        self.log, self.fails = log, fails

    def _share(self, bucket, audience, version):
        (name, _), *_ = bucket
        self.log.append(f"send {name}")

        def arrived():
            self.log.append(f"arrived {name}")
            if name == self.fails:
                raise RuntimeError(f"{name} is lost")

        return arrived


def buckets_of(log):
    for name in "abc":
        log.append(f"gather {name}")
        yield [(name, torch.arange(3.0) + ord(name))]


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(sender.ray, "get", lambda calls, timeout: calls)
    return []


def config_of():
    return RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        weight_sync=WeightSyncConfig(transport="tensor"),
        trainer=TrainerConfig(ranks_per_node=4),
    )


def test_a_bucket_is_on_its_way_while_the_next_is_gathered(log):
    sent = Logged(log, config_of()).send(buckets_of(log), [Listener(Engine(log), [0])], 1, True)
    assert log == [
        *("gather a", "send a", "gather b", "arrived a", "send b", "gather c", "arrived b", "send c", "arrived c"),
        "forget",
    ]
    assert sent == {name: tensor_checksum(torch.arange(3.0) + ord(name)) for name in "abc"}


def test_only_the_first_rank_of_an_engine_makes_it_forget_and_only_at_the_end(log):
    Logged(log, config_of()).send(buckets_of(log), [Listener(Engine(log), [1])], 1, True)
    Logged(log, config_of()).send(buckets_of(log), [Listener(Engine(log), [0])], 1, False)
    assert "forget" not in log


def test_a_rank_without_audience_gathers_with_the_others(log):
    assert Logged(log, config_of(), rank=1).send(buckets_of(log), [], 1, True) == {}
    assert log == ["gather a", "gather b", "gather c"]


def test_after_a_failure_the_other_buckets_are_gathered_and_none_is_sent(log, monkeypatch):
    aborted = []
    monkeypatch.setattr(sender, "abort_group", aborted.append)
    broken = Logged(log, config_of(), fails="a")
    broken.audience, broken.broadcast_group, broken.broadcast_name = [Engine(log)], "group", "name"
    with pytest.raises(RuntimeError, match="a is lost"):
        broken.send(buckets_of(log), [Listener(Engine(log), [0])], 1, True)
    # engines that still listen leave before the group is aborted, and the next push builds another
    assert log == ["gather a", "send a", "gather b", "arrived a", "gather c", "leave"]
    assert (aborted, broken.audience) == (["group"], [])
