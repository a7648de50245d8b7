"""Weights on their way to an engine: CUDA IPC to a process on the same GPU, NCCL to one on another."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

from megarl.utils.checksum import tensor_checksum
from megarl.weight_sync.broadcast import broadcast_bucket, create_group, destroy_group
from megarl.weight_sync.shared import share_bucket
from tests.gpu.processes import skip_without_gpus

# not imported here, for it: the runner's process stays free of SGLang
pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
TIMEOUT_S = 90.0
# the transports have default tests on a CPU in tests/rollout: these see that the bodies here are right
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def bucket(device: str) -> list[tuple[str, Tensor]]:
    torch.manual_seed(0)
    shapes = {"lm_head.weight": (1000, 64), "model.norm.weight": (33,), "visual.patch_embed.proj.weight": (8, 3, 2, 2)}
    return [(name, torch.randn(shape).bfloat16().to(device)) for name, shape in shapes.items()]


def in_child(function, *args):
    """A process that runs ``function(connection, *args)``, and our end of the connection."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(function, theirs, args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _answer(function, connection, args):
    try:
        function(connection, *args)
    except BaseException:
        connection.send(traceback.format_exc())


def answer(process, connection):
    assert connection.poll(TIMEOUT_S), f"no answer in {TIMEOUT_S:g} s"
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return f"ended with exit code {process.exitcode}"


def _prepare_sglang() -> None:
    """It is imported after this, in the child only."""
    from megarl.rollout import cpu_shims

    if not torch.cuda.is_available():
        cpu_shims.install()


def open_payload(connection: Connection, payload: bytes) -> None:
    """As SGLang's scheduler does: the checksums of what arrived, by name."""
    _prepare_sglang()
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    received = MultiprocessingSerializer.deserialize(payload)
    flat = received["flattened_tensor"]
    sums = {
        place.name: tensor_checksum(flat[place.start_idx : place.end_idx].view(place.dtype).view(place.shape))
        for place in received["metadata"]
    }
    connection.send((flat.device.type, sums))
    connection.recv()  # the sender's memory must outlive us


@pytest.mark.parametrize("device", DEVICES)
def test_a_payload_opens_in_another_process(device):
    tensors = bucket(device)
    (payload,) = share_bucket(tensors, 1)
    process, connection = in_child(open_payload, payload)
    try:
        kind, sums = answer(process, connection)
        assert kind == device
        assert sums == {name: tensor_checksum(tensor) for name, tensor in tensors}
        connection.send("done")
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    finally:
        process.kill()


def receive(connection: Connection, port: int, num_bytes: int, backend: str) -> None:
    """As an engine's rank: join the group, get the bucket, send its checksum."""
    import torch.distributed as dist

    os.environ |= {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}  # as SGLang sets them in its processes
    device = "cpu" if backend == "gloo" else "cuda:1"
    if backend == "nccl":
        torch.cuda.set_device(1)
    _prepare_sglang()
    from sglang.srt.utils import init_custom_process_group

    group = init_custom_process_group(
        backend=backend, init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=1, group_name="test"
    )
    flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    dist.broadcast(flat, src=0, group=group)
    connection.send(tensor_checksum(flat))


@pytest.mark.parametrize("device", DEVICES)
def test_a_bucket_is_broadcast(device, monkeypatch):
    if device == "cuda":
        skip_without_gpus(2)
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "0")
    backend, tensors = {"cpu": "gloo", "cuda": "nccl"}[device], bucket(device)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    num_bytes = sum(tensor.nbytes for _, tensor in tensors)
    process, connection = in_child(receive, port, num_bytes, backend)
    try:
        group = create_group("127.0.0.1", port, world_size=2, backend=backend, group_name="test", timeout_s=TIMEOUT_S)
        sent = broadcast_bucket(tensors, group)
        received = answer(process, connection)
        sent.wait()
        assert received == tensor_checksum(sent.flat)
        destroy_group(group)
    finally:
        process.kill()
