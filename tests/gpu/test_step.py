"""Everything that a rank is asked in a run, on the device, against the CPU's numbers; what it lends is really free."""

from __future__ import annotations

import importlib.util

import pytest

import examples.tiny_models as tiny
from tests.gpu.processes import DEVICES
from tests.pretend import step

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "qwen3"]
OVERRIDES = ["trainer.max_tokens_per_microbatch=256"]
DTYPES = {"float32": 1e-3, "bfloat16": 0.1}  # of the gradient norm, relative to the CPU's in float32
NEEDS_TE = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each family, by its name."""
    directory = tmp_path_factory.mktemp("gpu_models")
    for family in FAMILIES:
        getattr(tiny, family)(directory / family, seed=3)
    return directory


def steps(paths: dict[str, str], overrides: list[str], directory: str) -> dict[str, dict]:
    """On a rank: ``step.run_all`` with each of the models."""
    from megarl.parallel import groups

    results = {}
    for family, path in paths.items():
        results[family] = step.run_all(path, overrides, f"{directory}/{family}", 1, None)
        groups.destroy()
    return results


@pytest.fixture(scope="module")
def on_cpu(models, tmp_path_factory, pool):
    """``on_cpu(family)``: the numbers in float32."""
    made = {}

    def result(family):
        if family not in made:
            directory = str(tmp_path_factory.mktemp("gpu_cpu"))
            (made[family],) = pool.run(step.run_all_alone, 1, str(models / family), OVERRIDES, directory)
        return made[family]

    return result


def assert_same(result, expected, device, dtype):
    assert result["device"] == device
    assert result["misplaced"] == []
    assert result["restored"]
    assert result["loaded"]
    assert result["freed"] > 0
    if device == "cuda":  # the allocator's blocks are multiples of 512 bytes
        before, lent = result["allocated"]
        assert before - lent > 0.9 * result["freed"]
    if dtype == "float32":
        assert result["checksums"] == expected["checksums"]
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=DTYPES[dtype])
    tolerance = 1e-3 if dtype == "float32" else 0.1
    for ours, theirs in zip(result["old_logprobs"], expected["old_logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_family(models, on_cpu, ranks, tmp_path, dtype):
    paths = {family: str(models / family) for family in FAMILIES}
    (results,) = ranks("cuda", steps, 1, paths, [*OVERRIDES, f"model.dtype={dtype}"], str(tmp_path))
    for family in FAMILIES:
        assert_same(results[family], on_cpu(family), "cuda", dtype)


def test_the_body_of_it_on_a_cpu(models, on_cpu, ranks, tmp_path):
    (results,) = ranks("cpu", steps, 1, {"qwen3": str(models / "qwen3")}, OVERRIDES, str(tmp_path))
    assert_same(results["qwen3"], on_cpu("qwen3"), "cpu", "float32")


@pytest.mark.gpu
@NEEDS_TE
def test_transformer_engine(models, on_cpu, ranks, tmp_path):
    overrides = [*OVERRIDES, "model.dtype=bfloat16", "model.transformer_impl=transformer_engine"]
    dense = [family for family in FAMILIES if family != "qwen3_vl_moe"]
    paths = {family: str(models / family) for family in dense}
    (results,) = ranks("cuda", steps, 1, paths, overrides, str(tmp_path))
    for family in dense:
        assert_same(results[family], on_cpu(family), "cuda", "bfloat16")


@pytest.mark.parametrize("device", [DEVICES[1]])
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=True"],
        ["parallel.context_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[2,1]"],
        [],
    ],
    ids=["tp2_sp", "cp2", "pp2", "dp2"],
)
def test_two_gpus(device, models, on_cpu, ranks, tmp_path, layout):
    overrides = [*OVERRIDES, "model.dtype=bfloat16", *layout]
    path = str(models / "qwen2_5_vl")
    results = ranks(device, step.run_all, 2, path, overrides, str(tmp_path), 2, None)
    norms = [result["grad_norm"] for result in results if result["grad_norm"] is not None]
    assert norms
    assert norms == pytest.approx([on_cpu("qwen2_5_vl")["grad_norm"]] * len(norms), rel=0.1)
