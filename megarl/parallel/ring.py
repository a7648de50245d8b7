"""Ring attention (arXiv:2310.01889): keys and values travel around the context-parallel ranks, block by block.

In plain torch with the scores of one block at a time in memory: what runs everywhere. Chunks lie as
``parallel/context.py`` cuts them, so a block of another rank is seen whole or not at all: its first half by all
queries when it comes from a rank before this one, all of it by the second half of the queries otherwise.

Shapes: T tokens of this rank, S sequences, L queries, K keys, H heads in Hk groups of G, D channels of a head.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megarl.parallel.layout import Bucket, SequenceLayout, Span


class RingLayouts:
    """Who sees whom in the block of this rank, of a rank before it and of a rank behind it."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device) -> None:
        """cu_seqlens: [S + 1] int on the host, of this rank's parts of the sequences, two chunks each."""
        own, before, behind = [], [], []
        for start, end in pairwise(cu_seqlens.tolist()):
            half = (end - start) // 2
            own.append(Span(start, 2 * half, own=start))
            before.append(Span(start, 2 * half, own=None, first=start, count=half))
            behind.append(Span(start + half, half, own=None, first=start, count=2 * half))
        self.own, self.before, self.behind = (SequenceLayout(s, device) for s in (own, before, behind))

    def of(self, source: int, rank: int) -> SequenceLayout:
        """The layout of the block of rank ``source`` on ``rank``."""
        return self.own if source == rank else self.before if source < rank else self.behind


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, layouts: RingLayouts, *, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of this rank's queries [T, H, D] to keys and values [T, Hk, D] of all ranks: [T, H, D].

    Every rank of ``group`` calls it, forward and backward.
    """
    return _Ring.apply(query, key, value, layouts, scale, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layouts: RingLayouts,
        scale: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        rank, size = group.rank(), group.size()
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros(query.shape, dtype=wide)
        log_sum = query.new_full(query.shape[:2], -torch.inf, dtype=wide)  # of the exponentials of a query's scores
        block, following = torch.stack([key, value]), None
        for step in range(size):
            if step < size - 1:
                following, works = _send_on(block, group)
            layout = layouts.of((rank - step) % size, rank)
            _add_block(output, log_sum, query, block, layout, scale)
            if step < size - 1:
                _wait(works)
                block = following
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.layouts, ctx.scale, ctx.group = layouts, scale, group
        return output.to(query.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        group, rank, size = ctx.group, ctx.group.rank(), ctx.group.size()
        grad = grad.to(output.dtype)
        delta = (grad * output).sum(-1)  # [T, H]
        grad_query = torch.zeros_like(output)
        block = torch.stack([key, value])
        grad_block = block.new_zeros(block.shape, dtype=output.dtype)
        for step in range(size):
            following, works = _send_on(block, group) if step < size - 1 else (block, [])
            for bucket in ctx.layouts.of((rank - step) % size, rank).buckets:
                _add_gradients(grad_query, grad_block, grad, log_sum, delta, query, block, bucket, ctx.scale)
            _wait(works)
            block = following
            # the gradient travels with its block, and one step further: home
            grad_block, works = _send_on(grad_block, group)
            _wait(works)
        return grad_query.to(query.dtype), *grad_block.to(key.dtype).unbind(0), None, None, None


def _send_on(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """``tensor`` on its way to the next rank; what comes from the one before, when the works are done."""
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    received = torch.empty_like(tensor)
    operations = [
        dist.P2POp(dist.isend, tensor, ranks[(rank + 1) % len(ranks)], group),
        dist.P2POp(dist.irecv, received, ranks[rank - 1], group),
    ]
    return received, dist.batch_isend_irecv(operations)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _scores(query: Tensor, key: Tensor, bucket: Bucket, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries [S, Hk, G, L, D], keys [S, Hk, 1, K, D] and their scores [S, Hk, G, L, K], -inf where nothing is seen."""
    q = query[bucket.rows].to(dtype).unflatten(2, (key.shape[1], -1)).permute(0, 2, 3, 1, 4)
    k = key[bucket.keys].to(dtype).transpose(1, 2).unsqueeze(2)
    visible = bucket.visible  # [S, 1, L, K]
    if visible is None:
        visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()[None, None]
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    return q, k, scores.masked_fill_(~visible[:, :, None], -torch.inf)


def _add_block(
    output: Tensor, log_sum: Tensor, query: Tensor, block: Tensor, layout: SequenceLayout, scale: float
) -> None:
    """Add what the queries find in a block [2, T, Hk, D] to ``output`` and ``log_sum``, weighted anew."""
    found, sums = [], []
    for bucket in layout.buckets:
        _, _, scores = _scores(query, block[0], bucket, scale, output.dtype)
        v = block[1][bucket.keys].to(output.dtype).transpose(1, 2).unsqueeze(2)
        sums.append(scores.logsumexp(-1).permute(0, 3, 1, 2).flatten(0, 1).flatten(1))
        found.append((scores.softmax(-1) @ v).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2))
    here, rows = torch.cat(sums)[layout.restore], layout.queries
    total = torch.logaddexp(log_sum[rows], here)
    kept = output[rows] * (log_sum[rows] - total).exp()[..., None]
    output[rows] = kept + torch.cat(found)[layout.restore] * (here - total).exp()[..., None]
    log_sum[rows] = total


def _add_gradients(
    grad_query: Tensor,
    grad_block: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    query: Tensor,
    block: Tensor,
    bucket: Bucket,
    scale: float,
) -> None:
    """Add a bucket's part of the gradients: d score = p (d p - delta), with p from the sums over all blocks."""
    groups = block.shape[2]

    def of_queries(tensor: Tensor) -> Tensor:  # [T, H, ...] -> [S, Hk, G, L, ...]
        return tensor[bucket.rows].unflatten(2, (groups, -1)).movedim(1, 3)

    q, k, scores = _scores(query, block[0], bucket, scale, grad.dtype)
    v = block[1][bucket.keys].to(grad.dtype).transpose(1, 2).unsqueeze(2)
    weights = scores.sub_(of_queries(log_sum)[..., None]).exp_()
    if bucket.valid is not None:
        weights.mul_(bucket.valid[:, None, None, :, None])
    go = of_queries(grad)
    dscores = (go @ v.transpose(-1, -2)).sub_(of_queries(delta)[..., None]).mul_(weights).mul_(scale)
    rows, keys = bucket.rows.flatten(), bucket.keys.flatten()
    grad_query.index_add_(0, rows, (dscores @ k).movedim(3, 1).flatten(0, 1).flatten(1, 2))
    for number, gradient in ((0, dscores.transpose(-1, -2) @ q), (1, weights.transpose(-1, -2) @ go)):
        grad_block[number].index_add_(0, keys, gradient.sum(2).transpose(1, 2).flatten(0, 1))
