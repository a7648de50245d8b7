"""The Ray cluster that a run lives in: the one in ``RAY_ADDRESS``, or one of its own on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray

from megarl.config import RunConfig

_LEAST_BYTES = 512 << 20
_TOKEN_BYTES = 28  # of a packed step, in all streams
_IMAGE_BYTES = 1 << 20  # of an encoded image or video, generously: one a prompt


def object_store_bytes(config: RunConfig) -> int:
    """Memory of a cluster on this machine for what ranks are sent: two steps, because one is read while one is written.

    Weights do not pass through it. It takes at most a third of the machine's memory, and what /dev/shm has.
    """
    prompts, samples = config.data.prompts_per_step, config.rollout.group_size
    tokens = prompts * samples * (config.data.max_prompt_length + config.rollout.max_new_tokens)
    step = tokens * _TOKEN_BYTES + prompts * _IMAGE_BYTES * config.data_parallel_size
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else _LEAST_BYTES
    most = min(psutil.virtual_memory().total // 3, free * 9 // 10)
    return min(max(2 * step, _LEAST_BYTES), max(most, 80 << 20))  # Ray refuses less


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Connect to Ray, or start it, and leave again."""
    # libraries' notices of what is deprecated or not installed (`megarl doctor` says it better), once a process
    env = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False, "object_store_memory": object_store_bytes(config)}
    # not None: Ray would join whatever was started on this machine last, somebody else's run too
    ray.init(address=address or "local", runtime_env={"env_vars": env}, logging_level="error", **local)
    try:
        yield
    finally:
        ray.shutdown()
