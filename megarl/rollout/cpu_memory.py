"""SGLang's memory saver on a CPU: an engine gives its weights and its KV cache back and takes them again.

torch-memory-saver does it with CUDA's virtual memory. Here the storages that are made within a region are remembered,
emptied by ``pause`` and given memory again by ``resume``, so that what lives in them is lost as it is on a GPU: weights
come back as NaN until somebody sends them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarl.utils.upstream import replace

_LOST = 0xFF  # a byte of NaN in every floating-point type; a KV cache, which is masked but multiplied, gets zeros


class _Recorder(TorchDispatchMode):
    """Remembers the storages of all tensors that operations return."""

    def __init__(self, found: dict[int, StorageWeakRef]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.found.setdefault(storage._cdata, StorageWeakRef(storage))
        return result


class CpuMemorySaver(TorchMemorySaverAdapter):
    """The adapter of one process; SGLang asks for it in several places and means the same one."""

    enabled = True

    def __init__(self) -> None:
        self._regions: dict[str, dict[int, StorageWeakRef]] = {}
        self._paused: dict[str, list[tuple[UntypedStorage, int, Tensor | None]]] = {}
        self._backed_up: set[str] = set()

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        if enable_cpu_backup:
            self._backed_up.add(tag)
        with _Recorder(self._regions.setdefault(tag, {})):
            yield

    def pause(self, tag: str) -> None:
        """Empty the storages of ``tag`` that still live."""
        self._paused[tag] = []
        for reference in self._regions.get(tag, {}).values():
            if reference.expired():
                continue
            storage = UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None or not storage.nbytes() or not storage.resizable():
                continue
            size = storage.nbytes()
            copy = _bytes_of(storage).clone() if tag in self._backed_up else None
            storage.resize_(0)
            self._paused[tag].append((storage, size, copy))

    def resume(self, tag: str) -> None:
        """Give the storages of ``tag`` memory again; what was in them is gone unless it was backed up."""
        for storage, size, copy in self._paused.pop(tag, []):
            storage.resize_(size)
            if copy is not None:
                _bytes_of(storage).copy_(copy)
            else:
                _bytes_of(storage).fill_(_LOST if tag == "weights" else 0)

    @contextmanager
    def configure_subprocess(self) -> Iterator[None]:
        yield

    @contextmanager
    def cuda_graph(self, **kwargs: Any) -> Iterator[None]:
        yield

    @contextmanager
    def disable(self) -> Iterator[None]:
        yield


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


_saver = CpuMemorySaver()
_create = TorchMemorySaverAdapter.create


def _saver_of_this_process(enable: bool) -> TorchMemorySaverAdapter:
    return _saver if enable else _create(enable)


def install() -> None:
    """Make SGLang use it in this process."""
    replace(TorchMemorySaverAdapter, "create", staticmethod(_saver_of_this_process))
