"""What the CPU stands in for on a machine without CUDA."""

import threading

import pytest
import torch

from megarl.parallel import mcore_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core runs on CUDA here")


def test_a_thread_enters_for_itself():
    mcore_cpu.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    found = []

    def run():
        try:
            torch.zeros(2, device="cuda")
        except (RuntimeError, AssertionError):
            found.append("no CUDA")
        mcore_cpu.enter()
        mcore_cpu.enter()
        found.append(torch.zeros(2, device="cuda").cuda().device.type)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["no CUDA", "cpu"]
