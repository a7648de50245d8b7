"""A step of the real worker on a pretended GPU: nothing is mixed, the numbers are the CPU's, the host rarely waits.

Each run is one process for all families, because the shim must be loaded before torch; see README.md here.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import examples.tiny_models as tiny
from megarl.checkpoint.huggingface import HFReader
from tests.data import llava
from tests.pretend import device, jobs, step

TILED = {"llava_next": "next", "llava_onevision": "onevision"}  # kinds of tests/data/llava.py
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", *TILED, "qwen3"]
DENSE = [family for family in FAMILIES if family != "qwen3_vl_moe"]  # the router's kernels are not stood in for
VARLEN = ["qwen2_5_vl", "qwen3_vl_moe"]  # the others take the same kernel in Transformer Engine's specification
OVERRIDES = ["trainer.max_tokens_per_microbatch=256", "optimizer.eps=1e-8"]  # Adam as runs have it
BFLOAT16 = [*OVERRIDES, "model.dtype=bfloat16"]
TE = [*BFLOAT16, "model.transformer_impl=transformer_engine"]
MAX_WAITS = 4  # of the host for the device in a forward pass: fewer than layers, so that one in each is seen
LAYOUTS = {
    "tp2 sp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=True"],
    "cp2": ["parallel.context_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[2,1]"],
    "dp2": [],
}

pytestmark = pytest.mark.skipif(device.reason_to_skip() is not None, reason=str(device.reason_to_skip()))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, by its name."""
    directory = tmp_path_factory.mktemp("pretend_models")
    for family in FAMILIES:
        if family in TILED:
            # the vocabulary of the others, from which responses are drawn
            text = llava.TEXT | {"model_type": "llama", "vocab_size": 512}
            llava.write(directory / family, TILED[family], seed=3, config={"text_config": text})
        else:
            getattr(tiny, family)(directory / family, seed=3)
    return directory


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks write."""
    return tmp_path_factory.mktemp("pretend")


def cases(models: Path, families: list[str], overrides: list[str]) -> list[dict[str, Any]]:
    return [{"name": family, "path": str(models / family), "overrides": overrides} for family in families]


@pytest.fixture(scope="session")
def float32(models: Path, runs: Path) -> dict[str, dict]:
    (results,) = jobs.start(runs / "float32", cases(models, FAMILIES, OVERRIDES))
    return results


@pytest.fixture(scope="session")
def bfloat16(models: Path, runs: Path) -> dict[str, dict]:
    (results,) = jobs.start(runs / "bfloat16", cases(models, VARLEN, BFLOAT16))
    return results


@pytest.fixture(scope="session")
def bfloat16_others(models: Path, runs: Path) -> dict[str, dict]:
    others = [family for family in FAMILIES if family not in VARLEN]
    (results,) = jobs.start(runs / "bfloat16_others", cases(models, others, BFLOAT16))
    return results


@pytest.fixture(scope="session")
def transformer_engine(models: Path, runs: Path) -> dict[str, dict]:
    (results,) = jobs.start(runs / "te", cases(models, DENSE, TE), transformer_engine=True)
    return results


def check(result: dict, *, max_waits: int | None = MAX_WAITS) -> None:
    """What holds for every family, specification and layout."""
    assert "error" not in result, result["error"]
    assert result["device"] == "cuda"
    assert result["misplaced"] == []
    before, lent = result["allocated"]
    assert before - lent == result["freed"] > 0
    assert result["restored"]
    assert result["loaded"]
    if max_waits is not None:
        assert result["waits"]["forward"] <= max_waits, result["places"]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_cpu(family: str, models: Path, runs: Path, float32: dict, pool: Any) -> None:
    result = float32[family]
    check(result, max_waits=None)  # the float32 path is not the one that GPUs take
    with tempfile.TemporaryDirectory() as directory:
        (expected,) = pool.run(step.run_all_alone, 1, str(models / family), OVERRIDES, directory)
        written = load_file(Path(directory) / "hf" / "model.safetensors")
    assert result["checksums"] == expected["checksums"]
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for ours, theirs in zip(result["old_logprobs"], expected["old_logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert result["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
    for name in ("sums", "validated"):
        assert result[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name
    trained = load_file(runs / "float32" / family / "hf" / "model.safetensors")
    start = HFReader(models / family)
    assert set(trained) == set(written)
    for name, tensor in trained.items():
        if family in TILED and name.endswith("k_proj.bias"):
            continue  # attention without rotary positions does not depend on it: its gradient is rounding
        # of the whole tensor: where a gradient is next to nothing, Adam's first steps amplify its rounding
        error, change = (float((tensor - other).norm()) for other in (written[name], start[name]))
        assert error <= max(1e-2 * change, 1e-4), name  # a bias of keys moves by rounding alone


@pytest.mark.parametrize("family", VARLEN)
def test_bfloat16(family: str, bfloat16: dict, float32: dict) -> None:
    """The varlen kernel's path, and float32's numbers but for rounding."""
    check(bfloat16[family])
    assert bfloat16[family]["grad_norm"] == pytest.approx(float32[family]["grad_norm"], rel=0.1)


@pytest.mark.slow
def test_bfloat16_of_the_other_families(bfloat16_others: dict, float32: dict) -> None:
    for family, result in bfloat16_others.items():
        check(result)
        assert result["grad_norm"] == pytest.approx(float32[family]["grad_norm"], rel=0.1), family


@pytest.mark.parametrize("family", DENSE)
def test_transformer_engine(family: str, transformer_engine: dict, float32: dict) -> None:
    """TE 2.11's constructors and forwards are given what they know, and the numbers are those of our own layers."""
    check(transformer_engine[family])
    assert transformer_engine[family]["attention_calls"] > 0
    assert transformer_engine[family]["grad_norm"] == pytest.approx(float32[family]["grad_norm"], rel=0.1)


OPTIMIZERS = {
    "states in bfloat16": "use_precision_aware_optimizer: true, exp_avg_dtype: bfloat16, exp_avg_sq_dtype: bfloat16",
    "on the host": "optimizer_cpu_offload: true",
    "half on the host": "optimizer_cpu_offload: true, optimizer_offload_fraction: 0.5",
}


def test_optimizers_of_megatron(models: Path, runs: Path, transformer_engine: dict) -> None:
    """Step, lend, save and load with ``optimizer.megatron``; the weights after a step are the plain optimizer's."""
    path = str(models / "qwen2_5_vl")
    jobs_of = [
        {"name": name, "path": path, "overrides": [*TE, f"optimizer.megatron={{{fields}}}"]}
        for name, fields in OPTIMIZERS.items()
    ]
    (results,) = jobs.start(runs / "optimizers", jobs_of, transformer_engine=True)
    plain = transformer_engine["qwen2_5_vl"]
    for name, result in results.items():
        on_host = result.get("misplaced", [])
        check(result | {"misplaced": []})
        assert result["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3), name
        tolerance = 0.05 if name == "states in bfloat16" else 1e-3
        assert result["logprobs"] == pytest.approx(plain["logprobs"], abs=tolerance), name
        assert bool(on_host) == ("host" in name), name
    states = {name: len(result["misplaced"]) for name, result in results.items()}
    assert 0 < states["half on the host"] < states["on the host"]


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("qwen2_5_vl", ["tp2 sp", "cp2", "pp2", "dp2"]),
        pytest.param("llava", ["tp2 sp", "cp2", "pp2", "dp2"], marks=pytest.mark.slow),
        pytest.param("qwen3_vl", ["tp2 sp", "cp2", "pp2", "dp2"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks(family: str, layouts: list[str], models: Path, runs: Path, float32: dict) -> None:
    ranks = jobs.start(
        runs / f"{family}_ranks",
        [
            {"name": layout, "path": str(models / family), "overrides": [*BFLOAT16, *LAYOUTS[layout]]}
            for layout in layouts
        ],
        world_size=2,
    )
    for layout in layouts:
        for rank in ranks:
            check(rank[layout], max_waits=None)
        norms = [rank[layout]["grad_norm"] for rank in ranks]
        speaking = [norm for norm in norms if norm is not None]
        assert speaking, layout
        assert all(math.isclose(norm, float32[family]["grad_norm"], rel_tol=0.1) for norm in speaking), layout
