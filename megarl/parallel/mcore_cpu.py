"""Run the real Megatron-Core on a machine without CUDA, over gloo.

``install()`` replaces the few CUDA entry points that Megatron-Core 0.16 calls unconditionally; with CUDA it only
repairs what is wrong without Transformer Engine and apex. It must run before the first ``import megatron``:
``megarl.parallel`` does it on import.

A ``TorchFunctionMode`` turns ``device="cuda"`` and ``Tensor.cuda()`` inside Megatron-Core into the CPU. Torch keeps
such modes per thread: a thread other than the one that called ``install()`` calls ``enter()`` before it runs Megatron
code (``groups.initialize`` does, so a Ray actor whose methods all run in one thread needs nothing more).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megarl.parallel.adam import FusedAdam
from megarl.utils.no_cuda import Stream, streams_and_random_numbers
from megarl.utils.upstream import check_versions, replace

_CUDA_SPELLING = {
    f"torch.{n}": f"torch.cuda.{n}" for n in ("FloatTensor", "BFloat16Tensor", "HalfTensor", "DoubleTensor")
}
_installed = False
_thread = threading.local()


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaIsCpu(TorchFunctionMode):
    """What ``torch.cuda`` does not reach: device literals, ``Tensor.cuda``, ``Tensor.type``, pinned memory."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.record_stream:
            return None
        if func is Tensor.type and len(args) == 1 and not kwargs:
            # the optimizers compare these strings
            name = func(*args)
            return _CUDA_SPELLING.get(name, name)
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _patch_cuda() -> None:
    replacements = {
        "current_device": torch.cpu.current_device,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
    }
    for name, value in (replacements | streams_and_random_numbers(Stream())).items():
        replace(torch.cuda, name, value)
    replace(torch.cuda.nvtx, "range_push", lambda *args, **kwargs: 0)
    replace(torch.cuda.nvtx, "range_pop", lambda: 0)


def _import_without_compiling() -> None:
    # `import megatron.core` applies @jit_fuser, which is torch.compile, before anything can disable it
    compile_ = torch.compile
    replace(torch, "compile", lambda model=None, **kwargs: model if model is not None else (lambda function: function))
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        replace(torch, "compile", compile_)


def _patch_upstream() -> None:
    """What Megatron-Core gets wrong wherever Transformer Engine and apex are absent, with CUDA too."""
    # megatron only now: importing it earlier would compile on the CPU
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # never bound
        moe_utils.te_general_gemm = None
    if not random.HAVE_TE:
        _patch_checkpoint(random.CheckpointWithoutOutput)
    if optimizer.USING_PYTORCH_OPTIMIZER:
        replace(optimizer, "Adam", FusedAdam)
        replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        replace(distrib_optimizer, "Adam", FusedAdam)
        for name in ("HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"):
            replace(distrib_optimizer, name, True)
    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        replace(clip_grads, "l2_norm_impl", _l2_norm)


def _l2_norm(
    chunk_size: int, overflow: Tensor | None, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm [1] of all tensors; upstream's own has the host wait for each of them."""
    norms = torch.stack([torch.norm(tensor) for tensors in tensor_lists for tensor in tensors])
    return torch.norm(norms[None])[None].float(), None


def _patch_checkpoint(checkpoint: type) -> None:
    """A recomputed norm asks Transformer Engine, also where there is none, whether its FP8 is on."""
    init = checkpoint.__init__

    def without_fp8(self: Any, fp8: bool = False) -> None:
        init(self, fp8)
        self.fp8 = False

    replace(checkpoint, "__init__", without_fp8)


def use_cpu_random_states() -> None:
    """Random states of a rank are those of the CPU's generator: there is none for CUDA."""
    from megatron.core.tensor_parallel import random

    replace(random, "_get_cuda_rng_state", lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state())
    replace(random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state))


def _patch_megatron() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    use_cpu_random_states()
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # upstream converts only what is on a GPU
        if torch.is_tensor(tensor) and not tensor.is_cuda and as_numpy:
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", move_to_cpu)


def install() -> None:
    """Make Megatron-Core run on the CPU, in the calling thread at once; with CUDA, repair what needs no GPU library."""
    global _installed
    cuda = torch.cuda.is_available()
    if not _installed:
        _installed = True
        check_versions("megatron-core", "torch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # apex and Transformer Engine are not installed: so it is here
            if not cuda:
                _patch_cuda()
                _import_without_compiling()
                _patch_megatron()
            _patch_upstream()
    if not cuda:
        enter()


def enter() -> None:
    """Extend ``install()`` to the calling thread, for as long as it lives; nothing where it is not needed."""
    if _installed and not torch.cuda.is_available() and not hasattr(_thread, "mode"):
        _thread.mode = _CudaIsCpu()
        _thread.mode.__enter__()
