"""The Ray cluster that a run lives in: the one in ``RAY_ADDRESS``, or one of its own on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch

OBJECT_STORE_BYTES = 512 << 20  # of a cluster on this machine; microbatches pass through it, weights do not


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to Ray, or start it, and leave again."""
    # libraries' notices of what is deprecated or not installed (`megarl doctor` says it better), once a process
    env = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning"}
    if not torch.cuda.is_available():
        env |= {"OMP_NUM_THREADS": "1"}  # more threads than cores make every rank and engine spin
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address=address, runtime_env={"env_vars": env}, logging_level="error", **local)
    try:
        yield
    finally:
        ray.shutdown()
