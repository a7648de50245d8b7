"""The trainer's ranks as Ray actors, called together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from megarl.algorithms.corrections import finish
from megarl.config import RunConfig
from megarl.types import Estimates, PackedBatch, Placement, VisionShare
from megarl.utils.errors import RunFailure, death_of
from megarl.utils.network import free_port
from megarl.workers.passes import Totals
from megarl.workers.policy import PolicyWorker

# what ranks do while engines have the memory, or before there are any
_WITHOUT_MEMORY = {"setup", "build", "release", "finish_saving", "adapter_modules"}


def _nothing() -> None: ...


class WorkerError(RunFailure):
    """A rank raised or died; the message names it."""


class _RankActor(PolicyWorker):
    """What Ray adds to a rank: where it runs, and how bins reach it."""

    def address(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()

    def with_share(self, method: str, bins: Any, shares: Any, *args: Any) -> Any:
        """``method`` with ``bins`` made whole: their images travel by themselves, and not past the first stage."""
        if shares is not None:
            bins = _each(with_vision, bins, shares)
        return getattr(self, method)(bins, *args)


class WorkerGroup:
    """All ranks of the trainer. A method here calls the worker's method of the same name on every rank."""

    def __init__(self, config: RunConfig, placement: Placement) -> None:
        self.config = config
        self.take_turn: Callable[[], None] = _nothing  # called before the ranks need their memory
        options = placement.rank_options or [{}] * config.world_size
        actor = ray.remote(_RankActor)
        self.ranks: list[ActorHandle] = [
            actor.options(**({"num_cpus": 0} | options[rank])).remote(config, rank) for rank in range(config.world_size)
        ]
        address, port = self._get(0, self.ranks[0].address.remote())
        self.call("setup", address, port)

    @property
    def data_parallel_size(self) -> int:
        return self.config.data_parallel_size

    def exporters(self) -> list[list[ActorHandle]]:
        """The ranks that together hold one copy of the weights, by pipeline stage."""
        parallel = self.config.parallel
        size, stage = parallel.replica_size, len(self.ranks) // parallel.pipeline_model_parallel_size
        return [self.ranks[start : start + size] for start in range(0, len(self.ranks), stage)]

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """``method`` with the same arguments on every rank; the results in order of rank.

        Raises ``WorkerError`` that names the first rank that raised or died.
        """
        if method not in _WITHOUT_MEMORY:
            self.take_turn()
        return self.gather([getattr(rank, method).remote(*args, **kwargs) for rank in self.ranks])

    def dispatch(self, method: str, bins: Sequence[Any], *args: Any) -> list[Any]:
        """``method`` on every rank with the bins of its data-parallel rank: nested lists of ``PackedBatch`` for each.

        Streams and images are put into the object store once, images for the rank that decodes them only.
        """
        self.take_turn()
        streams = [ray.put(_each(streams_of, item)) for item in bins]
        shares: dict[tuple[int, int, bool], ray.ObjectRef] = {}
        calls = []
        for rank, actor in enumerate(self.ranks):
            data, context = self.config.data_parallel_rank(rank), self.encoder(rank)
            key = data, context, self.config.decodes_images(rank)
            if context is not None and key not in shares:
                share = partial(share_of, context_parallel_rank=context, decodes=key[-1])
                shares[key] = ray.put(_each(share, bins[data]))
            share = None if context is None else shares[key]
            calls.append(actor.with_share.remote(method, streams[data], share, *args))
        return self.gather(calls)

    def encoder(self, rank: int) -> int | None:
        """The context-parallel rank of a rank with a vision tower, which the first stage has."""
        parallel = self.config.parallel
        if rank >= len(self.ranks) // parallel.pipeline_model_parallel_size:
            return None
        return rank // parallel.tensor_model_parallel_size % parallel.context_parallel_size

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
            raise WorkerError(f"trainer rank {rank} died: {death_of(error)}") from error

    # ---- one step ---------------------------------------------------------------------------------------------------

    def load(self, minibatches: list[list[list[PackedBatch]]], step: int | None = None) -> None:
        """Send ``[optimizer step][data-parallel rank][microbatch]`` of a run's ``step``, from 0, to the ranks."""
        self.dispatch("load", [list(bins) for bins in zip(*minibatches, strict=True)], step)

    def score(self) -> None:
        """Old and reference log-probs of what was loaded; they stay on the ranks."""
        self.call("score")

    def estimate(self, bins: list[list[PackedBatch]]) -> list[list[Estimates]]:
        """What models say of the actions of ``[data-parallel rank][microbatch]``, in the same order."""
        return self._by_bin(self.dispatch("estimate", bins))

    def train(self) -> dict[str, float]:
        """The optimizer updates on what was loaded; metrics over all actions of the step."""
        return merge([totals for totals in self.call("train") if totals is not None])

    def release(self, parts: Sequence[str]) -> int:
        """Move ``parts`` of ``trainer.offload`` to host memory, and empty caches; the most bytes that a rank freed.

        Ranks take back what they need when they need it.
        """
        return max(self.call("release", list(parts)))

    def validate(self, bins: list[list[PackedBatch]]) -> dict[str, float]:
        """The loss over ``[data-parallel rank][microbatch]`` without training."""
        return merge([totals for totals in self.dispatch("validate", bins) if totals is not None])

    def logprobs(self, bins: list[list[PackedBatch]], *, temperature: float, ban: bool) -> list[list[np.ndarray]]:
        """Log-probs of the actions of ``[data-parallel rank][microbatch]``, in the same order."""
        return self._by_bin(self.dispatch("logprobs", bins, temperature, ban))

    def _by_bin(self, outputs: list[Any]) -> list[Any]:
        """By data-parallel rank, from the ranks that answer."""
        speakers = {self.config.data_parallel_rank(rank): out for rank, out in enumerate(outputs) if out is not None}
        return [speakers[rank] for rank in range(self.data_parallel_size)]

    def shutdown(self) -> None:
        """End the ranks."""
        for rank in self.ranks:
            ray.kill(rank)


def with_vision(batch: PackedBatch, vision: list[VisionShare | None]) -> PackedBatch:
    """``batch`` with other images."""
    return replace(batch, payload=replace(batch.payload, vision=vision))


def streams_of(batch: PackedBatch) -> PackedBatch:
    """``batch`` without images."""
    return with_vision(batch, [])


def share_of(batch: PackedBatch, *, context_parallel_rank: int, decodes: bool) -> list[VisionShare | None]:
    """``payload.vision`` without the images that other ranks encode, nor their files unless the rank ``decodes``."""
    share = batch.payload.vision[context_parallel_rank]
    if share is not None and not decodes:
        share = replace(share, media=share.media.without_files())
    return [share if rank == context_parallel_rank else None for rank in range(len(batch.payload.vision))]


def _each(function: Callable[..., Any], bins: Any, *others: Any) -> Any:
    """``function`` of each ``PackedBatch`` in nested lists, and of what lies at its place in ``others``."""
    if isinstance(bins, PackedBatch):
        return function(bins, *others)
    return [_each(function, *items) for items in zip(bins, *others, strict=True)]


def merge(totals: list[Totals]) -> dict[str, float]:
    """Metrics of a step from what the data-parallel ranks counted."""
    count = max(1, sum(t.count for t in totals))
    names = dict.fromkeys(itertools.chain.from_iterable(t.sums for t in totals))
    metrics = {name: sum(t.sums.get(name, 0.0) for t in totals) / count for name in names}
    metrics = finish(metrics)
    for name in dict.fromkeys(itertools.chain.from_iterable(t.maxima for t in totals)):
        metrics[name] = max(t.maxima.get(name, 0.0) for t in totals)
    for name in dict.fromkeys(itertools.chain.from_iterable(t.seconds for t in totals)):
        metrics[f"timing_s/{name}"] = max(t.seconds.get(name, 0.0) for t in totals)
    return metrics | totals[0].values
