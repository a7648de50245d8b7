"""The pretended device refuses what CUDA refuses, allows what it allows, and counts what makes the host wait."""

import pytest

from tests.pretend import device, jobs

pytestmark = pytest.mark.skipif(device.reason_to_skip() is not None, reason=str(device.reason_to_skip()))

CODE = """
import torch
from tests.pretend.mode import Pretend

def tried(function):
    try:
        result = function()
        return [float(x) for x in result.flatten()] if isinstance(result, torch.Tensor) else result
    except Exception as error:
        return type(error).__name__

def waited(pretend, function):
    before = pretend.waits.total()
    function()
    return pretend.waits.total() - before

answer = {}
with Pretend() as pretend:
    x = torch.arange(4.0, device="cuda")
    host, mask = torch.ones(4), x > 1
    answer["refused"] = {
        "add": tried(lambda: x + host),
        "in place": tried(lambda: x.add_(host)),
        "list": tried(lambda: torch.cat([x, host])),
        "index of a CPU tensor": tried(lambda: host[x.long()]),
        "numpy": tried(lambda: x.numpy()),
        "data": tried(lambda: setattr(x, "data", host)),
        "keyword": tried(lambda: torch.where(mask, x, other=host)),
        "made like it on a CPU": tried(lambda: x + torch.zeros_like(x, device="cpu")),
        "out": tried(lambda: torch.mm(x[None], x[:, None], out=torch.empty(1, 1))),
    }
    answer["allowed"] = {
        "number": tried(lambda: x + torch.tensor(1.0)),
        "CPU indices": tried(lambda: x[torch.tensor([3, 0])]),
        "CPU only": tried(lambda: host + host),
        "copy": tried(lambda: host.to("cuda") + x),
    }
    leaf = torch.full((3,), 2.0, device="cuda", requires_grad=True)
    (leaf ** 3).sum().backward()
    answer["gradient"] = [str(leaf.grad.device), leaf.grad.tolist()]
    answer["waits"] = {
        "item": waited(pretend, lambda: x[0].item()),
        "tolist": waited(pretend, lambda: x.tolist()),
        "bool": waited(pretend, lambda: bool(x[0] > 1)),
        "mask": waited(pretend, lambda: x[mask]),
        "nonzero": waited(pretend, lambda: mask.nonzero()),
        "cpu": waited(pretend, lambda: x.cpu()),
        "repeat": waited(pretend, lambda: torch.repeat_interleave(x, torch.tensor([1, 2, 0, 1], device="cuda"))),
        "synchronize": waited(pretend, lambda: torch.cuda.synchronize()),
        "arithmetic": waited(pretend, lambda: (x * 2).softmax(0) @ x),
        "filled by a mask": waited(pretend, lambda: x.masked_fill(mask, 0.0)),
        "to the device": waited(pretend, lambda: host.to("cuda", non_blocking=True)),
    }
    del leaf
    start = pretend.ledger.live
    pretend.ledger.reset_peak()
    big = torch.empty(1000, dtype=torch.bfloat16, device="cuda")
    view = big[:10]
    double = big * 2
    del double
    answer["bytes"] = [pretend.ledger.live - start, pretend.ledger.peak - start]
    del big
    answer["bytes"].append(pretend.ledger.live - start)
    del view
    answer["bytes"].append(pretend.ledger.live - start)
with Pretend("meta") as pretend:
    start = pretend.ledger.live
    weight = torch.zeros(1 << 20, 1 << 12, device="cuda")
    index = torch.tensor([1, 2, 5], device="cuda")
    answer["shapes"] = [list((weight[index] @ weight.T).shape), index.tolist(), pretend.ledger.live - start]
"""


@pytest.fixture(scope="module")
def answer():
    return jobs.evaluate(CODE)


def test_what_cuda_refuses(answer):
    refused = answer["refused"]
    assert refused.pop("numpy") == "TypeError"
    assert set(refused.values()) == {"DeviceMix"}, refused


def test_what_cuda_allows(answer):
    assert answer["allowed"] == {
        "number": [1, 2, 3, 4],
        "CPU indices": [3, 0],
        "CPU only": [2, 2, 2, 2],
        "copy": [1, 2, 3, 4],
    }
    assert answer["gradient"] == ["cuda:0", [12, 12, 12]]


def test_what_makes_the_host_wait(answer):
    none = dict.fromkeys(("arithmetic", "filled by a mask", "to the device"), 0)
    assert {name: answer["waits"].pop(name) for name in none} == none
    assert set(answer["waits"].values()) == {1}, answer["waits"]


def test_bytes_are_counted_by_storage(answer):
    assert answer["bytes"] == [2000, 4000, 2000, 0]


def test_shapes_need_no_memory(answer):
    shape, index, live = answer["shapes"]
    assert shape == [3, 1 << 20]
    assert index == [1, 2, 5]
    assert live == (1 << 32) * 4 + 24
