"""One pool of gloo ranks that serves every parallel test of a session.

A test hands the fixture ``pool`` a module-level function: ``pool.run(function, world_size, *args)`` calls it on
``world_size`` ranks with ``torch.distributed`` initialised, and returns what each rank returned. The function builds
the model-parallel groups it wants (``megarl.parallel.groups.initialize``); the pool takes everything down after it.
Ranks are processes that live as long as the session, so a case costs no imports.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Imported once, in the process that the ranks are forked from.
PRELOAD = ["megarl.parallel.groups", "megarl.families", "megarl.checkpoint.huggingface", "megarl.kernels.logprob"]
START_S = 300.0  # for a rank to be ready, imports included
MAX_THREADS = 1200  # of a rank: groups of earlier cases that something still refers to keep theirs
GRACE_S = 3.0  # for the other ranks to fail or finish once one has failed


class RankError(AssertionError):
    """What went wrong on the ranks of a case, with their tracebacks."""


def _serve(rank: int, connection: Connection) -> None:
    """Run jobs until the other end of ``connection`` closes."""
    import torch  # in the ranks only: the tests' own process may never need it
    import torch.distributed as dist

    from megarl.parallel import groups, mcore_cpu

    os.setpgid(0, 0)  # so that what a case starts (mcore's checkpoint writers) ends with its rank
    torch.set_num_threads(1)
    mcore_cpu.enter()
    connection.send_bytes(b"ready")
    while True:
        try:
            store, world_size, timeout, job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function, args = pickle.loads(job)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            result = function(*args)
            dist.barrier()  # a rank that closes its sockets must not cut off a slower one
            groups.destroy()
            dist.destroy_process_group()
            answer = (True, result)
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


class Pool:
    """Ranks 0 to ``size - 1``, each started when a case first needs it, and again after a case has failed."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        # the fork server learns sys.path only from the environment, and skips in silence what it cannot import
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, path)]))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._ranks: list[tuple[Any, Connection]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="megarl-pool-")
        self._cases = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """What ``function(*args)`` returns on each of ``world_size`` ranks, in order of rank.

        ``RankError`` holds the traceback of every rank that raised, or names those that did not answer in ``timeout``
        seconds.
        """
        if world_size > self.size:
            raise ValueError(f"world_size={world_size}: the pool has {self.size} ranks")
        self._start(world_size)
        self._cases += 1
        store = Path(self._directory.name) / f"store{self._cases}"
        message = pickle.dumps((str(store), world_size, timeout, pickle.dumps((function, args))))
        connections = [connection for _, connection in self._ranks[:world_size]]
        for connection in connections:
            connection.send_bytes(message)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < world_size and (left := deadline - time.monotonic()) > 0:
            pending = [c for rank, c in enumerate(connections) if rank not in answers]
            for connection in wait(pending, timeout=left):
                rank = connections.index(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    answers[rank] = (False, f"the process ended with exit code {self._exit_code(rank)}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        failures = [f"rank {rank}: {text}" for rank, (good, text) in sorted(answers.items()) if not good]
        silent = [rank for rank in range(world_size) if rank not in answers]
        if failures or silent:
            self.close()
            if silent and not failures:
                failures.append(f"ranks {silent} did not answer within {timeout} s")
            raise RankError(f"{function.__qualname__} on {world_size} ranks\n" + "\n".join(failures))
        if any(len(os.listdir(f"/proc/{process.pid}/task")) > MAX_THREADS for process, _ in self._ranks):
            self.close()
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """End every rank; the next case starts them again."""
        for _, connection in self._ranks:
            connection.close()  # an idle rank leaves by itself
        for process, _ in self._ranks:
            process.join(timeout=GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self._ranks = []

    def _start(self, world_size: int) -> None:
        already = len(self._ranks)
        while len(self._ranks) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(len(self._ranks), theirs))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        for rank in range(already, world_size):
            connection = self._ranks[rank][1]
            if not connection.poll(START_S):
                raise RankError(f"rank {rank} was not ready within {START_S} s")
            connection.recv_bytes()

    def _exit_code(self, rank: int) -> int | None:
        process = self._ranks[rank][0]
        process.join(timeout=1)
        return process.exitcode


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to four gloo ranks."""
    pool = Pool()
    yield pool
    pool.close()
