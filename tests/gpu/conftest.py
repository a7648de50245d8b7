"""For tests whose body runs on a CPU too: they are parametrised by ``device``, and only their CUDA half needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed import Pool
from tests.gpu import processes


@pytest.fixture
def ranks(pool: Pool) -> Callable[..., list[Any]]:
    """``ranks(device, function, world_size, *args)``: what ``function(*args)`` returns on each rank, NCCL on CUDA."""

    def run(device: str, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        if device == "cpu":
            return pool.run(function, world_size, *args)
        return processes.run(function, world_size, *args)

    return run
