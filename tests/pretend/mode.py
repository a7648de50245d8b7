"""``Pretend()``: while it is active ``device="cuda"`` gives ``CudaTensor``s, and what CUDA would not do raises.

It is a TorchDispatchMode, so it sees every operation below autograd. What it finds:

- ``DeviceMix``: an operation on CUDA and CPU tensors that CUDA refuses, or a CPU tensor handed to a collective;
- ``waits``: what makes the host wait for the device, by operation and by the code that did it;
- ``copies``: from the host to the device;
- ``ledger``: bytes of device memory, and what held them at their peak.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend import patches
from tests.pretend.device import ROOT
from tests.pretend.operations import STAND_INS
from tests.pretend.tensors import CudaTensor, DeviceMix, Ledger

aten = torch.ops.aten

WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
GETS = {aten.index.Tensor}
PUTS = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_LARGE_RANGE = 1 << 26  # numbers of a range of shapes only
_WATCHED = (f"{ROOT}/megarl/", "/megatron/core/")
_OBJECTS = ("object", "barrier")  # functions of torch.distributed that send from the host by design


def where(depth: int = 3) -> str:
    """The innermost ``depth`` places in megarl and Megatron-Core that are being run."""
    frame, places = sys._getframe(1), []
    while frame is not None and len(places) < depth:
        name = frame.f_code.co_filename
        if any(part in name for part in _WATCHED):
            short = name.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
            places.append(f"{short}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Pretend(TorchDispatchMode):
    """One pretended GPU of 80 GiB.

    ``floats``: "real" computes with the numbers of CPU tensors; "meta" has shapes and bytes of floating-point tensors
    only, so that a model of billions of parameters fits, while integers stay real: what depends on data works.
    ``detail``: note where large storages were made, for ``ledger.at_peak``.
    """

    def __init__(self, floats: Literal["real", "meta"] = "real", *, detail: bool = False) -> None:
        super().__init__()
        self.meta = floats == "meta"
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.num_operations = 0
        self.ledger = Ledger(where if detail else None)

    def __enter__(self) -> Pretend:
        CudaTensor.pretend = self
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(patches.torch_cuda(self))
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes through .to()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        self._stack.close()
        CudaTensor.pretend = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(func, args, kwargs or {})

    def wait(self, operation: Any) -> None:
        """The host waits for the device here."""
        self.waits[str(operation), where()] += 1

    def copy(self, what: str) -> None:
        """Something goes from the host to the device here."""
        self.copies[what, where()] += 1

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Do ``func`` as CUDA would, on what the wrappers hold."""
        with torch._C._DisableTorchDispatch():
            self.num_operations += 1
            if func is aten._to_copy.default:
                return self._to_copy(args[0], kwargs)
            if func is aten.copy_.default:
                return self._copy_(*args[:2])
            leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            ours = [x for x in leaves if isinstance(x, CudaTensor)]
            plain = [x for x in leaves if not isinstance(x, CudaTensor)]
            to_cuda = _is_cuda(kwargs.get("device"))
            kwargs.pop("pin_memory", None)  # there is no allocator for it
            if not ours and not to_cuda:
                self._refuse_cpu_collective(func, plain)
                return func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})
            if func is aten._local_scalar_dense.default:
                self.wait(func)
                return self.scalar(args[0].inner)
            self._refuse_mix(func, args, ours, plain)
            if func in WAITING or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
                self.wait(func)
            if func in GETS or func in PUTS:
                args = self._masks_to_indices(func, args)
            if func.namespace == "c10d":
                return self._collective(func, args, kwargs)
            return self._compute(func, args, kwargs, to_cuda, bool(ours))

    def scalar(self, inner: Tensor) -> float | int | bool:
        """The number of a tensor of one; 1 where there are no numbers."""
        if inner.is_meta:
            return 1.0 if inner.dtype.is_floating_point else 1
        return inner.item()

    # ---- what CUDA refuses ------------------------------------------------------------------------------------------

    def _refuse_cpu_collective(self, func: Any, plain: list[Tensor]) -> None:
        if func.namespace != "c10d" or not any(x.numel() for x in plain):
            return
        frame = sys._getframe(1)
        while frame is not None:
            if any(name in frame.f_code.co_name for name in _OBJECTS):
                return
            frame = frame.f_back
        raise DeviceMix(f"{func}: NCCL takes no CPU tensors {[tuple(x.shape) for x in plain]} at {where(4)}")

    def _refuse_mix(self, func: Any, args: tuple, ours: list[Tensor], plain: list[Tensor]) -> None:
        if not ours or not plain:
            return
        if func in GETS:
            if not isinstance(args[0], CudaTensor):
                raise DeviceMix(f"{func}: CUDA indices into a CPU tensor at {where()}")
            self.copy("CPU indices")
            return
        if func in PUTS and isinstance(args[0], CudaTensor) and (isinstance(args[2], CudaTensor) or not args[2].dim()):
            self.copy("CPU indices")
            return
        strict = func in (aten.cat.default, aten.stack.default)  # elsewhere a CPU number is an argument of the kernel
        wrong = [tuple(x.shape) for x in plain if x.dim() or strict]
        if wrong:
            shapes = [tuple(x.shape) for x in ours][:4]
            raise DeviceMix(f"{func}: CPU tensors {wrong} among CUDA tensors {shapes} at {where(4)}")

    # ---- copies and indices -----------------------------------------------------------------------------------------

    def _to_copy(self, x: Tensor, kwargs: dict) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype") or x.dtype
        to_cuda, is_ours = _is_cuda(device), isinstance(x, CudaTensor)
        inner = x.inner if is_ours else x
        layout = {name: value for name, value in kwargs.items() if name == "memory_format"}
        if to_cuda and not is_ours:
            self.copy("host to device")
        if to_cuda or (is_ours and device is None):
            if not inner.is_meta and self.meta and dtype.is_floating_point:
                inner = inner.to("meta")
            return CudaTensor(aten._to_copy.default(inner, dtype=dtype, **layout))
        if is_ours:
            self.wait("device to host")
            if inner.is_meta and torch.device(device).type == "cpu":
                return torch.zeros(inner.shape, dtype=dtype)
        return aten._to_copy.default(inner, dtype=dtype, device=device, **layout)

    def _copy_(self, destination: Tensor, source: Tensor) -> Tensor:
        on_device, from_device = isinstance(destination, CudaTensor), isinstance(source, CudaTensor)
        if on_device and not from_device and source.dim():
            self.copy("host to device copy_")
        if from_device and not on_device:
            self.wait("device to host copy_")
        to, of = destination.inner if on_device else destination, source.inner if from_device else source
        if not to.is_meta and not of.is_meta:
            to.copy_(of)
        return destination

    def _masks_to_indices(self, func: Any, args: tuple) -> tuple:
        tensor, indices, *rest = args
        for number, index in enumerate(indices):
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                if func in GETS or rest[0].dim():  # a number is put by a mask without counting it
                    self.wait(f"{func} with a mask")
                mask = index.inner if isinstance(index, CudaTensor) else index
                if mask.is_meta:
                    raise RuntimeError(f"a mask without numbers as an index at {where()}")
                found = [CudaTensor(i) for i in mask.nonzero(as_tuple=True)]
                return (tensor, [*indices[:number], *found, *indices[number + 1 :]], *rest)
        return args

    # ---- results ----------------------------------------------------------------------------------------------------

    def _compute(self, func: Any, args: tuple, kwargs: dict, to_cuda: bool, any_ours: bool) -> Any:
        meta = self.meta and self._without_numbers(func, args, kwargs, to_cuda, any_ours)

        def inner(x: Any) -> Any:
            if isinstance(x, CudaTensor):
                return x.inner.to("meta") if meta and not x.inner.is_meta else x.inner
            return x.to("meta") if meta and isinstance(x, Tensor) and x.dim() else x

        own_args, own_kwargs = pytree.tree_map(inner, (args, kwargs))
        if to_cuda:
            own_kwargs["device"] = torch.device("meta" if meta else "cpu")
        result = STAND_INS.get(func, func)(*own_args, **own_kwargs)
        if kwargs.get("device") is not None and not to_cuda:
            return result  # zeros_like(cuda_tensor, device="cpu")
        return self._wrapped(func, args, kwargs, result)

    def _without_numbers(self, func: Any, args: tuple, kwargs: dict, to_cuda: bool, any_ours: bool) -> bool:
        if to_cuda and func in RANGES:
            return max((x for x in args if isinstance(x, (int, float))), default=0) > _LARGE_RANGE
        if to_cuda and not any_ours:
            return (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        return any(isinstance(x, CudaTensor) and x.inner.is_meta for x in pytree.tree_leaves((args, kwargs)))

    def _wrapped(self, func: Any, args: tuple, kwargs: dict, result: Any) -> Any:
        """The result as CUDA tensors; an operation in place returns the tensors it was given."""
        written = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[number] if number < len(args) else None)
                written += [] if value is None else [value]
        in_place = [r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns]
        if in_place and all(in_place) and len(in_place) == len(written):
            return written[0] if len(written) == 1 else tuple(written)
        return pytree.tree_map(_wrap, result)

    def _collective(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(x, CudaTensor) and x.inner.is_meta for x in leaves):
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        own = pytree.tree_map(lambda x: x.inner if isinstance(x, CudaTensor) else x, (args, kwargs))
        return pytree.tree_map(_wrap, func(*own[0], **own[1]))


def _wrap(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, CudaTensor) else x
