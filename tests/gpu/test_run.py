"""The whole program on one GPU: ranks and an engine of SGLang's take turns with it, weights go by CUDA IPC."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.gpu.processes import skip_without_gpus
from tests.trainer.commands import EXPERIMENT, metrics, run

pytestmark = pytest.mark.gpu
BFLOAT16 = ["model.dtype=bfloat16", "debug.deterministic=False"]
ONE_RANK = ["parallel.tensor_model_parallel_size=1", "trainer.ranks_per_node=1"]


def arguments(folder, name, *more):
    paths = [f"trainer.run_dir={folder / name}", f"model.path={folder / 'tiny'}"]
    return ["train", EXPERIMENT, *paths, *BFLOAT16, *more]


def needs_engine(gpus):
    """SGLang's GPU kernels are a part of its installation that a machine may lack."""
    skip_without_gpus(gpus)
    for name in ("sgl_kernel", "flashinfer"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"SGLang needs {name} on a GPU")


def check(rows, steps):
    assert list(rows) == list(range(steps + 1))
    for step in range(1, steps + 1):
        row = rows[step]
        assert row["sync/verified_tensors"] == row["sync/tensors"] > 50
        assert row["sync/canary_abs_diff"] < 0.5  # the largest of a prompt in bfloat16
        assert row["training/rollout_logprobs_diff_mean"] < 0.05
        assert row["actor/grad_norm"] > 0


def test_ranks_and_an_engine_share_a_gpu(tmp_path):
    """Four steps, three of them after both have lent their memory and got it back."""
    needs_engine(1)
    more = [*ONE_RANK, "trainer.placement=colocated"]
    run(tmp_path / "log", *arguments(tmp_path, "colocated", *more), timeout=600)
    check(metrics(tmp_path / "colocated"), 4)
    lines = (tmp_path / "colocated" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["perf/offloaded_gb"] > 0
    assert last["perf/restored_gb"] > 0


def test_an_engine_on_another_gpu_gets_its_weights_by_nccl(tmp_path):
    needs_engine(2)
    more = [*ONE_RANK, "trainer.placement=split", "rollout.num_engines=1", "trainer.num_steps=2"]
    run(tmp_path / "log", *arguments(tmp_path, "split", *more), timeout=600)
    check(metrics(tmp_path / "split"), 2)


def test_two_ranks_share_two_gpus_with_an_engine_of_two(tmp_path):
    needs_engine(2)
    more = [
        "parallel.sequence_parallel=True",
        "trainer.placement=colocated",
        "rollout.tensor_parallel_size=2",
        "trainer.num_steps=2",
    ]
    run(tmp_path / "log", *arguments(tmp_path, "tp2", *more), timeout=600)
    check(metrics(tmp_path / "tp2"), 2)
