"""The trainer's ranks as Ray actors, called together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from megarl.config import RunConfig
from megarl.types import PackedBatch
from megarl.utils.errors import RunFailure
from megarl.utils.network import free_port
from megarl.workers.policy import PolicyWorker, Totals


class WorkerError(RunFailure):
    """A rank raised or died; the message names it."""


class _RankActor(PolicyWorker):
    """What Ray adds to a rank: where it runs."""

    def address(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()


class WorkerGroup:
    """All ranks of the trainer. A method here calls the worker's method of the same name on every rank."""

    def __init__(self, config: RunConfig, env: dict[str, str] | None = None) -> None:
        self.config = config
        gpus = 1 if torch.cuda.is_available() else 0
        actor = ray.remote(_RankActor).options(num_cpus=0, num_gpus=gpus, runtime_env={"env_vars": env or {}})
        self.ranks: list[ActorHandle] = [actor.remote(config, rank) for rank in range(config.world_size)]
        address, port = self._get(0, self.ranks[0].address.remote())
        self.call("setup", address, port)

    @property
    def data_parallel_size(self) -> int:
        return self.config.data_parallel_size

    def exporters(self) -> list[list[ActorHandle]]:
        """The tensor-parallel groups that together hold one copy of the weights, by pipeline stage."""
        parallel = self.config.parallel
        tp, stage = parallel.tensor_model_parallel_size, len(self.ranks) // parallel.pipeline_model_parallel_size
        return [self.ranks[start : start + tp] for start in range(0, len(self.ranks), stage)]

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """``method`` with the same arguments on every rank; the results in order of rank.

        Raises ``WorkerError`` that names the first rank that raised or died.
        """
        return self.gather([getattr(rank, method).remote(*args, **kwargs) for rank in self.ranks])

    def dispatch(self, method: str, per_data_parallel_rank: Sequence[Any], *args: Any) -> list[Any]:
        """``method`` on every rank with the entry of its data-parallel rank, put into the object store once."""
        refs = [ray.put(item) for item in per_data_parallel_rank]
        return self.gather(
            [
                getattr(actor, method).remote(refs[self.config.data_parallel_rank(rank)], *args)
                for rank, actor in enumerate(self.ranks)
            ]
        )

    def gather(self, refs: list[ray.ObjectRef]) -> list[Any]:
        """The results of ``refs``, one a rank. The first failure wins: the other ranks then wait in a collective."""
        pending = {ref: rank for rank, ref in enumerate(refs)}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            for ref in ready:
                self._get(pending.pop(ref), ref)
        return [ray.get(ref) for ref in refs]

    def _get(self, rank: int, ref: ray.ObjectRef) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError | FileNotFoundError | RunFailure):  # it says itself what is wrong
                raise WorkerError(f"trainer rank {rank}: {error.cause}") from error
            raise WorkerError(f"trainer rank {rank} raised: {error.cause!r}\n{error}") from error
        except RayActorError as error:
            raise WorkerError(f"trainer rank {rank} died: {error}") from error

    # ---- one step ---------------------------------------------------------------------------------------------------

    def load(self, minibatches: list[list[list[PackedBatch]]]) -> None:
        """Send ``[optimizer step][data-parallel rank][microbatch]`` to the ranks."""
        self.dispatch("load", [list(bins) for bins in zip(*minibatches, strict=True)])

    def score(self) -> None:
        """Old and reference log-probs of what was loaded; they stay on the ranks."""
        self.call("score")

    def train(self) -> dict[str, float]:
        """The optimizer updates on what was loaded; metrics over all actions of the step."""
        return merge([totals for totals in self.call("train") if totals is not None])

    def validate(self, bins: list[list[PackedBatch]]) -> dict[str, float]:
        """The loss over ``[data-parallel rank][microbatch]`` without training."""
        return merge([totals for totals in self.dispatch("validate", bins) if totals is not None])

    def logprobs(self, bins: list[list[PackedBatch]], *, temperature: float, ban: bool) -> list[list[np.ndarray]]:
        """Log-probs of the actions of ``[data-parallel rank][microbatch]``, in the same order."""
        outputs = self.dispatch("logprobs", bins, temperature, ban)
        speakers = {self.config.data_parallel_rank(rank): out for rank, out in enumerate(outputs) if out is not None}
        return [speakers[rank] for rank in range(self.data_parallel_size)]

    def shutdown(self) -> None:
        """End the ranks."""
        for rank in self.ranks:
            ray.kill(rank)


def merge(totals: list[Totals]) -> dict[str, float]:
    """Metrics of a step from what the data-parallel ranks counted."""
    count = max(1, sum(t.count for t in totals))
    names = dict.fromkeys(itertools.chain.from_iterable(t.sums for t in totals))
    metrics = {name: sum(t.sums.get(name, 0.0) for t in totals) / count for name in names}
    square = metrics.pop("training/rollout_probs_diff_square", None)
    if square is not None:
        variance = square - metrics["training/rollout_probs_diff_mean"] ** 2
        metrics["training/rollout_probs_diff_std"] = max(0.0, variance) ** 0.5
    for name in dict.fromkeys(itertools.chain.from_iterable(t.maxima for t in totals)):
        metrics[name] = max(t.maxima.get(name, 0.0) for t in totals)
    for name in dict.fromkeys(itertools.chain.from_iterable(t.seconds for t in totals)):
        metrics[f"timing_s/{name}"] = max(t.seconds.get(name, 0.0) for t in totals)
    return metrics | totals[0].values
