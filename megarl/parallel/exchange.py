"""Rows of a tensor sent to other ranks, and their gradients sent back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = receive, send, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.back), None, None, None


def exchange_rows(rows: Tensor, *, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that every rank of ``group`` has for this one: [sum(receive), ...] in order of rank. Differentiable.

    rows: [sum(send), ...], the first ``send[0]`` of them for rank 0, and so on. Every rank of the group calls it, and
    goes backward through it if one does: also a rank that sends or receives nothing.
    """
    if len(rows) != sum(send) or len(send) != group.size():
        raise ValueError(f"{len(rows)} rows for {len(send)} ranks of {group.size()}, which expect {sum(send)}: {send}")
    return _Exchange.apply(rows, send, receive, group)
