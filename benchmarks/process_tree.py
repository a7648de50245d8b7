"""What a command and everything it starts use: CPU seconds and memory, sampled while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROLES = {  # words in a process's title -> what it is
    "megarl.cli": "driver",
    "megarl.rewards": "rewards",
    "EngineActor": "engine",
    "sglang": "engine",
    "_RankActor": "trainer ranks",
    "ray": "ray",
}


@dataclass
class Sample:
    """One look at the tree."""

    seconds: float  # since the start
    step: int  # last step in the log that is watched
    cpu_s: float  # of all processes that were ever seen
    memory: dict[str, float] = field(default_factory=dict)  # MB by role; shared pages are divided among their users


def role(title: str) -> str:
    """What the process with this command line does."""
    return next((name for word, name in ROLES.items() if word in title), "other")


def run(command: list[str], metrics: Path, every: float = 1.0) -> list[Sample]:
    """Run ``command`` and sample its tree ``every`` seconds; ``metrics`` (JSON lines) tells the step.

    Raises ``RuntimeError`` with the status when the command fails.
    """
    start, cpu, samples, mark = time.monotonic(), {}, [], uuid.uuid4().hex
    process = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {"BENCHMARK_RUN": mark})
    while process.poll() is None:
        memory: dict[str, float] = defaultdict(float)
        for member in psutil.process_iter():
            try:
                if member.environ().get("BENCHMARK_RUN") != mark:  # daemons of Ray's are nobody's children
                    continue
                with member.oneshot():
                    times = member.cpu_times()
                    cpu[member.pid, member.create_time()] = times.user + times.system
                    memory[role(" ".join(member.cmdline()))] += member.memory_full_info().pss / 1e6
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        step = len(metrics.read_text().splitlines()) - 1 if metrics.is_file() else -1
        samples.append(Sample(time.monotonic() - start, step, sum(cpu.values()), dict(memory)))
        time.sleep(every)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return samples


def training_cpu(samples: list[Sample], first: int, last: int) -> float:
    """CPU seconds between the end of step ``first`` and the end of step ``last``."""
    at = {}
    for sample in samples:
        at.setdefault(sample.step, sample.cpu_s)
    return at[min(s for s in at if s >= last)] - at[min(s for s in at if s >= first)]
