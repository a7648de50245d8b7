"""What Python asks torch beside operations, answered as on a machine with one H100, for as long as one pretends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import _make_grads, _tensor_or_tensors_to_tuple
from torch.autograd.graph import _engine_run_backward

from megarl.utils.no_cuda import Stream, streams_and_random_numbers
from tests.pretend.operations import rms_norm
from tests.pretend.tensors import CudaTensor

if TYPE_CHECKING:
    from tests.pretend.mode import Pretend

PROPERTIES = SimpleNamespace(
    name="Pretend H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, uuid="GPU-pretend"
)


class _Stream(Stream):
    cuda_stream = 0


@contextlib.contextmanager
def torch_cuda(pretend: Pretend) -> Iterator[None]:
    """Answer for ``pretend``."""
    with contextlib.ExitStack() as stack:
        for owner, replacements in _replacements(pretend):
            for name, value in replacements.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        yield


def megatron() -> None:
    """Random states are tensors of a C++ generator, of which a CPU build has none for CUDA. After ``import megarl``."""
    from megarl.parallel import mcore_cpu  # only now: with its import it decides whether there is a GPU

    mcore_cpu.use_cpu_random_states()


def _replacements(pretend: Pretend) -> list[tuple[Any, dict[str, Any]]]:
    return [
        (torch.cuda, _device(pretend) | _streams_and_random_numbers()),
        (torch.cuda.nvtx, {"range_push": lambda *args, **kwargs: 0, "range_pop": lambda: 0}),
        (torch.nn.functional, {"rms_norm": rms_norm}),
        (nn.Module, _module()),
        (torch, {"tensor": _tensor(pretend)}),
        (torch.autograd, {"backward": _backward}),
        (Tensor, {"record_stream": lambda tensor, stream: None, "pin_memory": lambda tensor, device=None: tensor}),
        (torch.UntypedStorage, {"resize_": _resize(pretend)}),
    ]


def _device(pretend: Pretend) -> dict[str, Callable]:
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_get_device": lambda device: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: pretend.wait("torch.cuda.synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "memory_allocated": lambda device=None: pretend.ledger.live,
        "max_memory_allocated": lambda device=None: pretend.ledger.peak,
        "max_memory_reserved": lambda device=None: pretend.ledger.peak,
        "reset_peak_memory_stats": lambda device=None: pretend.ledger.reset_peak(),
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory - pretend.ledger.live, PROPERTIES.total_memory),
    }


def _streams_and_random_numbers() -> dict[str, Any]:
    return streams_and_random_numbers(_Stream()) | {
        "is_current_stream_capturing": lambda: False,
        "manual_seed_all": lambda seed: None,
    }


def _module() -> dict[str, Callable]:
    """torch moves a module by setting ``.data``, which a wrapper cannot follow: parameters are replaced instead."""
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the original, so that its id stays taken
    to = nn.Module.to

    def move(module: nn.Module, device: Any = None) -> nn.Module:
        for child in module.modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is None or isinstance(parameter, CudaTensor):
                    continue
                if id(parameter) not in moved:
                    made = nn.Parameter(parameter.detach().to("cuda"), parameter.requires_grad)
                    made.__dict__.update(parameter.__dict__)  # attributes stay, as they do on CUDA
                    moved[id(parameter)] = (made, parameter)
                child._parameters[name] = moved[id(parameter)][0]
            for name, buffer in list(child._buffers.items()):
                if buffer is not None:
                    child._buffers[name] = buffer.to("cuda")
        return module

    def to_anywhere(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = kwargs.get("device", args[0] if args and isinstance(args[0], (str, torch.device)) else None)
        if device is not None and torch.device(device).type == "cuda":
            module = move(module)
            args, kwargs = args[1:], {name: value for name, value in kwargs.items() if name != "device"}
        return to(module, *args, **kwargs) if args or kwargs else module

    return {"cuda": move, "to": to_anywhere}


def _tensor(pretend: Pretend) -> Callable:
    """``torch.tensor([tensors of one number])`` reads each of them, out of a mode's sight."""
    make = torch.tensor

    def read(data: Any) -> Any:
        if isinstance(data, CudaTensor):
            pretend.wait("torch.tensor of CUDA tensors")
            return pretend.scalar(data.inner)
        return [read(x) for x in data] if isinstance(data, (list, tuple)) else data

    return lambda data, *args, **kwargs: make(read(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs)


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """torch's own would disable ``__torch_function__`` for all that runs in it, recomputation included."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    inputs = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    grads = _make_grads(tensors, _tensor_or_tensors_to_tuple(grad_tensors, len(tensors)), is_grads_batched=False)
    retain = bool(create_graph if retain_graph is None else retain_graph)
    _engine_run_backward(tensors, grads, retain, create_graph, inputs, allow_unreachable=True, accumulate_grad=True)


def _resize(pretend: Pretend) -> Callable:
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = resize(storage, size)
        pretend.ledger.resize(storage._cdata, size)
        return result

    return resize_
