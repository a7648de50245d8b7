"""Our Adam is torch's, with the step where Megatron-Core looks for it."""

import pytest
import torch

from megarl.parallel.adam import FusedAdam


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_equals_torch(monkeypatch, adam_w_mode, fused):
    """``fused``: the kernel that CUDA gets, which torch has for the CPU too."""
    torch.manual_seed(0)
    starts = [torch.randn(5), torch.randn(3, 7)]
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    ours, theirs = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    optimizer = FusedAdam(ours, **options, adam_w_mode=adam_w_mode)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **options)
    if fused:
        monkeypatch.setattr(FusedAdam, "plain", lambda self, group, parameter: self.fused(group, [parameter]))
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
        assert set(optimizer.state[mine]) == {"exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["step"] == 4


def test_parameters_without_a_gradient_stay():
    still, moves = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    moves.grad = torch.ones(3)
    FusedAdam([still, moves]).step()
    assert torch.equal(still, torch.ones(3))
    assert (moves < 1).all()


@pytest.mark.gpu
def test_cuda_takes_the_fused_kernel():
    parameter = torch.ones(4, device="cuda", requires_grad=True)
    other = torch.ones(4, requires_grad=True)
    for p in (parameter, other):
        p.grad = torch.arange(4.0, device=p.device)
        FusedAdam([p], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(parameter.cpu(), other)
