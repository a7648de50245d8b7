"""How the weights of a rank reach the engines: the transports of weight sync, seen from the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from megarl.checkpoint.export import Bucket
from megarl.config import RunConfig
from megarl.utils.checksum import tensor_checksum
from megarl.utils.network import free_port
from megarl.weight_sync.broadcast import broadcast_bucket, create_group, destroy_group, layout
from megarl.weight_sync.shared import share_bucket


class WeightSender:
    """Delivers buckets to engines by ``weight_sync.transport``: shared memory and CUDA IPC, or gloo and NCCL."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.audience: list[ActorHandle] = []  # engines of the broadcast group

    def send(self, buckets: Iterator[Bucket], engines: list[ActorHandle], version: int, final: bool) -> dict[str, str]:
        """Push a stage's ``buckets`` to ``engines``; their checksums, {} past the first rank.

        The stage's first replica calls it (``groups.is_first_replica``); stages take turns, and the ``final`` one makes
        the engines forget what they computed with the old weights.
        """
        leads = self.rank % (self.config.world_size // self.config.parallel.pipeline_model_parallel_size) == 0
        deliver = self._broadcast if self.config.weight_sync.transport == "broadcast" else self._share
        sent: dict[str, str] = {}
        failure: Exception | None = None
        following = next(buckets, None)
        while following is not None:
            bucket, following = following, next(buckets, None)
            if leads and failure is None:
                try:
                    deliver(bucket, engines, version, final and following is None)
                except Exception as error:  # raised below: the other ranks are gathering the buckets that are left
                    failure = error
                sent |= {name: tensor_checksum(tensor) for name, tensor in bucket}
        if failure is not None:
            self.audience = []
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

    def _share(self, bucket: Bucket, engines: list[ActorHandle], version: int, flush: bool) -> None:
        """By shared memory or CUDA IPC."""
        size = self.config.rollout.tensor_parallel_size
        payloads = share_bucket(bucket, size * len(engines))
        ray.get(
            [
                engine.update_weights_from_shared.remote(payloads[i * size : (i + 1) * size], version, flush)
                for i, engine in enumerate(engines)
            ],
            timeout=self.config.rollout.timeout_s,
        )

    def _broadcast(self, bucket: Bucket, engines: list[ActorHandle], version: int, flush: bool) -> None:
        """By gloo or NCCL."""
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
                flush=flush,
            )
            for engine in engines
        ]
        broadcast_bucket(bucket, self.broadcast_group)
        ray.get(received, timeout=self.config.rollout.timeout_s)

    def _meet(self, engines: list[ActorHandle]) -> None:
        """Build the process group of this rank and ``engines``, in the place of the last one."""
        if self.audience:
            self._part()
        size = self.config.rollout.tensor_parallel_size
        address, port, world_size = ray.util.get_node_ip_address(), free_port(), 1 + size * len(engines)
        self.broadcast_name = f"megarl_{self.rank}_{port}"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        joined = [
            engine.init_broadcast.remote(address, port, 1 + i * size, world_size, backend, self.broadcast_name)
            for i, engine in enumerate(engines)
        ]
        self.broadcast_group = create_group(
            address, port, world_size=world_size, backend=backend, group_name=self.broadcast_name
        )
        ray.get(joined)
        self.audience = list(engines)

    def _part(self) -> None:
        """Leave the last group, with all engines that still live."""
        left = [engine.destroy_broadcast.remote(self.broadcast_name) for engine in self.audience]
        destroy_group(self.broadcast_group)
        for answer in left:
            with suppress(RayActorError):  # this engine's death is why there is a new group
                ray.get(answer)
