"""Running the `megarl` command as a user does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megarl.observability.glossary import unexplained

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = str(Path(__file__).with_name("experiment.py"))


def start(log, *arguments):
    """A `megarl` command in the background, its output in the file ``log``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with open(log, "w") as file:
        command = [sys.executable, "-m", "megarl.cli", *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def run(log, *arguments, status=0, timeout=400):
    """A `megarl` command to its end; what it printed."""
    process = start(log, *arguments)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    text = Path(log).read_text()
    assert code == status, text[-6000:]
    return text


def metrics(run_dir):
    """The rows of a run's metrics.jsonl by step, without what a clock or the machine decides."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    assert not unexplained({name for row in rows for name in row} - {"step"})
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith(("timing", "perf/"))} for row in rows}


def wait_for_step(process, run_dir, step, log, timeout=300):
    """Return when ``run_dir`` has logged ``step``."""
    deadline = time.monotonic() + timeout
    while step not in metrics(run_dir):
        assert process.poll() is None, Path(log).read_text()[-6000:]
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        time.sleep(0.2)


def kill_engine_when(process, run_dir, step, killed):
    """Kill the SGLang scheduler of ``process`` as soon as ``step`` is logged, that is during the next rollout."""
    while step not in metrics(run_dir) and process.poll() is None:
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "sglang::scheduler" in " ".join(child.cmdline()):
            child.kill()
            killed.append(child.pid)
