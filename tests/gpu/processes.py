"""Ranks on GPUs: a new process each, which sees one GPU and has joined a world of NCCL."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TIMEOUT_S = 300.0


def skip_without_gpus(count: int) -> None:
    """Skip where there are fewer than ``count`` GPUs."""
    import torch  # the runner's process needs it for no other test

    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, there are {torch.cuda.device_count()}")


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world_size`` ranks; ``AssertionError`` holds their tracebacks."""
    skip_without_gpus(world_size)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    job, ranks = pickle.dumps((function, args)), []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(rank, world_size, port, job, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    answers = []
    try:
        for rank, (process, connection) in enumerate(ranks):
            if not connection.poll(TIMEOUT_S):
                raise AssertionError(f"rank {rank} did not answer in {TIMEOUT_S:g} s")
            try:
                answers.append(connection.recv())
            except EOFError:
                process.join()
                answers.append((False, f"rank {rank} ended with exit code {process.exitcode}"))
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    failures = [text for good, text in answers if not good]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in answers]


def _rank(rank: int, world_size: int, port: int, job: bytes, connection: Connection) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # before anything asks CUDA, as Ray does for the ranks of a run
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank] if len(visible) > rank and visible[rank] else str(rank)
    try:
        import torch.distributed as dist

        dist.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        function, args = pickle.loads(job)
        answer = (True, function(*args))
        dist.barrier()
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send(answer)
