"""Whether an engine still works: its processes live, and what it computes gets on.

A long answer may take longer than any limit on a call, so an engine counts as hung only when it has done nothing at all
for ``rollout.timeout_s``: no forward pass, no image decoded, no response.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from megarl.rollout.engine import EngineDied, Progress
from megarl.utils.errors import EngineRefused, death_of

_LOOKS = 4  # questions in a time-out
_MAX_POLL_S = 10.0
_WAIT_S = 0.1  # for a response, between looks at the clock


class Heartbeat:
    """How long an engine that has requests has done nothing; the owner calls ``cause_of_death`` every moment.

    A hung engine is found a quarter of ``timeout_s`` late at most, one whose process is gone at once. Time in which the
    owner does not look does not count: nobody asks the engine then.
    """

    def __init__(self, engine: Any, timeout_s: float) -> None:
        self._engine, self._timeout_s = engine, timeout_s
        self.poll_s = min(_MAX_POLL_S, timeout_s / _LOOKS)  # between questions
        self._question: ray.ObjectRef | None = None  # one at a time: a hung engine answers none
        self._steps = -1
        self.beat()

    def beat(self) -> None:
        """The engine has just done something, or nobody could have noticed."""
        self._looked, self._silent_s = time.monotonic(), 0.0
        self._ask_at = self._looked + self.poll_s

    def cause_of_death(self) -> str:
        """Why the engine must be replaced, or nothing."""
        now = time.monotonic()
        self._silent_s += min(now - self._looked, self.poll_s)
        self._looked = now
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            try:
                progress: Progress = ray.get(self._question)
            except (RayActorError, RayTaskError) as error:
                return death_cause(error)
            self._question = None
            if progress.paused or progress.steps != self._steps:
                self.beat()
            self._steps = progress.steps
        if self._question is None and now >= self._ask_at:
            self._question = self._engine.progress.remote()
            self._ask_at = now + self.poll_s
        if self._silent_s > self._timeout_s:
            return f"no progress for rollout.timeout_s={self._timeout_s:g} s"
        return ""


def await_answer(call: ray.ObjectRef, engine: Any, timeout_s: float) -> Any:
    """The result of ``call`` to ``engine``, which may have much to do before it: ``GetTimeoutError`` when it hangs."""
    heartbeat = Heartbeat(engine, timeout_s)
    while not ray.wait([call], timeout=_WAIT_S)[0]:
        if cause := heartbeat.cause_of_death():
            raise GetTimeoutError(cause)
    return ray.get(call)


def is_refusal(error: Exception) -> bool:
    """Whether ``error``, raised by an engine or by a rank that talked to one, is a live engine's refusal of weights."""
    return isinstance(error, EngineRefused) or isinstance(error.__cause__, EngineRefused)


def death_cause(error: Exception) -> str:
    """Why an engine is dead, in one line; an ``error`` that does not mean an engine's death is raised again."""
    if isinstance(error, RayActorError):
        return death_of(error)
    if isinstance(error, GetTimeoutError):
        return "no answer in time"
    if isinstance(error, RayTaskError) and isinstance(error.cause, EngineDied):
        return str(error.cause)
    raise error
