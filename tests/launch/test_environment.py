"""Environment variables of processes on GPUs."""

from pathlib import Path

import torch

from megarl.config import RunConfig
from megarl.experiment import apply_overrides
from megarl.launch.environment import nccl_environment, rank_environment

SAME = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
PINNED = {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:1"}


def of(*overrides: str, **given: str) -> dict[str, str]:
    return rank_environment(apply_overrides(RunConfig(), list(overrides)), given)


def test_ranks_have_what_engines_have_and_one_queue_where_communication_overlaps():
    assert of() == SAME | PINNED
    for shared in ("tensor_model_parallel_size", "context_parallel_size"):
        assert of(f"parallel.{shared}=2") == SAME | PINNED | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert of("debug.deterministic=true") == SAME | PINNED | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_the_users_values_win_on_ranks_and_engines():
    given = {"NCCL_CUMEM_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32", "HOME": "/home"}
    assert nccl_environment(given) == SAME | {"NCCL_CUMEM_ENABLE": "1"}
    found = of("parallel.tensor_model_parallel_size=2", **given)
    assert found == SAME | PINNED | {"NCCL_CUMEM_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert of(**{name: "backend:native"}) == SAME | {name: "backend:native"}


def test_torch_knows_the_allocators_key():
    """Torch ignores keys that it does not know."""
    library = Path(torch.__file__).parent / "lib/libc10.so"
    key = PINNED["PYTORCH_ALLOC_CONF"].partition(":")[0]
    assert key.encode() in library.read_bytes()
