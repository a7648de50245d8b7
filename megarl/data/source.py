"""The endless stream of prompts that a run trains on: several tasks mixed by weight, resumable by a few counters."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megarl.config import DataConfig
from megarl.types import EncodedPrompt, Prompt

logger = logging.getLogger(__name__)

_PATIENCE = 1000  # over-long prompts in a row after which an endless task is given up


class PromptTask(Protocol):
    """What this module asks of a task."""

    def num_prompts(self, split: str) -> int | None: ...

    def prompt(self, split: str, index: int) -> Prompt: ...


class Encoder(Protocol):
    """What this module asks of a processor, or of ``data.conversations``."""

    def lay_out(self, prompt: Prompt) -> EncodedPrompt: ...

    def check(self, encoded: EncodedPrompt) -> None: ...


@dataclass(frozen=True)
class Limit:
    """The most tokens that may be handed out at once."""

    tokens: int
    name: str  # of what sets it, for the user


class PromptSource:
    """Training prompts of ``tasks`` (name -> task, weight) in an order that depends on ``seed`` and counters alone.

    Finite tasks are shuffled anew every epoch (``data.shuffle``); endless ones start at a place of their seed. Prompts
    longer than ``limit``, or of more patches than ``max_patches``, are dropped and counted, never cut; after the first
    epoch they are not read again. The mixture keeps every task's share of the prompts handed out within one of its
    weight's share.
    """

    def __init__(
        self,
        tasks: dict[str, tuple[PromptTask, float]],
        processor: Encoder,
        data: DataConfig,
        *,
        limit: Limit,
        max_patches: int | None = None,
        seed: int = 0,
        lengths: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """``lengths``: tokens [size] of the prompts of tasks for which they are known before any is drawn."""
        for name, (_, weight) in tasks.items():
            if weight < 0:
                raise ValueError(f"tasks.{name}.weight={weight} must not be negative")
        total = sum(weight for _, weight in tasks.values())
        if total <= 0:
            raise ValueError("no task has a positive weight")
        self.tasks = {name: task for name, (task, weight) in tasks.items() if weight > 0}
        self.shares = {name: weight / total for name, (_, weight) in tasks.items() if weight > 0}
        self.processor, self.data, self.limit, self.seed = processor, data, limit, seed
        self.max_patches = math.inf if max_patches is None else max_patches
        self.sizes = {name: task.num_prompts("train") for name, task in self.tasks.items()}
        for name, size in self.sizes.items():
            if size == 0:
                raise ValueError(f"task {name!r} has no training prompts")
        self.drawn = dict.fromkeys(self.tasks, 0)  # prompts taken from each task, dropped ones included
        self.dropped = dict.fromkeys(self.tasks, 0)  # over-long
        lengths = lengths or {}
        self._overlong: dict[str, set[int]] = {  # indices known to be, of finite tasks
            name: set(np.flatnonzero(lengths.get(name, np.zeros(0)) > limit.tokens).tolist()) for name in self.tasks
        }
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # task -> (epoch, its permutation)

    def next(self, n: int) -> list[EncodedPrompt]:
        """The next ``n`` prompts."""
        return [self._next_of(self._choose()) for _ in range(n)]

    def _choose(self) -> str:
        """The task that lags furthest behind its share."""
        kept = {name: self.drawn[name] - self.dropped[name] for name in self.tasks}
        total = sum(kept.values()) + 1
        return max(self.tasks, key=lambda name: self.shares[name] * total - kept[name])

    def _next_of(self, name: str) -> EncodedPrompt:
        limit, patience = self.limit, self.sizes[name] or _PATIENCE
        for _ in range(patience):
            index = self._index(name)
            self.drawn[name] += 1
            if index in self._overlong[name]:
                self.dropped[name] += 1
                continue
            # headers of images are enough to see that a prompt is too long
            encoded = self.processor.lay_out(self.tasks[name].prompt("train", index))
            tokens, patches = len(encoded.tokens), encoded.media.num_patches
            if tokens > limit.tokens:
                why = f"{tokens} tokens are more than {limit.name}={limit.tokens}"
            elif patches > self.max_patches:
                why = f"{patches} patches are more than trainer.max_patches_per_microbatch={self.max_patches}"
            else:
                self.processor.check(encoded)
                return encoded
            self.dropped[name] += 1
            if self.sizes[name] is not None:
                self._overlong[name].add(index)
            level = logging.WARNING if self.dropped[name] == 1 else logging.DEBUG
            logger.log(level, "%s: dropped: %s (further ones are only counted)", encoded.prompt.name, why)
        raise ValueError(f"task {name!r}: {patience} prompts in a row are longer than {limit.name}={limit.tokens}")

    def _index(self, name: str) -> int:
        position, size = self.drawn[name], self.sizes[name]
        if size is None:
            return (self.seed << 32) + position
        epoch, place = divmod(position, size)
        if not self.data.shuffle:
            return place
        if name not in self._orders or self._orders[name][0] != epoch:
            random = np.random.default_rng([self.seed, epoch, zlib.crc32(name.encode())])
            self._orders[name] = (epoch, random.permutation(size))
        return int(self._orders[name][1][place])

    def state_dict(self) -> dict[str, Any]:
        """Counters only, JSON-able."""
        return {"seed": self.seed, "sizes": dict(self.sizes), "drawn": dict(self.drawn), "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ``ValueError`` where the prompts are not the ones of then."""
        for key, now in (("seed", self.seed), ("sizes", self.sizes)):
            if state[key] != now:
                raise ValueError(f"cannot resume the prompts: {key} was {state[key]} and is {now}")
        self.drawn, self.dropped = dict(state["drawn"]), dict(state["dropped"])
