"""Environment variables that processes on GPUs need before they import torch: what CUDA, NCCL and cuBLAS read once."""

from __future__ import annotations

from collections.abc import Mapping

from megarl.config import RunConfig

# SGLang sets these two to 0 in its processes (entrypoints/engine.py) unless they are given. A communicator with both
# kinds of process, which `weight_sync.transport=broadcast` makes, fails or hangs unless the ranks have the same.
_NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}

# Of both spellings torch reads the older one first and the other not at all.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

# Sizes above this many MiB are pinned as they are; torch's own choice is the next power of two, which can double the
# host memory of `trainer.offload`. Not here: expandable_segments. Their memory leaves a process by file descriptors
# that engines may not be allowed to take (CUDA IPC of `weight_sync.transport=tensor`), and SGLang's memory saver, which
# colocated engines run with, refuses to work beside them.
_PINNED = "pinned_max_round_threshold_mb:1"


def nccl_environment(given: Mapping[str, str]) -> dict[str, str]:
    """What ranks and engines must have in common on GPUs; a value in ``given``, the user's environment, wins on both.

    Ray's processes on other nodes do not inherit the user's environment: this hands it on.
    """
    return {name: given.get(name, value) for name, value in _NCCL.items()}


def rank_environment(config: RunConfig, given: Mapping[str, str]) -> dict[str, str]:
    """What the trainer's ranks need on GPUs; a value in ``given``, the user's environment, wins."""
    wanted: dict[str, str] = {}
    parallel = config.parallel
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        # one queue of kernels: a collective that mcore starts before a matrix product also runs before it and overlaps
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if not any(name in given for name in _ALLOCATOR):
        wanted["PYTORCH_ALLOC_CONF"] = _PINNED
    if config.debug.deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may choose another order of sums each time
    handed_on = {name: given[name] for name in _ALLOCATOR if name in given}
    return nccl_environment(given) | {name: given.get(name, value) for name, value in wanted.items()} | handed_on
