"""Memory of the trainer that engines may have while they generate: ``trainer.offload``.

``parameters`` are those of what is trained and of its average, ``reference`` those of the frozen reference.
Storages are emptied in place and filled again, so that every tensor over them (parameters, the buffers that they and
their gradients lie in, an optimizer's shards of both) stays what it is. Parameters and the optimizer's state keep a
copy in host memory; gradients are not kept, because a step begins with zeros.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage, nn


@dataclass
class _Parked:
    storage: UntypedStorage
    num_bytes: int
    host: Tensor | None  # [num_bytes] uint8; None: it is filled with zeros again


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages if storage.nbytes()}


class Offload:
    """Of one rank: ``release`` what the configuration names, ``restore`` what is needed next."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        reference: nn.Module | None = None,
    ) -> None:
        """``optimizer`` is None where nothing is trained, ``reference`` where there is none."""
        self.models, self.chunks, self.optimizer, self.reference = models, chunks, optimizer, reference
        self.parked: dict[str, list[_Parked]] = {}
        self.host: dict[int, Tensor] = {}  # pinned memory is slow to get: it is kept
        self.seconds = 0.0  # that restoring took since somebody asked
        self.restored = 0  # bytes

    def release(self, parts: Sequence[str]) -> int:
        """Move ``parts`` off the device, unless they are away already; returns the freed bytes.

        ``parts``: of optimizer, gradients, parameters, reference.
        """
        freed = 0
        for part in parts:
            if part not in self.parked:
                self.parked[part] = [
                    self._park(key, storage, keep=part != "gradients") for key, storage in self._find(part).items()
                ]
                freed += sum(parked.num_bytes for parked in self.parked[part])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()  # buckets of weights that engines have read
            torch.cuda.empty_cache()
        return freed

    def restore(self, *parts: str) -> None:
        """Bring ``parts`` back to the device, unless they are there already."""
        if not any(part in self.parked for part in parts):
            return
        start = time.perf_counter()
        for part in parts:
            for parked in self.parked.pop(part, []):
                self.restored += parked.num_bytes
                parked.storage.resize_(parked.num_bytes)
                if parked.host is None:
                    _bytes_of(parked.storage).zero_()
                else:
                    _bytes_of(parked.storage).copy_(parked.host, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start

    def _find(self, part: str) -> dict[int, UntypedStorage]:
        parameters = _storages(tensor for model in self.models for tensor in (*model.parameters(), *model.buffers()))
        if part == "parameters":
            return parameters
        if part == "reference":
            frozen = [] if self.reference is None else [*self.reference.parameters(), *self.reference.buffers()]
            return {key: storage for key, storage in _storages(frozen).items() if key not in parameters}
        if part == "gradients":
            if self.optimizer is not None:
                self.optimizer.zero_grad()  # drops its own references and copies
            buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
            return _storages(buffer.grad_data for buffer in buffers)
        inner = [] if self.optimizer is None else [o.optimizer for o in self.optimizer.chained_optimizers]
        inner = [optimizer for optimizer in inner if optimizer is not None]  # a stage may have nothing to train
        states = [value for optimizer in inner for state in optimizer.state.values() for value in state.values()]
        masters = [p for optimizer in inner for group in optimizer.param_groups for p in group["params"]]
        device = next(self.models[0].parameters()).device  # optimizer_cpu_offload keeps its state on the host
        tensors = [t for t in (*states, *masters) if isinstance(t, Tensor) and t.device == device]
        # float32 parameters are updated in place: their storage is the model's
        return {key: storage for key, storage in _storages(tensors).items() if key not in parameters}

    def _park(self, key: int, storage: UntypedStorage, *, keep: bool) -> _Parked:
        num_bytes, host = storage.nbytes(), None
        if keep:
            host = self.host.get(key)
            if host is None or host.numel() != num_bytes:
                host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self.host[key] = host
            host.copy_(_bytes_of(storage))  # returns when it is done: the storage goes now
        storage.resize_(0)
        return _Parked(storage, num_bytes, host)
