"""Start ranks on pretended GPUs, each a process of its own (``run.py``), and wait for what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.pretend import device

TIMEOUT_S = 400.0


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
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            processes.append(
                subprocess.Popen(command, cwd=device.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
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
