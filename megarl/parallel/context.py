"""Context parallelism: which tokens of a pack a rank has, and what ranks tell each other about the rest.

Every sequence is cut into 2 * size equal chunks, of which rank r has numbers r and 2 * size - 1 - r, one after the
other: so causal attention costs all ranks the same. Transformer Engine cuts packed sequences like this.

Shapes: T tokens of the pack, T / size of them here, S sequences, N actions, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def local_positions(cu_seqlens: Tensor, size: int, rank: int) -> Tensor:
    """Where in the pack the tokens of ``rank`` are, in the order in which it has them: [T / size] int64.

    cu_seqlens: [S + 1] int on the host, each difference a multiple of 2 * size.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    chunks = lengths // (2 * size)
    if size == 1 or not len(lengths):
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    here = 2 * chunks
    sequences = torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), here)
    within = torch.arange(len(sequences), device=cu_seqlens.device) - (here.cumsum(0) - here)[sequences]
    chunk = chunks[sequences]
    shift = torch.where(within < chunk, rank * chunk, (2 * size - 2 - rank) * chunk)
    return starts[sequences] + within + shift


def gathered_places(cu_seqlens: Tensor, size: int) -> Tensor:
    """``local_positions`` of all ranks, laid end to end: [T] int64."""
    return torch.cat([local_positions(cu_seqlens, size, rank) for rank in range(size)])


def check_chunks(lengths: list[int], size: int) -> None:
    """Raise a ``ValueError`` unless every length can be cut for ``size`` ranks."""
    odd = [length for length in lengths if length % (2 * size)]
    if odd:
        raise ValueError(f"a sequence of {odd[0]} tokens cannot be cut into 2 x {size} chunks: pad it")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        # every rank's loss depends on the total, and the loss is the sum of theirs
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``tensor`` over ``group``, with its gradient; every rank of the group calls it."""
    return _Sum.apply(tensor, group) if group.size() > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.group)
        return part, None


def gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks of ``group`` laid end to end; the gradient of each is the sum over the ranks'."""
    return _Gather.apply(tensor, group)


def _exchange(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Entry i of the first dimension to rank i; entry i of the result came from rank i."""
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_heads(tensor, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grad, ctx.group), None


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_tokens(tensor, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.group), None


def _to_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _exchange(tensor.unflatten(1, (group.size(), -1)).transpose(0, 1), group).flatten(0, 1)


def _to_tokens(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _exchange(tensor.unflatten(0, (group.size(), -1)), group).transpose(0, 1).flatten(1, 2)


def tokens_to_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of this rank's tokens [T / size, H, D] -> its share of heads of all, rank by rank [T, H / size, D]."""
    return _HeadsForTokens.apply(tensor, group)


def heads_to_tokens(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of ``tokens_to_heads``."""
    return _TokensForHeads.apply(tensor, group)


def collect(values: Tensor, places: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """All ``size`` values of a microbatch. Each rank of ``group`` gives its own and their ``places`` there."""
    whole = values.new_zeros(size)
    whole[places] = values
    dist.all_reduce(whole, group=group)
    return whole
