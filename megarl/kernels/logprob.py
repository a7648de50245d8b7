"""Log-probability and rank of one token a row, and the entropy of its distribution, straight from hidden states.

The logits of N rows over V tokens are never held at once: rows go in chunks, the vocabulary may be split over
tensor-parallel ranks, and the backward pass computes each chunk's logits again. A pass holds two buffers of a chunk's
size and, backward, the float32 gradient of the weight. Logits are float32 whatever the weights are: rounding them to
bfloat16 moves a log-probability by up to 7e-2, a third of a usual clip range.

Shapes: N rows, H hidden, V tokens of the vocabulary, V_local of them on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megarl.utils.transfer import send

# Bytes of a chunk's logits, and rows beyond which a larger chunk gains little. A CPU is fastest where they nearly
# stay in its caches. A GPU reads and writes the float32 gradient of the whole weight once a chunk: by arithmetic on an
# H100 that takes 260 / rows of the time of the chunk's products.
CHUNK_BYTES, CHUNK_ROWS = {"cpu": 64 << 20, "cuda": 512 << 20}, 2048


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N] of ``targets`` and entropies [N], float32, of softmax(hidden @ weight.T / temperature), and whether
    no token is likelier than the target [N] bool.

    hidden: [N, H]; weight: [V_local, H], this rank's rows; targets: [N] int64. The softmax runs over tokens below
    ``vocab_size`` (rows of ``weight`` beyond are padding) that are not in ``banned_ids``; a banned target has log-prob
    -inf and a finite gradient. ``chunk_size``: rows of a chunk; None: as ``CHUNK_BYTES`` and ``CHUNK_ROWS`` say. Every
    rank of ``tp_group`` calls it with the same N, forward and backward. The gradient of ``hidden`` is this rank's part
    of a sum over ``tp_group``, which the caller's copy or gather region forms.
    """
    return _LinearLogprob.apply(
        hidden, weight, targets, vocab_size, temperature, tuple(banned_ids), tp_group, chunk_size
    )


def linear_logprob_naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_logprob`` with the whole weight [V, H], in plain torch."""
    logits = (hidden @ weight.T)[:, :vocab_size] / temperature
    allowed = torch.ones(vocab_size, dtype=torch.bool, device=hidden.device)
    allowed[list(banned_ids)] = False
    logprobs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(~allowed, 0)).sum(-1)
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    return chosen, entropy, chosen == logprobs.amax(1)


def _operand(tensor: Tensor) -> Tensor:
    """``tensor`` as a factor of products that are rounded to no less than float32; a CPU has none of halves."""
    return tensor if tensor.is_cuda else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logits(hidden: Tensor, weight: Tensor, temperature: float, banned: Tensor, out: Tensor) -> Tensor:
    """Logits [n, V_local] of operands in ``out``, -inf where ``banned`` [V_local]."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    return out.div_(temperature).masked_fill_(banned, -torch.inf)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two operands to ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if tensor.numel() and group is not None and group.size() > 1:
        dist.all_reduce(tensor, op, group=group)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        temperature: float,
        banned_ids: tuple[int, ...],
        group: dist.ProcessGroup | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = weight.shape[0] * (group.rank() if group is not None else 0)
        ids = torch.arange(first, first + weight.shape[0], device=weight.device)
        banned = ids >= vocab_size
        if banned_ids:
            banned |= torch.isin(ids, send(torch.tensor(banned_ids), weight.device))
        local = targets - first
        mine = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)

        compute = torch.promote_types(hidden.dtype, torch.float32)
        peak = hidden.new_empty(len(hidden), dtype=compute)
        sums = hidden.new_empty(3, len(hidden), dtype=compute)  # of e^(x-peak), of (x-peak) e^(x-peak), the target's x
        factor, chunks, buffers = _operand(weight), *_plan(hidden, weight, chunk_size, compute)
        for rows, logits, exp in _chunks(chunks, buffers):
            _logits(_operand(hidden[rows]), factor, temperature, banned, logits)
            sums[2, rows] = logits.gather(1, local[rows, None])[:, 0].masked_fill_(~mine[rows], 0)
            # a shard may hold nothing but padding
            peak[rows] = logits.amax(1).clamp_(min=torch.finfo(compute).min / 2)
            logits.sub_(peak[rows, None])
            torch.exp(logits, out=exp)
            sums[0, rows] = exp.sum(1)
            sums[1, rows] = exp.mul_(logits.masked_fill_(banned, 0)).sum(1)
        top = peak.clone()
        _all_reduce(top, dist.ReduceOp.MAX, group)
        below = peak - top  # of the shard's peak, that of all
        sums[1] += below * sums[0]
        sums[:2] *= below.exp()
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        log_sum = sums[0].log()
        entropy = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, mine, banned, top, log_sum, entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        likeliest = sums[2] == top
        ctx.mark_non_differentiable(likeliest)
        # not minus (top + log_sum): large logits would round log_sum away
        return sums[2] - top - log_sum, entropy, likeliest

    @staticmethod
    def backward(ctx: FunctionCtx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple:
        hidden, weight, local, mine, banned, top, log_sum, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=top.dtype) if ctx.needs_input_grad[1] else None
        factor, chunks, buffers = _operand(weight), *_plan(hidden, weight, ctx.chunk_size, top.dtype)
        for rows, grad, probs in _chunks(chunks, buffers):  # grad: of the logits, in the end
            _logits(_operand(hidden[rows]), factor, ctx.temperature, banned, grad)
            grad.sub_(top[rows, None]).sub_(log_sum[rows, None])
            torch.exp(grad, out=probs)
            if grad_entropy is not None:  # dH/dx = -p (log p + H)
                grad.masked_fill_(banned, 0).add_(entropy[rows, None]).mul_(probs).mul_(-grad_entropy[rows, None])
            else:
                grad.zero_()
            if grad_logprobs is not None:  # d log p_target / dx = onehot - p
                grad.addcmul_(probs, grad_logprobs[rows, None], value=-1)
                grad.scatter_add_(1, local[rows, None], (grad_logprobs[rows] * mine[rows])[:, None])
            grad.div_(ctx.temperature)
            rounded = grad
            if grad.dtype != hidden.dtype:  # in the place of the probabilities
                rounded = probs.view(hidden.dtype)[:, : grad.shape[1]].copy_(grad)
            if grad_hidden is not None:
                torch.mm(rounded, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                left = rounded if rounded.is_cuda else grad.copy_(rounded)
                _accumulate(grad_weight, left.T, _operand(hidden[rows]))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


def _plan(hidden: Tensor, weight: Tensor, chunk_size: int | None, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
    """Which rows go together, and two buffers [2, n, V_local] for the most of them."""
    length, width = len(hidden), len(weight)
    fitting = CHUNK_BYTES[hidden.device.type] // (width * dtype.itemsize)
    size = chunk_size or min(max(1, fitting), CHUNK_ROWS)
    slices = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    return slices, hidden.new_empty(2, min(size, length), width, dtype=dtype)


def _chunks(slices: list[slice], buffers: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk with its part of the buffers."""
    for rows in slices:
        yield rows, *buffers[:, : rows.stop - rows.start].unbind()
