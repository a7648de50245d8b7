"""What a task is, and how the tasks of a configuration are built."""

from __future__ import annotations

import inspect
from typing import Protocol

from megarl.config import RunConfig
from megarl.registry import load_object
from megarl.rewards.runner import RewardFunction
from megarl.types import Prompt


class Task(Protocol):
    """Prompts and their reward. Built as ``Class(name, data, **kwargs)``: the key in ``RunConfig.tasks``,
    ``RunConfig.data`` and ``tasks.<name>.kwargs``.

    A class without ``score`` needs ``tasks.<name>.reward``. Building must be cheap (the processes that compute rewards
    build their own) and scoring must not need the prompts' source.
    """

    def num_prompts(self, split: str) -> int | None:
        """Prompts of ``split`` (train | eval); None where there is no end."""

    def prompt(self, split: str, index: int) -> Prompt:
        """The prompt at ``index``, the same in every process and every run; its id is ``<name>/<split>/<index>``."""

    def score(self, prompt: Prompt, response: str) -> dict[str, float]:
        """``score`` is the reward; the other parts are logged."""


def build_tasks(config: RunConfig) -> dict[str, Task]:
    """The tasks of ``config`` by name. Errors name the key of the configuration."""
    if not config.tasks:
        raise ValueError("tasks is empty: name at least one task")
    return {name: _task_class(config, name)(name, config.data, **config.tasks[name].kwargs) for name in config.tasks}


def reward_functions(config: RunConfig) -> dict[str, RewardFunction]:
    """What computes the reward of each task, by the task's name: ``tasks.<name>.reward``, or the task's own."""
    functions = {}
    for name, task in config.tasks.items():
        if task.reward:
            functions[name] = RewardFunction(path=task.reward)
        elif hasattr(_task_class(config, name), "score"):
            functions[name] = RewardFunction(
                path=task.path, arguments=(name, config.data), kwargs=task.kwargs, is_task=True
            )
        else:
            raise ValueError(f"tasks.{name}.reward is empty and {task.path} has no reward of its own")
    return functions


def _task_class(config: RunConfig, name: str) -> type:
    task = config.tasks[name]
    try:
        cls = load_object(task.path)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"tasks.{name}.path={task.path!r}: {error}") from error
    try:
        inspect.signature(cls).bind(name, config.data, **task.kwargs)
    except TypeError as error:
        raise ValueError(f"tasks.{name}.kwargs: {task.path}: {error}") from error
    return cls
