"""grouped_product against the loop: values and gradients, whatever the groups hold."""

from __future__ import annotations

import pytest
import torch

from megarl.kernels import grouped
from megarl.kernels.grouped import grouped_product, grouped_product_naive

COUNTS = [[3, 0, 9, 1], [0, 0, 5, 0], [0, 7, 0, 6], [8, 8, 8, 8]]


def differentiated(function, counts: list[int], dtype: torch.dtype, sizes: tuple[int, int] = (16, 24)) -> list:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), sizes[0], generator=generator).to(dtype).requires_grad_()
    matrices = torch.randn(len(counts), *sizes, generator=generator).to(dtype).requires_grad_()
    output = function(rows, matrices, torch.tensor(counts))
    weight = torch.randn(output.shape, generator=generator).to(dtype)
    (output * weight).sum().backward()
    return [output.detach(), rows.grad, matrices.grad]


@pytest.mark.parametrize("counts", COUNTS)
def test_equals_the_loop_and_is_none(counts, monkeypatch):
    expected = differentiated(grouped_product_naive, counts, torch.bfloat16)
    monkeypatch.setattr(grouped, "grouped_product_naive", None)  # it is not what is called
    for ours, theirs in zip(differentiated(grouped_product, counts, torch.bfloat16), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (16, 24)), (torch.bfloat16, (12, 24))])
def test_what_the_kernel_does_not_take_is_looped_over(dtype, sizes):
    ours = differentiated(grouped_product, [3, 0, 2], dtype, sizes)
    expected = differentiated(grouped_product_naive, [3, 0, 2], dtype, sizes)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_no_rows_and_an_expanded_gradient():
    matrices = torch.randn(2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    grouped_product(torch.zeros(0, 16, dtype=torch.bfloat16), matrices, torch.tensor([0, 0])).sum().backward()
    assert not matrices.grad.any()
    rows = torch.ones(3, 16, dtype=torch.bfloat16)
    grouped_product(rows, matrices, torch.tensor([1, 2])).sum().backward()
    assert matrices.grad[:, 0, 0].tolist() == [1.0, 2.0]


def test_the_counts_are_not_read():
    """A tensor without storage stands for one whose numbers the host does not know."""
    rows, matrices = torch.zeros(6, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    counts = torch.tensor([2, 4])
    output = grouped_product(*(x.to("meta") for x in (rows, matrices, counts)))
    assert output.shape == (6, 8)
