"""Start processes with a pretended GPU, ranks (``run.py``) or a piece of code, and wait for what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.pretend import device

TIMEOUT_S = 400.0


def evaluate(code: str) -> Any:
    """The value of ``answer`` that ``code`` leaves in a process of its own, where the shim is loaded; as JSON."""
    program = f"from tests.pretend import device\ndevice.install()\n{code}\nimport json\nprint(json.dumps(answer))"
    device.library()
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=device.ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if process.returncode:
        raise AssertionError(process.stderr[-4000:])
    return json.loads(process.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(device.ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def start(
    directory: Path, cases: Sequence[dict], *, transformer_engine: bool = False, world_size: int = 1
) -> list[dict[str, dict]]:
    """Results by name of case, of each rank. ``cases``: name, path and overrides of ``run.Case``."""
    device.library()  # compiled once, not by every rank
    directory.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world_size):
        job = {
            "cases": [{**case, "directory": str(directory / case["name"])} for case in cases],
            "output": str(directory / f"rank{rank}.json"),
            "transformer_engine": transformer_engine,
            "rank": rank,
            "world_size": world_size,
        }
        file = directory / f"job{rank}.json"
        file.write_text(json.dumps(job))
        with (directory / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, str(Path(__file__).parent / "run.py"), str(file)]
            processes.append(
                subprocess.Popen(command, cwd=device.ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
            )
    results = []
    try:
        for rank, process in enumerate(processes):
            code = process.wait(TIMEOUT_S)
            output = directory / f"rank{rank}.json"
            if code or not output.exists():
                log = (directory / f"rank{rank}.log").read_text()
                raise AssertionError(f"rank {rank} ended with exit code {code}:\n{log[-4000:]}")
            results.append(json.loads(output.read_text()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results
