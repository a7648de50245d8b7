"""Rewards in processes of their own, so that a hang or a crash costs one sample and slow ones run during generation.

runner = RewardRunner(functions, config.rewards)
handles = [runner.submit(prompt, response) ...]   # while others still generate
scores = runner.gather(handles)                   # in the order of the handles
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from megarl.config import RewardConfig
from megarl.rewards.worker import Call, Reply, RewardFunction
from megarl.types import Prompt
from megarl.utils.errors import RunFailure

__all__ = ["RewardError", "RewardFunction", "RewardRunner", "Score"]

_START_TIMEOUT_S = 300.0  # building the functions may import much
_GRACE_S = 2.0  # an asynchronous call ends itself at the timeout; the process is killed this much later
_MAX_BATCH = 64  # asynchronous calls that one process runs together
_MAX_QUEUE = 16  # synchronous calls that are sent to one process at a time


class RewardError(RunFailure):
    """A reward that raised, hung, crashed its process or returned no number."""

    def __init__(self, task: str, prompt_id: str, function: str, problem: str, trace: str = "") -> None:
        prompt = f", prompt {prompt_id}" if prompt_id else ""
        super().__init__(f"reward of task {task!r}{prompt}: {function}: {problem}")
        self.task, self.prompt_id, self.function, self.problem, self.trace = task, prompt_id, function, problem, trace
        if trace:
            self.add_note(trace.rstrip())


@dataclass(frozen=True)
class Score:
    """What a response earned: ``rewards`` with ``score`` among them, empty where there is an ``error``."""

    rewards: dict[str, float]
    error: RewardError | None = None


@dataclass
class _Job:
    call: Call
    prompt_id: str
    future: Future[Score]
    alone: bool = False  # it was in a batch that hung or crashed; run it by itself to see whether it was the cause


@dataclass
class _Process:
    """One worker process and the parent's end of its pipe."""

    popen: subprocess.Popen
    connection: Connection
    asynchronous: tuple[str, ...] = ()
    pending: dict[int, _Job] = field(default_factory=dict)  # by id, in the order in which they run
    problem: str = ""  # why it never got ready

    def end(self) -> int:
        """Kill the process and everything that it started, once; its exit status."""
        if not self.connection.closed:
            self.connection.close()
            with contextlib.suppress(ProcessLookupError):  # it was gone already
                os.killpg(self.popen.pid, signal.SIGKILL)
        return self.popen.wait()


class RewardRunner:
    """Calls the reward of each task in ``config.num_workers`` processes. Thread-safe.

    A call that exceeds ``config.timeout_s`` has its process killed and replaced. Functions that cannot be built raise
    ``RewardError`` here, before anything is generated.
    """

    def __init__(self, functions: dict[str, RewardFunction], config: RewardConfig) -> None:
        self.functions, self.config = functions, config
        self._jobs: queue.PriorityQueue[tuple[int, int, _Job | None]] = queue.PriorityQueue()
        self._ids = itertools.count()
        self._closed = False
        self._num_processes = max(1, config.num_workers)
        processes = [self._start() for _ in range(self._num_processes)]
        try:
            for process in processes:
                self._await_ready(process)
        except RewardError:
            for process in processes:
                process.end()
            raise
        self._threads = [threading.Thread(target=self._run, args=(p,), daemon=True) for p in processes]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: Prompt, response: str) -> Future[Score]:
        """Queue one reward; returns at once. The future never raises: a failure is ``Score.error``."""
        if self._closed:
            raise RuntimeError("the reward runner is closed")
        if prompt.task not in self.functions:
            raise ValueError(f"{prompt.name}: no reward for task {prompt.task!r}")
        call = Call(next(self._ids), prompt.task, pickle.dumps((prompt, response)))
        job = _Job(call, prompt.name, Future())
        self._jobs.put((1, job.call.id, job))
        return job.future

    def gather(self, handles: Iterable[Future[Score]]) -> list[Score]:
        """Wait for all ``handles``, in their order. With ``on_error="raise"`` the first error is raised; with "drop" it
        is left in its ``Score`` for the caller to drop and count."""
        scores = []
        for handle in handles:
            scores.append(handle.result())
            if self.config.on_error == "raise" and scores[-1].error is not None:
                raise scores[-1].error  # without waiting for the others, which may hang as well
        return scores

    def close(self) -> None:
        """End the processes; queued rewards are cancelled."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put((0, next(self._ids), None))
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            job = self._jobs.get_nowait()[2]
            if job is not None:
                job.future.cancel()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Process:
        ours, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "megarl.rewards.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a group of its own, so that what a reward starts dies with it
        )
        theirs.close()
        with contextlib.suppress(ConnectionError):  # it died at once: whoever waits for it will see
            ours.send((os.getpid(), self.config.timeout_s, self.functions))
        return _Process(popen, ours)

    def _await_ready(self, process: _Process) -> None:
        """Wait until the process has built its functions. Ends it and raises ``RewardError`` where it has not."""
        task, path, trace = ", ".join(self.functions), "a reward process", ""
        try:
            if process.connection.poll(_START_TIMEOUT_S):
                reply: Reply = process.connection.recv()
                process.problem, process.asynchronous = reply.problem, reply.asynchronous
                if reply.problem:
                    task, path, trace = reply.task, self.functions[reply.task].path, reply.trace
            else:
                process.problem = f"was not ready after {_START_TIMEOUT_S:g} s"
        except (EOFError, ConnectionError):
            process.problem = f"ended at its start, status {process.end()}"
        if process.problem:
            process.end()
            raise RewardError(task, "", path, process.problem, trace)

    def _restart(self) -> _Process:
        """Start a new process. If it does not get ready, every call that is sent to it fails with the reason."""
        process = self._start()
        with contextlib.suppress(RewardError):
            self._await_ready(process)
        return process

    def _run(self, process: _Process) -> None:
        """The thread of one process: a batch at a time, a new process after a hang or a crash."""
        while jobs := self._take(process):
            problem = self._exchange(process, jobs)
            if problem:
                self._blame(process, problem)
                process = self._restart()
        process.end()

    def _take(self, process: _Process) -> list[_Job]:
        """Wait for jobs, all synchronous or all asynchronous; empty when the runner closes.

        Asynchronous jobs bring along what is queued behind them; synchronous ones a part of it that shrinks with the
        queue, so that the processes finish together.
        """
        jobs: list[_Job] = []
        limit = 1
        while len(jobs) < limit:
            try:
                item = self._jobs.get(block=not jobs)
            except queue.Empty:
                break
            job = item[2]
            if job is None:
                if jobs:
                    self._jobs.put(item)
                break
            asynchronous = job.call.task in process.asynchronous
            if jobs and (job.alone or asynchronous != (jobs[0].call.task in process.asynchronous)):
                self._jobs.put(item)
                break
            if job.future.running() or job.future.set_running_or_notify_cancel():
                jobs.append(job)
                share = self._jobs.qsize() // (2 * self._num_processes)
                limit = 1 if jobs[0].alone else _MAX_BATCH if asynchronous else min(_MAX_QUEUE, max(limit, share))
        return jobs

    def _exchange(self, process: _Process, jobs: list[_Job]) -> str:
        """Send a batch and resolve its replies; returns what went wrong with the process, or an empty string."""
        process.pending = {job.call.id: job for job in jobs}
        if process.problem:
            return process.problem
        timeout = self.config.timeout_s
        grace = _GRACE_S if jobs[0].call.task in process.asynchronous else 0.0
        try:
            process.connection.send([job.call for job in jobs])
            while process.pending:
                if not process.connection.poll(timeout + grace):
                    process.end()
                    return f"took longer than rewards.timeout_s={timeout:g}"
                self._resolve(process, process.connection.recv())
        except (EOFError, ConnectionError):
            return f"its process died, status {process.end()}"
        return ""

    def _resolve(self, process: _Process, reply: Reply) -> None:
        job = process.pending.pop(reply.id)
        job.future.set_result(
            Score(reply.rewards, self._error(job, reply.problem, reply.trace) if reply.problem else None)
        )

    def _blame(self, process: _Process, problem: str) -> None:
        """Find the call that ended a process: fail the only one that ran, or run several again one by one."""
        jobs = list(process.pending.values())
        together = jobs[0].call.task in process.asynchronous and len(jobs) > 1
        if not together:
            culprit = jobs.pop(0)
            culprit.future.set_result(Score({}, self._error(culprit, problem)))
        for job in jobs:
            job.alone = together
            self._jobs.put((1, job.call.id, job))

    def _error(self, job: _Job, problem: str, trace: str = "") -> RewardError:
        return RewardError(job.call.task, job.prompt_id, self.functions[job.call.task].path, problem, trace)
