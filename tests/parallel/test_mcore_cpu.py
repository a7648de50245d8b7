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


def test_the_norm_of_gradients_is_upstreams_and_reads_none_of_them():
    mcore_cpu.install()
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((7, 5), (300,), (1,), (64, 33))]
    expected, _ = local_multi_tensor_l2_norm(0, None, [tensors], False)
    ours, _ = clip_grads.l2_norm_impl(0, None, [tensors], False)
    assert torch.equal(ours, expected)
    without_numbers, _ = clip_grads.l2_norm_impl(0, None, [[t.to("meta") for t in tensors]], False)
    assert without_numbers.shape == expected.shape
