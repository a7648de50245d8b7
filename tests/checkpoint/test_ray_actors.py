"""Checkpoints are saved from Ray actors, whose main module and threads mcore's own writer does not survive."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from megarl.checkpoint.manifest import latest, read_manifest
from tests.models.reference import Reference

ROOT = Path(__file__).resolve().parents[2]


class Rank:
    """One rank of a gloo world, tensor parallel."""

    def __init__(self, rank: int, directory: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
        self.checkpoints = f"{directory}/checkpoints"

    def straight(self, reference: Reference) -> tuple:
        """A step, an asynchronous save, a step beside it; then what a resumed rank must come to."""
        from megarl.checkpoint import megatron
        from tests.checkpoint.training import fingerprint, run_config, step
        from tests.models.training import build

        t = build(run_config(reference.directory, (2, 1)))
        step(t, reference, noisy=True)
        directory, trained = megatron.step_directory(self.checkpoints, 1), (t.model, t.optimizer, t.scheduler)
        handle = megatron.save(directory, 1, *trained, {"step": 1}, t.config, async_save=True)
        loss = step(t, reference, noisy=True)
        handle.wait()
        return loss, fingerprint(t)

    def resumed(self, reference: Reference) -> tuple:
        from megarl.checkpoint import megatron
        from megarl.parallel import groups
        from tests.checkpoint.training import fingerprint, run_config, step
        from tests.models.training import build

        groups.destroy()
        t = build(run_config(reference.directory, (2, 1)), weights=False, seed=3)
        extra = megatron.load(megatron.latest(self.checkpoints), t.model, t.optimizer, t.scheduler)
        assert extra == {"step": 1}
        return step(t, reference, noisy=True), fingerprint(t)


@pytest.mark.slow
def test_two_actors_save_and_resume(tmp_path):
    from tests.checkpoint.training import tiny

    reference = tiny("gqa2_tied", tmp_path / "hf")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init("local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)
    try:
        actors = [ray.remote(Rank).options(num_cpus=0).remote(rank, str(tmp_path)) for rank in range(2)]
        straight = ray.get([actor.straight.remote(reference) for actor in actors], timeout=180)
        assert read_manifest(latest(tmp_path / "checkpoints")).world_size == 2
        resumed = ray.get([actor.resumed.remote(reference) for actor in actors], timeout=180)
        assert resumed == straight
    finally:
        ray.shutdown()
