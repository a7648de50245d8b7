"""Products of groups of rows with a matrix each, in one kernel where torch has one.

Shapes: N rows in order of their group, E groups with a matrix [K, M] each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megarl.utils.transfer import send


def grouped_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group's rows times its matrix: [N, M]. Differentiable.

    rows: [N, K]; matrices: [E, K, M]; counts: [E] int64 rows of each group, possibly none, N in all, on the host or
    the device. In bfloat16 they are not read on the host; else, or where a row is no multiple of 16 bytes, it loops.
    """
    aligned = all(size % 8 == 0 for size in matrices.shape[1:])
    if rows.dtype != torch.bfloat16 or not aligned or not len(rows):
        return grouped_product_naive(rows, matrices, counts)
    ends = counts.cumsum(0, dtype=torch.int32)
    return _GroupedProduct.apply(rows, matrices, ends if ends.device == rows.device else send(ends, rows.device))


def grouped_product_naive(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """``grouped_product`` group by group."""
    # unbound once: the gradient of an indexed matrix would be as large as that of all
    pairs = zip(rows.split(counts.tolist()), matrices.unbind(), strict=True)
    return torch.cat([group @ matrix for group, matrix in pairs])


class _GroupedProduct(torch.autograd.Function):
    """torch's has a gradient of its own, but not for one that is expanded."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, matrices, ends)
        return F.grouped_mm(rows, matrices, offs=ends)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, matrices, ends = ctx.saved_tensors
        grad, of_rows, of_matrices = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            of_rows = F.grouped_mm(grad, matrices.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            of_matrices = F.grouped_mm(rows.T, grad, offs=ends)
        return of_rows, of_matrices, None
