"""One rank on a pretended GPU: ``python tests/pretend/run.py JOB.json``, see ``Job``; it loads the shim first."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

warnings.simplefilter("ignore")
sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder would hide packages

from tests.pretend import device  # noqa: E402

device.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from tests.pretend import patches, step, te_stub  # noqa: E402
from tests.pretend.mode import Pretend  # noqa: E402


@dataclass
class Case:
    """A call of ``step.run_all``."""

    name: str
    path: str  # of the model
    overrides: list[str]  # key=value, as on the command line
    directory: str


@dataclass
class Job:
    """What a process does: ``cases`` one after the other, their results or tracebacks by name into ``output``."""

    cases: list[Case]
    output: str
    transformer_engine: bool  # use the stand-in
    rank: int
    world_size: int


def run(job: Job) -> dict[str, dict]:
    """The results by name of case; {"error": traceback} of one that raised, and the places where the host waited."""
    results: dict[str, dict] = {}
    torch.set_num_threads(1)
    with Pretend() as pretend:
        if job.transformer_engine:
            te_stub.install()
        import megarl.parallel  # noqa: F401  only now: it looks whether there is CUDA

        patches.megatron()
        from megarl.parallel import groups

        for case in job.cases:
            pretend.waits.clear()
            dist.init_process_group(
                "gloo",
                init_method=f"file://{case.directory}.store",
                rank=job.rank,
                world_size=job.world_size,
            )
            try:
                results[case.name] = step.run_all(
                    case.path, case.overrides, case.directory, job.world_size, pretend.waits.total
                )
            except Exception:
                results[case.name] = {"error": traceback.format_exc()}
                if job.world_size > 1:  # the other ranks would wait for this one
                    break
            results[case.name]["attention_calls"] = len(te_stub.CALLS)
            results[case.name]["places"] = [[*key, count] for key, count in pretend.waits.most_common(20)]
            te_stub.CALLS.clear()
            dist.barrier()
            groups.destroy()
            dist.destroy_process_group()
    return results


def main(path: str) -> None:
    data = json.loads(Path(path).read_text())
    job = Job(**data | {"cases": [Case(**case) for case in data["cases"]]})
    results = run(job)
    Path(job.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # a rank whose peer failed has threads that wait for it
