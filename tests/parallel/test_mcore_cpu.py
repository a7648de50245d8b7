"""What the CPU stands in for on a machine without CUDA."""

import threading

import pytest
import torch

from megarl.parallel import mcore_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core runs on CUDA here")


def test_fused_adam_equals_adamw():
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(4, 5)
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    finals = []
    for kind in (torch.optim.AdamW, mcore_cpu.FusedAdam):
        parameter = start.clone().requires_grad_()
        optimizer = kind([parameter], **options)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        finals.append(parameter.detach())
    torch.testing.assert_close(finals[0], finals[1])
    assert optimizer.param_groups[0]["step"] == 4
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}


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
