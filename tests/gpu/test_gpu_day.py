"""benchmarks/gpu_day.py itself, at toy sizes: it measures, writes, and loses nothing when a part fails."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_day.py"


def day(tmp_path, *parts):
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(tmp_path), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu_day_cpu.json").read_text())
    assert result["device"]["name"] == "cpu"
    assert list(result["parts"]) == list(parts)
    return result["parts"]


def numbers(part):
    assert "error" not in part, part["error"]
    return {name: value for name, value in part.items() if value is not None}


def test_parts_are_measured_and_failures_are_text(tmp_path):
    parts = day(tmp_path, "head", "checksum")
    assert numbers(parts["head"])["train_ms"] > numbers(parts["head"])["forward_ms"] > 0
    assert numbers(parts["checksum"])["gb_per_s"] > 0
    measure = runpy.run_path(str(SCRIPT))["measure"]
    assert measure("head", True, 5.0) == {"error": "no time was left"}
    if not torch.cuda.is_available():
        assert "CUDA" in measure("matmul", False, 60.0)["error"]


@pytest.mark.slow
def test_a_whole_day(tmp_path):
    parts = day(tmp_path, "matmul", "layers_3b", "layers_7b", "head", "sync", "checksum", "offload", "run")
    rates = {name: numbers(part) for name, part in parts.items()}
    assert all(rates[name]["layer_tokens_per_s"] > 0 for name in ("layers_3b", "layers_7b"))
    assert rates["sync"]["receive_gb_per_s"] > 0
    assert rates["offload"]["restore_again_gb_per_s"] > 0
    assert rates["run"]["timing_s/update_actor"] > 0
