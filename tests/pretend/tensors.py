"""``CudaTensor``: a CPU tensor that says it is on CUDA, and the ledger of the bytes that such tensors hold.

Import it after ``device.install()``: autograd asks the device of a leaf for its guard.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.pretend.mode import Pretend

DEVICE = torch.device("cuda", 0)
NOTED_BYTES = 1 << 20  # the ledger knows where a storage as large as this was made


class DeviceMix(RuntimeError):
    """CUDA would refuse this operation."""


class CudaTensor(Tensor):
    """A wrapper of ``inner``, a CPU tensor with real numbers or a meta tensor with none."""

    pretend: Pretend | None = None  # the mode that is active
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=False,
        )
        tensor.inner = inner
        if cls.pretend is not None:
            cls.pretend.ledger.add(inner)
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype}, {'meta' if self.inner.is_meta else self.inner})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What never reaches the dispatcher: reading numbers, addresses and storages, and setting ``.data``."""
        if func in _INTERCEPTED:
            return _INTERCEPTED[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert cls.pretend is not None, "a CudaTensor outlived its Pretend()"
        return cls.pretend.run(func, args, kwargs or {})


def _set_data(tensor: Tensor, new: Tensor) -> None:
    if not isinstance(tensor, CudaTensor) or not isinstance(new, CudaTensor):
        raise DeviceMix(f".data of a {tensor.device} tensor set to a {new.device} one")
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(tensor, new)
    tensor.inner = new.inner


def _tolist(tensor: CudaTensor) -> list:
    CudaTensor.pretend.wait("tolist")
    inner = tensor.inner
    return torch.zeros(inner.shape, dtype=inner.dtype).tolist() if inner.is_meta else inner.tolist()


def _numpy(tensor: CudaTensor, *, force: bool = False) -> Any:
    if force:
        return tensor.cpu().numpy()
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


_INTERCEPTED: dict[Any, Callable] = {
    Tensor.data.__set__: _set_data,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.untyped_storage: lambda tensor: _plain(tensor).untyped_storage(),
    Tensor.data_ptr: lambda tensor: _plain(tensor).data_ptr(),
}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, CudaTensor) else tensor


class Ledger:
    """Bytes of device memory: ``live`` now, and the ``peak`` since ``reset_peak``; a storage counts once."""

    def __init__(self, where: Callable[[], str] | None = None) -> None:
        """``where``: names the code that is running, asked for each large storage; None: nobody wants to know."""
        self.live = self.peak = 0
        self._where = where
        self._users: dict[int, int] = defaultdict(int)  # tensors over a storage
        self._sizes: dict[int, int] = {}
        self._made: dict[int, tuple[int, str]] = {}
        self._snapshot: dict[int, tuple[int, str]] = {}

    def add(self, inner: Tensor) -> None:
        """Count the storage of ``inner`` for as long as a tensor over it lives."""
        storage = inner.untyped_storage()
        key = storage._cdata
        if not self._users[key]:
            size = self._sizes[key] = storage.nbytes()
            if self._where is not None and size >= NOTED_BYTES:
                self._made[key] = (size, self._where())
            self._grow(size)
        self._users[key] += 1
        weakref.finalize(inner, self._remove, key)

    def resize(self, key: int, size: int) -> None:
        """The storage ``key`` was resized in place."""
        if key in self._sizes:
            change, self._sizes[key] = size - self._sizes[key], size
            self._grow(change)

    def reset_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.live
        self._snapshot = dict(self._made)

    def at_peak(self, count: int) -> list[tuple[str, int]]:
        """Where most of the bytes of the peak were made, ``count`` places."""
        by_place: Counter[str] = Counter()
        for size, place in self._snapshot.values():
            by_place[place] += size
        return by_place.most_common(count)

    def _grow(self, change: int) -> None:
        self.live += change
        if self.live > self.peak:
            self.peak = self.live
            if self._where is not None:
                self._snapshot = dict(self._made)

    def _remove(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= self._sizes.pop(key)
            self._made.pop(key, None)
