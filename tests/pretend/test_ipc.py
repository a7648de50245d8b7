"""Payloads of weights open on the GPU that made them and on no other, by SGLang's own deserialiser."""

import pytest

from tests.pretend import device, jobs

pytestmark = pytest.mark.skipif(device.reason_to_skip() is not None, reason=str(device.reason_to_skip()))

CODE = """
from tests.pretend.ipc import open_payload, share

def opened(payload, visible):
    try:
        return open_payload(payload, visible)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

payloads = share("GPU-a", ["model.norm.weight", "lm_head.weight"], 2)
answer = {
    "alone": [opened(payload, ["GPU-a"]) for payload in payloads],
    "among others": opened(payloads[0], ["GPU-c", "GPU-b", "GPU-a"]),
    "elsewhere": opened(payloads[0], ["GPU-b"]),
    "again": opened(share("GPU-b", ["model.norm.weight"], 1)[0], ["GPU-a", "GPU-b"]),
}
"""


def test_a_payload_opens_on_its_own_gpu_only():
    answer = jobs.evaluate(CODE)
    assert answer["alone"] == [0, 0]
    assert answer["among others"] == 2
    assert answer["elsewhere"] == "Exception: Invalid device_uuid=GPU-a"
    assert answer["again"] == 1


PAIRS = """
from types import SimpleNamespace

from megarl.config import ParallelConfig, RolloutConfig, RunConfig
from tests.pretend.ipc import open_payload, share
from tests.pretend.mode import Pretend

with Pretend():  # megarl looks whether there is CUDA when it is imported
    from megarl.launch.placement import Node, _on_gpus, plan
    from megarl.trainer.sync import WeightSync


class Rank:
    def __init__(self):
        self.send_weights = self

    def remote(self, audience, version, final, *, relayed):
        assert relayed
        self.audience = audience
        return {}


answer = {}
for size in (1, 2, 4, 8):
    config = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=2), rollout=RolloutConfig(tensor_parallel_size=size)
    )
    decided = plan(config, [Node("id", "10.0.0.1", 8, 8)])
    placement = _on_gpus(config, decided, None, [0], {(0, gpu): str(gpu) for gpu in range(8)}, None)
    visible = [
        options["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"].split(",")
        for options in placement.rank_options + placement.engine_options
    ]
    of_rank, of_engine = visible[:8], visible[8:]
    sync, ranks = WeightSync.__new__(WeightSync), [Rank() for _ in range(8)]
    sync.workers = SimpleNamespace(ranks=ranks, gather=lambda calls: calls)
    sync.sources = placement.sources
    sync._send_here(dict(enumerate(range(len(of_engine)))), 1)
    answer[size] = [
        (rank, listener.engine, place, open_payload(share(f"GPU-{of_rank[rank][0]}", ["w"], 1)[0], seen))
        for rank, sender in enumerate(ranks)
        for listener in sender.audience
        for place in listener.ranks
        for seen in [[f"GPU-{gpu}" for gpu in of_engine[listener.engine]]]
    ]
"""


def test_every_engine_rank_gets_its_payload_from_the_rank_on_its_gpu():
    """Eight colocated GPUs: it opens on the device that SGLang gives to the tensor-parallel rank, once for each."""
    answer = jobs.evaluate(PAIRS)
    for size in (1, 2, 4, 8):
        pairs = answer[str(size)]
        assert sorted((engine, place) for _, engine, place, _ in pairs) == [
            (engine, place) for engine in range(8 // size) for place in range(size)
        ]
        assert all(opened == place for _, _, place, opened in pairs)
        assert [rank for rank, _, _, _ in pairs] == list(range(8))
