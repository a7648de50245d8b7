"""Which Ray cluster a run lives in."""

from pathlib import Path

import ray
from ray._private import utils

from megarl.config import RunConfig
from megarl.launch.cluster import cluster


def test_a_cluster_that_somebody_started_here_is_not_joined(monkeypatch):
    """Ray keeps the address of the last one in a file, which nobody removes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = Path(utils.get_ray_address_file(None))
    before = file.read_text() if file.exists() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("127.0.0.1:1")
    try:
        with cluster(RunConfig()):
            assert ray.cluster_resources()["CPU"] >= 1
    finally:
        file.unlink() if before is None else file.write_text(before)
