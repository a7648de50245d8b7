"""For tests whose body runs on a CPU too: they are parametrised by ``device``, and only their CUDA half needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from tests.distributed import Pool
from tests.gpu import processes


def nothing() -> None:
    """A case that only starts a rank."""


@pytest.fixture(scope="session")
def pool(pool: Pool) -> Pool:
    """Its ranks compute the CPU's numbers: the server that they are forked from, started here, sees no GPU."""
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        pool.run(nothing, 1)
    return pool


@pytest.fixture
def ranks(pool: Pool) -> Callable[..., list[Any]]:
    """``ranks(device, function, world_size, *args)``: what ``function(*args)`` returns on each rank, NCCL on CUDA."""

    def run(device: str, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        if device == "cpu":
            return pool.run(function, world_size, *args)
        return processes.run(function, world_size, *args)

    return run
