"""The planner's bytes against the worker's own code on shapes, and what it refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.config import TRAINER_MEMORY, AlgorithmConfig, ModelConfig, ParallelConfig, RunConfig, TrainerConfig
from megarl.experiment import apply_overrides
from megarl.launch import memory
from tests.launch.memory_table import GPU_BYTES, planned, table
from tests.pretend.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
ALL = ["core_attn", "layernorm", "mlp"]
GB = 1e9
QWEN, LLAVA = "qwen2_5_vl_7b", "llava_1_5_7b"


def config(tp=2, dp=2, cp=1, pp=1, sp=True, recompute="none", samples=8, **model) -> RunConfig:
    """As ``real_sizes`` makes it: sequences of 2048 tokens, one image for all of them."""
    modules = {"recompute_modules": ALL} if recompute == "selective" else {}
    return RunConfig(
        model=ModelConfig(dtype="bfloat16", recompute=recompute, **modules, **model),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=sp and tp > 1,
        ),
        algorithm=AlgorithmConfig(kl_coef=0.001),
        trainer=TrainerConfig(
            placement="split",
            offload=[],
            ranks_per_node=tp * dp * cp * pp,
            max_tokens_per_microbatch=2048 * samples,
            max_patches_per_microbatch=3584,
        ),
    )


# GB of parameters, gradients, main parameters, optimizer and reference, measured with real_sizes
STATIC = {
    (QWEN, 2, 2): [8.29, 16.59, 8.29, 16.59, 8.29],
    (QWEN, 2, 4): [8.29, 16.59, 4.15, 8.29, 8.29],
    (QWEN, 4, 1): [4.15, 8.30, 8.30, 16.60, 4.15],
    (QWEN, 4, 2): [4.15, 8.30, 4.15, 8.30, 4.15],
    (LLAVA, 2, 2): [7.08, 14.11, 7.05, 14.11, 7.08],
    (LLAVA, 4, 1): [3.55, 7.06, 7.05, 14.11, 3.55],
}


@pytest.mark.parametrize(("model", "tp", "dp"), STATIC)
def test_what_is_always_there_is_as_measured(model, tp, dp):
    parts = memory.usage(config(tp, dp), ARCHITECTURES[model]()).training
    found = [parts[name] / GB for name in ("parameters", "gradients", "main parameters", "optimizer", "reference")]
    assert found == pytest.approx(STATIC[model, tp, dp], rel=0.01)


UNFUSED = {"bias_activation_fusion": False}
# above that, at the peak of a training pass; the log-prob head of the unfused ones took 0.2 to 0.5 GB more
PASSES = [
    (QWEN, {"megatron": UNFUSED, "vision_megatron": UNFUSED}, 63.61),
    (QWEN, {"megatron": UNFUSED, "vision_megatron": UNFUSED, "sp": False}, 70.1),
    (QWEN, {"vision_megatron": UNFUSED}, 46.22),
    (QWEN, {}, 45.24),
    (QWEN, {"recompute": "selective"}, 14.09),
    (QWEN, {"recompute": "full"}, 5.10),
    (QWEN, {"megatron": UNFUSED, "vision_megatron": UNFUSED, "tp": 4, "dp": 1}, 32.9),
    (QWEN, {"tp": 4, "recompute": "selective", "samples": 4}, 5.24),
    (LLAVA, {"megatron": UNFUSED}, 52.4),
    (LLAVA, {"dp": 4}, 40.79),
    ("qwen2_5_vl_3b", {"tp": 4, "dp": 2, "samples": 4}, 12.08),  # two groups of keys and values, which ranks gather
]


def passing(model: str, fields: dict) -> float:
    parts = memory.usage(config(**fields), ARCHITECTURES[model]()).training
    return sum(parts[name] for name in ("activations", "activations, vision", "pixels", "largest moment")) / GB


@pytest.mark.parametrize(("model", "fields", "measured"), PASSES)
def test_a_pass_takes_what_was_measured(model, fields, measured):
    assert passing(model, fields) == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
def test_a_pass_takes_what_the_workers_own_code_takes(tmp_path):
    command = [sys.executable, "tests/pretend/real_sizes.py", QWEN, "tp=4", "dp=2", "recompute=mlp", "samples=4"]
    subprocess.run([*command, "--json", str(tmp_path / "sizes.json")], cwd=ROOT, check=True)
    measured = json.loads((tmp_path / "sizes.json").read_text())
    fields = {"tp": 4, "dp": 2, "recompute": "selective", "samples": 4}
    assert passing(QWEN, fields) == pytest.approx(measured["train_peak"] / GB, rel=0.05)
    parts = memory.usage(config(**fields), ARCHITECTURES[QWEN]()).training
    for ours, theirs in (
        ("gradients", "gradients"),
        ("main parameters", "main_parameters"),
        ("optimizer", "optimizer"),
    ):
        assert parts[ours] == pytest.approx(measured[theirs], rel=0.01)


def test_the_table_in_the_documentation_is_the_planners_and_everything_in_it_fits():
    written = (ROOT / "docs/cluster.md").read_text()
    assert table() in written, "python -m tests.launch.memory_table writes it"
    peaks = [float(peak) for peak in re.findall(r"\*\*([\d.]+)\*\*", table())]
    assert len(peaks) == 8
    assert max(peaks) < 72


def test_what_does_not_fit_is_refused_with_its_parts_and_what_helps():
    hf_config = ARCHITECTURES[QWEN]()
    fitting = planned(QWEN, "colocated", 2)
    memory.check_memory(fitting, hf_config, GPU_BYTES)
    wide = replace(
        fitting,
        parallel=replace(fitting.parallel, tensor_model_parallel_size=1, sequence_parallel=False),
        model=replace(fitting.model, recompute="full"),
    )
    with pytest.raises(ValueError, match=r"gradients 33\.2.*fits with parallel\.tensor_model_parallel_size=2"):
        memory.check_memory(wide, hf_config, GPU_BYTES)
    kept = replace(fitting, model=replace(fitting.model, recompute="none"))
    with pytest.raises(ValueError, match=r"activations, vision.*fits with model\.recompute=full"):
        memory.check_memory(kept, hf_config, GPU_BYTES)
    with pytest.raises(ValueError, match=r"more GPUs with parallel\.tensor_model_parallel_size"):
        memory.check_memory(wide, hf_config, 10 * 10**9)


def test_parts_come_and_go_with_what_is_configured():
    hf_config = ARCHITECTURES[QWEN]()

    def parts(*overrides: str) -> dict[str, int]:
        changed = apply_overrides(config(), list(overrides))
        return memory.usage(changed, hf_config).training

    plain = parts()
    assert "reference" not in parts("algorithm.kl_coef=0")
    assert parts("algorithm.reference_sync_every=10")["reference"] == 3 * plain["reference"]
    assert parts("algorithm.reference_sync_every=10", "model.dtype=float32")["reference"] == 2 * plain["reference"]
    assert parts("trainer.ema_decay=0.9")["average"] == 2 * plain["parameters"]
    critic = parts("algorithm.advantage=gae")["critic"]
    assert critic == sum(plain[name] for name in ("parameters", "gradients", "main parameters", "optimizer"))
    adapted = parts("model.lora.rank=8")
    assert adapted["gradients"] < plain["gradients"] / 100
    assert "reference" not in adapted
    frozen = parts("model.freeze=[vision_tower]")
    assert "activations, vision" not in frozen
    assert plain["gradients"] - frozen["gradients"] == pytest.approx(4 * 0.63e9 / 2, rel=0.05)
    assert "optimizer" not in parts("optimizer.megatron.optimizer_cpu_offload=true")
    halved = parts("optimizer.megatron={use_precision_aware_optimizer: true, exp_avg_dtype: bfloat16}")
    assert halved["optimizer"] == plain["optimizer"] * 3 // 4
    staged = parts("parallel.pipeline_model_parallel_size=2", "trainer.ranks_per_node=8")
    assert staged["parameters"] < 0.6 * plain["parameters"]
    assert staged["activations"] == plain["activations"]  # half of the layers, and two microbatches in flight


def test_engines_get_what_the_ranks_leave():
    hf_config = ARCHITECTURES[QWEN]()
    shared, apart = planned(QWEN, "colocated", 2), planned(QWEN, "split", 2)

    def share(changed: RunConfig) -> float:
        return memory.engine_memory_fraction(changed, hf_config, GPU_BYTES)

    # of 77.5 GB SGLang keeps 13.4 GiB for activations and graphs, 8 GiB for the tower, and two of the largest tensor
    assert share(apart) == pytest.approx(1 - (14.07 + 8.59 + 2.18) / 77.5, abs=0.002)
    assert share(shared) == pytest.approx(1 - (14.07 + 8.59 + 2.18) / 75.5, abs=0.002)
    assert memory.residue(shared, hf_config) == 0
    kept = replace(shared, trainer=replace(shared.trainer, offload=[p for p in TRAINER_MEMORY if p != "reference"]))
    assert memory.residue(kept, hf_config) == pytest.approx(8.29e9, rel=0.01)
    assert share(kept) == pytest.approx(1 - (14.07 + 8.59 + 2.18) / (75.5 - 8.29), abs=0.002)
    stays = replace(shared, trainer=replace(shared.trainer, offload=["optimizer"]))
    with pytest.raises(ValueError, match=r"Use a larger rollout\.tensor_parallel_size"):
        memory.engine_memory_fraction(stays, hf_config, 75 * 10**9)
