"""What SGLang misses on a machine without CUDA: two stand-ins, installed before its first import.

``install`` does nothing when torch has CUDA. SGLang's own pure-torch CPU path does all the work, but it imports names
that only CUDA and AMX builds of ``sgl_kernel`` have. Spawned engine processes get the shims because the functions that
they run live in ``sglang_process``, which calls ``install`` before it imports SGLang.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megarl.utils import torchvision_cpu
from megarl.utils.upstream import replace

# Imported by name when SGLANG_USE_CPU_ENGINE=1; all belong to speculative decoding.
_FUNCTIONS = (
    "copy_all_layer_kv_cache_cpu",
    "assign_req_to_token_pool_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "build_draft_decode_metadata_cpu",
)
# Looked up when sglang.srt.models.qwen3_5 is imported, which the Qwen-VL processor does; never called here.
_OPERATORS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
_MASK = 0xFFFFFFFF
_libraries: list[torch.library.Library] = []  # a library's definitions live as long as it does


def _unavailable(name: str) -> Callable[..., None]:
    def function(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: speculative decoding needs a build of sgl_kernel with kernels")

    return function


def _mix(state: Tensor, block: Tensor) -> Tensor:
    """One round of MurmurHash3 (32 bit) in int64 arithmetic; products wrap, the low 32 bits stay right."""
    block = (block * 0xCC9E2D51) & _MASK
    block = ((block << 15) | (block >> 17)) & _MASK
    state = state ^ ((block * 0x1B873593) & _MASK)
    state = ((state << 13) | (state >> 19)) & _MASK
    return (state * 5 + 0xE6546B64) & _MASK


def murmur_hash32(seed: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Hash (seed [N], position [N], column [M]) to [N, M] 32-bit values, as sglang.kernels.ops.sampling.murmur_hash."""
    seed, positions, columns = (x.to(torch.int64) for x in (seed, positions, columns))
    state = torch.zeros_like(seed)
    for block in (seed & _MASK, (seed >> 32) & _MASK, positions & _MASK):
        state = _mix(state, block)
    state = _mix(state[:, None], columns[None, :] & _MASK) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK
    return (state ^ (state >> 16)).to(torch.uint32)


def unpin(*modules: types.ModuleType) -> None:
    """Let ``modules`` of SGLang ask for pinned memory, which a CPU build of torch has none of."""
    unpinned = types.ModuleType("torch")
    unpinned.__getattr__ = partial(getattr, torch)
    for name in ("tensor", "zeros"):
        setattr(unpinned, name, _pageable(getattr(torch, name)))
    for module in modules:
        replace(module, "torch", unpinned)
    replace(Tensor, "pin_memory", lambda self, device=None: self)


def _pageable(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, pin_memory=False, **kwargs: create(*args, **kwargs)


def choose_experts_in_torch(topk: types.ModuleType) -> None:
    """Let SGLang's ``topk`` choose experts by its own torch form, where it would call a kernel of CUDA or AMX."""

    def fused_topk(
        *,
        num_fused_shared_experts: int,
        routed_scaling_factor: float | None,
        apply_routed_scaling_factor_on_output: bool,
        **arguments: object,
    ) -> tuple[Tensor, Tensor]:
        if num_fused_shared_experts or apply_routed_scaling_factor_on_output:
            raise NotImplementedError("shared experts and scaled routes need a build of sgl_kernel with kernels")
        return topk.fused_topk_torch_native(**arguments)

    replace(topk, "fused_topk", fused_topk)


def install() -> None:
    """Make ``import sglang`` work on a CPU build of torch; call it before that import, once or more."""
    if torch.version.cuda is not None or _libraries:
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    torchvision_cpu.install()
    if "sgl_kernel" not in sys.modules:
        module = types.ModuleType("sgl_kernel", "Stand-in without kernels.")
        module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
        module.__path__ = []
        for name in _FUNCTIONS:
            setattr(module, name, _unavailable(name))
        sys.modules["sgl_kernel"] = module
    library = torch.library.Library("sgl_kernel", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor a, Tensor b) -> Tensor")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _libraries.append(library)
