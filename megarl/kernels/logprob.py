"""Log-probability and rank of one token a row, and the entropy of its distribution, straight from hidden states.

The logits of N rows over V tokens are never held at once: rows go in chunks, the vocabulary may be split over
tensor-parallel ranks, and the backward pass computes each chunk's logits again. Logits are float32 whatever the
weights are: rounding them to bfloat16 moves a log-probability by up to 7e-2, a third of a usual clip range.

Shapes: N rows, H hidden, V tokens of the vocabulary, V_local of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N] of ``targets`` and entropies [N], float32, of softmax(hidden @ weight.T / temperature), and whether
    no token is likelier than the target [N] bool.

    hidden: [N, H]; weight: [V_local, H], this rank's rows; targets: [N] int64. The softmax runs over tokens below
    ``vocab_size`` (rows of ``weight`` beyond are padding) that are not in ``banned_ids``; a banned target has log-prob
    -inf and a finite gradient. Every rank of ``tp_group`` calls it with the same N, forward and backward. The gradient
    of ``hidden`` is this rank's part of a sum over ``tp_group``, which the caller's copy or gather region forms.
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


def _logits(hidden: Tensor, weight: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """Logits [n, V_local] of at least float32, -inf where ``banned`` [V_local]."""
    return _product(hidden, weight.T).div_(temperature).masked_fill_(banned, -torch.inf)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, rounded to no less than float32."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


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
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = weight.shape[0] * (group.rank() if group is not None else 0)
        ids = torch.arange(first, first + weight.shape[0], device=weight.device)
        banned = ids >= vocab_size
        if banned_ids:
            banned |= torch.isin(ids, torch.tensor(banned_ids, device=weight.device))
        local = targets - first
        mine = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)

        compute = torch.promote_types(hidden.dtype, torch.float32)
        peak = hidden.new_empty(len(hidden), dtype=compute)
        sums = hidden.new_empty(3, len(hidden), dtype=compute)  # of e^(x-peak), of (x-peak) e^(x-peak), the target's x
        for rows in _chunks(len(hidden), chunk_size):
            logits = _logits(hidden[rows], weight, temperature, banned)
            sums[2, rows] = logits.gather(1, local[rows, None])[:, 0].masked_fill_(~mine[rows], 0)
            # a shard may hold nothing but padding
            peak[rows] = logits.amax(1).clamp_(min=torch.finfo(compute).min / 2)
            logits.sub_(peak[rows, None])
            exp = logits.exp()
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
        for rows in _chunks(len(hidden), ctx.chunk_size):
            logprobs = _logits(hidden[rows], weight, ctx.temperature, banned).sub_(top[rows, None])
            logprobs.sub_(log_sum[rows, None])
            probs = logprobs.exp()
            grad = torch.zeros_like(probs)  # of the logits
            if grad_entropy is not None:  # dH/dx = -p (log p + H)
                logprobs.masked_fill_(banned, 0).add_(entropy[rows, None]).mul_(probs)
                grad.addcmul_(logprobs, grad_entropy[rows, None], value=-1)
            if grad_logprobs is not None:  # d log p_target / dx = onehot - p
                grad.addcmul_(probs, grad_logprobs[rows, None], value=-1)
                grad.scatter_add_(1, local[rows, None], (grad_logprobs[rows] * mine[rows])[:, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += _product(grad.T, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
