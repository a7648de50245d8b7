"""How the weights of a rank reach the engines: the transports of weight sync, seen from the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError

from megarl.checkpoint.export import Bucket
from megarl.config import RunConfig
from megarl.utils.checksum import tensor_checksum
from megarl.utils.network import free_port
from megarl.weight_sync.broadcast import abort_group, broadcast_bucket, create_group, layout
from megarl.weight_sync.shared import share_bucket


def _nothing() -> None: ...


@dataclass
class Listener:
    """An engine, and which of its tensor-parallel ranks get their weights from this rank of the trainer."""

    engine: ActorHandle
    ranks: list[int] = field(default_factory=list)


class WeightSender:
    """Delivers buckets to engines by ``weight_sync.transport``: shared memory and CUDA IPC, or gloo and NCCL."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.audience: list[ActorHandle] = []  # engines of the broadcast group

    def send(
        self, buckets: Iterator[Bucket], audience: list[Listener], version: int, final: bool, lead: bool | None = None
    ) -> dict[str, str]:
        """Push ``buckets`` to ``audience``, whose weights all come from the ranks that call it; the checksums.

        All ranks that make a bucket together call it, also those without an audience. A bucket is on its way while the
        next one is gathered. The ``final`` call makes the engines forget what they computed with the old weights.
        ``lead``: whether this rank computes the checksums, {} where it does not; None: the first of a stage does.
        """
        if lead is None:
            lead = self.rank % (self.config.world_size // self.config.parallel.pipeline_model_parallel_size) == 0
        deliver = self._broadcast if self.config.weight_sync.transport == "broadcast" else self._share
        sent: dict[str, str] = {}
        failure: Exception | None = None
        following = next(buckets, None)
        while following is not None:
            bucket, arrived = following, _nothing
            try:
                if audience and failure is None:
                    arrived = deliver(bucket, audience, version)
            except Exception as error:  # raised below: the other ranks are gathering the buckets that are left
                failure = error
            following = next(buckets, None)
            if lead:
                sent |= {name: tensor_checksum(tensor) for name, tensor in bucket}
            try:
                arrived()
            except Exception as error:
                failure = error
        try:
            if final and failure is None:
                heads = [listener.engine for listener in audience if 0 in listener.ranks]
                ray.get([engine.forget.remote() for engine in heads], timeout=self.config.rollout.timeout_s)
        except Exception as error:
            failure = error
        if failure is not None:
            self._abandon()
            raise failure
        return sent

    def send_adapters(self, adapters: Bucket, engines: list[ActorHandle], version: int) -> dict[str, str]:
        """Give ``engines`` the policy's adapters in the place of their last; the checksums.

        They are small: Ray carries them, and each engine shares them with its ranks.
        """
        lora = self.config.model.lora
        modules = sorted({name.rsplit(".", 3)[1] for name, _ in adapters})
        # SGLang scales by alpha / rank whatever the configuration says
        description = {
            "peft_type": "LORA",
            "r": lora.rank,
            "lora_alpha": lora.scale * lora.rank,
            "target_modules": modules,
        }
        tensors = ray.put([(name, tensor.contiguous().cpu()) for name, tensor in adapters])
        ray.get(
            [engine.load_adapter.remote(tensors, description, version) for engine in engines],
            timeout=self.config.rollout.timeout_s,
        )
        return {name: tensor_checksum(tensor) for name, tensor in adapters}

    def _share(self, bucket: Bucket, audience: list[Listener], version: int) -> Callable[[], None]:
        """By shared memory or CUDA IPC: each tensor-parallel rank of an engine opens a payload of its own.

        Returns what waits for its arrival.
        """
        payloads = share_bucket(bucket, sum(len(listener.ranks) for listener in audience))
        loading = [
            listener.engine.update_weights_from_shared.remote({r: payloads.pop() for r in listener.ranks}, version)
            for listener in audience
        ]
        return partial(ray.get, loading, timeout=self.config.rollout.timeout_s)

    def _broadcast(self, bucket: Bucket, audience: list[Listener], version: int) -> Callable[[], None]:
        """By gloo or NCCL. Returns what waits for its arrival."""
        engines = [listener.engine for listener in audience]
        if self.audience != engines:
            self._meet(engines)
        described = layout(bucket)
        received = [
            engine.receive_broadcast.remote(
                described.names,
                described.dtypes,
                described.shapes,
                group_name=self.broadcast_name,
                weight_version=version,
            )
            for engine in engines
        ]
        broadcast = broadcast_bucket(bucket, self.broadcast_group)

        def arrived() -> None:
            # The engines are asked first: our stream must not wait for a collective that one of them will never join.
            ray.get(received, timeout=self.config.rollout.timeout_s)
            broadcast.wait()

        return arrived

    def _meet(self, engines: list[ActorHandle]) -> None:
        """Build the process group of this rank and ``engines``, in the place of the last one."""
        if self.audience:
            self._part()
        size, timeout_s = self.config.rollout.tensor_parallel_size, self.config.rollout.timeout_s
        address, port, world_size = ray.util.get_node_ip_address(), free_port(), 1 + size * len(engines)
        self.broadcast_name = f"megarl_{self.rank}_{port}"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        joined = [
            engine.init_broadcast.remote(address, port, 1 + i * size, world_size, backend, self.broadcast_name)
            for i, engine in enumerate(engines)
        ]
        self.broadcast_group = create_group(
            address,
            port,
            world_size=world_size,
            backend=backend,
            group_name=self.broadcast_name,
            timeout_s=self.config.collective_timeout_s,
        )
        ray.get(joined, timeout=timeout_s)
        self.audience = list(engines)

    def _part(self) -> None:
        """Leave the last group, in which an engine died; those that live do too."""
        left = [engine.destroy_broadcast.remote(self.broadcast_name) for engine in self.audience]
        abort_group(self.broadcast_group)
        for answer in left:
            with suppress(RayError):  # this engine's death is why there is a new group
                ray.get(answer, timeout=self.config.rollout.timeout_s)

    def _abandon(self) -> None:
        """Give up a group in which something failed: a collective that was begun may never end by itself."""
        if self.audience:
            for engine in self.audience:
                engine.destroy_broadcast.remote(self.broadcast_name)  # those that still listen leave first
            abort_group(self.broadcast_group)
            self.audience = []
