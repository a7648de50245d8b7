"""Turns: colocated ranks and engines use the same memory, one after the other.

A step is: ranks lend their memory -> engines generate -> engines lend theirs, weights included -> ranks train -> ranks
lend all but their parameters -> engines take room for weights and get them -> ranks lend their parameters too ->
engines take the rest. With ``trainer.placement=split`` engines lend nothing, and ranks what ``trainer.offload`` names.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from megarl.config import RunConfig
from megarl.rollout.manager import RolloutManager
from megarl.workers.group import WorkerGroup


class Turns:
    """Who has the memory. Every method may be called at any time, and does nothing where nothing must move."""

    def __init__(self, config: RunConfig, workers: WorkerGroup) -> None:
        self.workers = workers
        self.rollout: RolloutManager | None = None  # before there are engines
        self.offloaded = config.trainer.offloaded
        self.released = config.released
        # weights are sent after every training step and only then: at other times engines keep theirs
        self.beside_weights = [kind for kind in self.released if kind != "weights"]
        self.seconds: dict[str, float] = defaultdict(float)
        self.gigabytes: dict[str, float] = defaultdict(float)

    @property
    def shared(self) -> bool:
        """Whether engines lend memory at all."""
        return bool(self.released)

    def engines(self) -> None:
        """The engines generate next."""
        self.make_room()
        self._engines("reclaim", self.released)

    def training(self) -> None:
        """The ranks train next, after which the engines get new weights."""
        self._engines("release", self.released)

    def ranks(self) -> None:
        """The ranks need their memory, and the engines keep the weights that they have."""
        self._engines("release", self.beside_weights)

    def sending(self) -> None:
        """The ranks send weights next: theirs and the engines' are there, and nothing that can be spared."""
        self._ranks([part for part in self.offloaded if part != "parameters"])
        self._engines("release", self.beside_weights)
        self._engines("reclaim", [kind for kind in self.released if kind == "weights"])

    def make_room(self) -> None:
        """The ranks lend all that they can."""
        self._ranks(self.offloaded)

    def metrics(self) -> dict[str, float]:
        """Seconds of the moves since the last call, and the most gigabytes that a rank and an engine lent."""
        metrics = {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}
        metrics |= {f"perf/{name}_gb": size for name, size in self.gigabytes.items()}
        self.seconds.clear()
        self.gigabytes.clear()
        return metrics

    def _ranks(self, parts: list[str]) -> None:
        if parts or self.shared:  # also without parts: caches of what is no longer used
            with self._timer("offload"):
                self._note("offloaded", self.workers.release(parts) / 1e9)

    def _engines(self, method: str, kinds: list[str]) -> None:
        if kinds and self.rollout is not None:
            with self._timer(f"engine_{method}"):
                moved = getattr(self.rollout, method)(kinds)
            if moved and method == "release":
                self._note("engine_released", sum(self.rollout.memory_gb[kind] for kind in kinds))

    def _note(self, name: str, gigabytes: float) -> None:
        self.gigabytes[name] = max(self.gigabytes[name], gigabytes)

    @contextmanager
    def _timer(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
