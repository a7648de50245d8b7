"""The pool says what went wrong on which rank, and is usable afterwards."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError


def total(value: int) -> int:
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return int(tensor)


def fail_on_one(kind: str) -> None:
    if dist.get_rank() == 1:
        if kind == "raises":
            raise KeyError("the reason")
        if kind == "dies":
            os._exit(7)
        time.sleep(60)


def test_every_rank_answers(pool):
    assert pool.run(total, 2, 10) == [21, 21]
    assert pool.run(total, 4, 0) == [6] * 4
    assert pool.run(total, 1, 3) == [3]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", r"(?s)rank 1: Traceback.*fail_on_one.*KeyError: 'the reason'"),
        ("dies", "rank 1: the process ended with exit code 7"),
        ("hangs", r"ranks \[0, 1\] did not answer within 2"),
    ],
)
def test_a_failure_names_its_rank(pool, kind, message):
    with pytest.raises(RankError, match=message):
        pool.run(fail_on_one, 2, kind, timeout=2.0)
    assert pool.run(total, 2, 0) == [1, 1]
