"""The process that computes rewards: ``python -m megarl.rewards.worker FD``, started by ``rewards.runner``.

It reads batches of calls from the pipe ``FD`` and answers each call as it finishes. Calls of synchronous functions run
one after the other, those of asynchronous functions of one batch together. It ends when the pipe closes or its parent
is gone.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from megarl.registry import load_object
from megarl.types import Prompt


@dataclass(frozen=True)
class RewardFunction:
    """A reward by name, so that every process builds its own: a function with verl's signature, or a task's class."""

    path: str  # "module:function" | "file.py:function"; with is_task "module:Class"
    is_task: bool = False  # path is a class with score(prompt, response), built from arguments and kwargs
    arguments: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Callable[[Prompt, str], Any]:
        if self.is_task:
            return load_object(self.path)(*self.arguments, **self.kwargs).score
        function = load_object(self.path)
        if inspect.iscoroutinefunction(function):

            async def call_async(prompt: Prompt, response: str) -> Any:
                return await function(*_verl_arguments(prompt, response))

            return call_async
        return lambda prompt, response: function(*_verl_arguments(prompt, response))


def _verl_arguments(prompt: Prompt, response: str) -> tuple[Any, ...]:
    """data_source, solution_str, ground_truth, extra_info."""
    source, extra = prompt.metadata.get("data_source", prompt.task), prompt.metadata.get("extra_info")
    return source, response, prompt.answer, {**prompt.metadata, **(extra if isinstance(extra, dict) else {})}


@dataclass(frozen=True)
class Call:
    id: int
    task: str
    payload: bytes  # (prompt, response), pickled, so that a batch survives a prompt that cannot be read here


@dataclass(frozen=True)
class Reply:
    """``rewards`` of call ``id``, or what went wrong; id -1 says that the functions are built, or why not."""

    id: int
    rewards: dict[str, float] = field(default_factory=dict)
    problem: str = ""  # one line
    trace: str = ""
    task: str = ""  # whose function could not be built, with id -1
    asynchronous: tuple[str, ...] = ()  # tasks whose function is, with id -1


def as_rewards(value: Any) -> dict[str, float]:
    """A function's result by name: ``score`` and the numeric parts beside it. Raises ``ValueError`` otherwise."""
    if isinstance(value, numbers.Real):
        value = {"score": value}
    if not isinstance(value, dict) or "score" not in value:
        raise ValueError(f"a reward is a number or a dict with 'score', not {value!r}")
    rewards = {str(name): float(part) for name, part in value.items() if isinstance(part, numbers.Real)}
    if "score" not in rewards or not math.isfinite(rewards["score"]):
        raise ValueError(f"a score is a finite number, not {value['score']!r}")
    return rewards


def _failure(id: int, error: BaseException, task: str = "") -> Reply:
    return Reply(id, problem=f"{type(error).__name__}: {error}", trace=traceback.format_exc(), task=task)


async def _answer_async(connection: Connection, call: Call, function: Callable, timeout: float) -> None:
    try:
        reply = Reply(call.id, as_rewards(await asyncio.wait_for(function(*pickle.loads(call.payload)), timeout)))
    except TimeoutError:
        reply = Reply(call.id, problem=f"took longer than rewards.timeout_s={timeout:g}", trace=traceback.format_exc())
    except Exception as error:  # whatever a user's function raises is reported, with its traceback
        reply = _failure(call.id, error)
    connection.send(reply)


def _answer(connection: Connection, call: Call, function: Callable) -> None:
    try:
        reply = Reply(call.id, as_rewards(function(*pickle.loads(call.payload))))
    except (Exception, SystemExit) as error:
        reply = _failure(call.id, error)
    connection.send(reply)


async def _answer_all(
    connection: Connection, calls: list[Call], functions: dict[str, Callable], timeout: float
) -> None:
    await asyncio.gather(*(_answer_async(connection, call, functions[call.task], timeout) for call in calls))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def serve(connection: Connection) -> None:
    """Build the functions that the parent names, then answer its calls until it closes the pipe."""
    parent, timeout, wanted = connection.recv()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    functions: dict[str, Callable] = {}
    for task, function in wanted.items():
        try:
            functions[task] = function.build()
        except Exception as error:
            connection.send(_failure(-1, error, task))
            return
    asynchronous = tuple(task for task, function in functions.items() if inspect.iscoroutinefunction(function))
    connection.send(Reply(-1, asynchronous=asynchronous))
    with asyncio.Runner() as runner:
        while True:
            try:
                calls = connection.recv()
            except EOFError:
                return
            if calls[0].task in asynchronous:
                runner.run(_answer_all(connection, calls, functions, timeout))
            else:
                for call in calls:
                    _answer(connection, call, functions[call.task])


if __name__ == "__main__":
    # The module runs as __main__; what it unpickles names it by its import path.
    from megarl.rewards import worker

    worker.serve(Connection(int(sys.argv[1])))
