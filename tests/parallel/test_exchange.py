"""Rows that go to other ranks, and gradients that come back."""

import pytest
import torch

from megarl.parallel.exchange import exchange_rows

WIDTH = 3
# tokens from each rank (row) to each rank
PLANS = {
    "uneven": [[1, 4, 0], [2, 0, 3], [5, 1, 1]],
    "a rank sends nothing": [[2, 3, 1], [0, 0, 0], [1, 0, 4]],
    "a rank receives nothing": [[2, 0, 1], [3, 0, 2], [1, 0, 4]],
    "one rank for another": [[0, 0, 0], [0, 0, 7], [0, 0, 0]],
}


def rows_of(sender: int, plan: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sender)
    return torch.randn(sum(plan[sender]), WIDTH, generator=generator).to(dtype)


def loss_of(received: torch.Tensor, receiver: int) -> torch.Tensor:
    weight = torch.arange(received.numel()).view_as(received) * 0.1 + receiver
    return (received.float().square() * weight).sum()


def exchange(plan: list[list[int]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = rows_of(rank, plan, dtype).requires_grad_()
    receive = [counts[rank] for counts in plan]
    received = exchange_rows(rows, send=plan[rank], receive=receive, group=dist.group.WORLD)
    loss_of(received, rank).backward()
    return received.detach(), rows.grad


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradients_are_those_of_one_process(pool, name, dtype):
    plan = PLANS[name]
    rows = [rows_of(rank, plan, dtype).requires_grad_() for rank in range(3)]
    parts = [rows[rank].split(plan[rank]) for rank in range(3)]
    expected = [torch.cat([part[receiver] for part in parts]) for receiver in range(3)]
    sum(loss_of(received, receiver) for receiver, received in enumerate(expected)).backward()
    for rank, (received, gradient) in enumerate(pool.run(exchange, 3, plan, dtype)):
        assert torch.equal(received, expected[rank])
        assert torch.equal(gradient, rows[rank].grad)


def miscounted() -> None:
    import torch.distributed as dist

    exchange_rows(torch.zeros(2, WIDTH), send=[3], receive=[3], group=dist.group.WORLD)


def test_rows_that_are_not_announced_are_refused(pool):
    with pytest.raises(AssertionError, match=r"2 rows for 1 ranks of 1, which expect 3"):
        pool.run(miscounted, 1)
