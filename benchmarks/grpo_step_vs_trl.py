"""Time of a GRPO step, and time to a reward, against TRL's GRPOTrainer with HF generate, on the same two cores.

    pip install --no-deps trl==1.16.0
    python benchmarks/grpo_step_vs_trl.py [--shape digits|vlm] [--steps N] [--only NAME ...]

Both start from the same weights and see the same prompts in the same order. ``digits``: from the demo's cold start
(make demo), 16 x 8 samples a step, 60 steps. ``vlm``: vlm_shape.py, with the least that a step may take, its
multiplications at the cores' measured rate. TRL runs as one process with two threads and as two data-parallel processes
with one. Results go to benchmarks/results/grpo_step_vs_trl_[vlm_]<cores>_cores.json; what ``--only`` left out stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.step_floor import step_floor  # noqa: E402
from megarl.experiment import load_experiment  # noqa: E402
from megarl.registry import load_object  # noqa: E402

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["seconds", "generate and reward", "train", "weight sync", "rest", "answer tokens"]
WINDOW = 10  # steps over which a reward is averaged
DATA_2 = ["parallel.tensor_model_parallel_size=1", "trainer.ranks_per_node=2"]
OURS = {
    "megarl, tensor 2": [],
    "megarl, tensor 2, 2 engines": ["rollout.num_engines=2"],
    "megarl, data 2": DATA_2,
    "megarl, data 2, 2 engines": [*DATA_2, "rollout.num_engines=2"],
}
PEERS = {"TRL, 1 process x 2 threads": (1, 2), "TRL, 2 processes x 1 thread": (2, 1)}
Row = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A model, its prompts and how many steps are measured."""

    experiment: str
    model: str
    steps: int
    warm_up: int  # steps left out of the median
    reward: float | None  # that both are to reach; None: times only


SHAPES = {
    "digits": Shape("examples/grpo_qwen_vl_digits.py", "runs/sft_digits_seed0/hf", 60, 3, 0.7),
    "vlm": Shape("benchmarks/vlm_shape.py", "runs/vlm_shape_model", 4, 1, None),
}


def megarl(experiment: str, overrides: list[str], directory: Path) -> list[Row]:
    """Reward and seconds by phase of each step of ``megarl train``."""
    off = ["trainer.eval_prompts=0", f"trainer.run_dir={directory}"]
    train = [sys.executable, "-m", "megarl.cli", "train", experiment, *overrides, *off]
    subprocess.run(train, check=True, stdout=sys.stderr)
    rows = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        m = json.loads(line)
        phases = {"generate and reward": m["timing_s/gen"], "train": m["timing_s/load"] + m["timing_s/update_actor"]}
        phases["weight sync"] = m["timing_s/update_weights"]
        total = m["timing_s/step"]
        rows.append({"seconds": total, "reward": m["critic/score/mean"], **phases})
        rows[-1] |= {"rest": total - sum(phases.values()), "answer tokens": m["response_length/mean"]}
    return rows


def trl(experiment: str, overrides: list[str], directory: Path, processes: int, threads: int) -> list[Row]:
    """The same of TRL."""
    directory.mkdir()
    out = directory / "rows.json"
    script = [str(Path(__file__).parent / "trl_grpo.py"), "--processes", str(processes), "--threads", str(threads)]
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])  # for the experiment: it names its neighbour
    command = [sys.executable, *launch, *script, "--out", str(out), "--experiment", experiment, *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    rows = []
    for m in json.loads(out.read_text()):
        before = {"generate and reward": m["generate"] + m["judge"], "train": m["seconds"] - m["prepare"]}
        rows.append({"seconds": m["seconds"], "reward": m["reward"], **before, "weight sync": 0.0})
        rows[-1] |= {"rest": m["seconds"] - sum(before.values()), "answer tokens": m["answer tokens"]}
    return rows


def time_to(rows: list[Row], reward: float) -> float | None:
    """Seconds until the mean reward of ``WINDOW`` steps reaches ``reward``."""
    for end in range(WINDOW, len(rows) + 1):
        if mean(row["reward"] for row in rows[end - WINDOW : end]) >= reward:
            return sum(row["seconds"] for row in rows[:end])
    return None


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def measure(name: str, shape: Shape, overrides: list[str], directory: Path, target: float | None) -> dict[str, Any]:
    """Medians of ``COLUMNS`` over the steps of one layout, and how the reward rose if it has a ``target``."""
    load = os.getloadavg()[0]  # what else the machine does
    if name in OURS:
        rows = megarl(shape.experiment, [*overrides, *OURS[name]], directory)
    else:
        rows = trl(shape.experiment, overrides, directory, *PEERS[name])
    measured = rows[shape.warm_up :]
    row = {column: median(r[column] for r in measured) for column in COLUMNS}
    row |= {"steps": len(measured), "load before": load}
    if target is None:
        return row
    last = mean(r["reward"] for r in rows[-WINDOW:])
    return row | {"seconds_to_reward": time_to(rows, target), "last_rewards": last}


def ratios(table: dict[str, Row]) -> dict[str, float]:
    """How many times as long TRL's faster layout takes as megarl's fastest, for a step and to the reward."""
    ours, theirs = ([table[name] for name in names if name in table] for names in (OURS, PEERS))
    if not ours or not theirs:
        return {}
    ours, theirs = (min(rows, key=lambda row: row["seconds"]) for rows in (ours, theirs))
    ratio = {"step": theirs["seconds"] / ours["seconds"]}
    if ours.get("seconds_to_reward") and theirs.get("seconds_to_reward"):
        ratio["reward"] = theirs["seconds_to_reward"] / ours["seconds_to_reward"]
    return ratio


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="digits")
    arguments.add_argument("--steps", type=int)
    arguments.add_argument("--reward", type=float)
    arguments.add_argument("--model")
    arguments.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS], metavar="NAME")
    args = arguments.parse_args()
    shape = SHAPES[args.shape]
    steps, target = args.steps or shape.steps, args.reward or shape.reward
    overrides = [f"model.path={args.model or shape.model}", f"trainer.num_steps={steps}"]
    config = load_experiment(shape.experiment, overrides)
    if config.model.factory and not Path(config.model.path).is_dir():
        load_object(config.model.factory)(config.model.path, config.seed)
    path = RESULTS / f"grpo_step_vs_trl_{'' if args.shape == 'digits' else args.shape + '_'}{os.cpu_count()}_cores.json"
    table: dict[str, Row] = json.loads(path.read_text())["median_seconds"] if path.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="megarl_vs_trl_") as folder:
        for index, name in enumerate(args.only):
            table[name] = measure(name, shape, overrides, Path(folder) / str(index), target)
    print(f"\nmedian seconds of a step, {config.data.prompts_per_step} prompts x {config.rollout.group_size} samples")
    shown = [*COLUMNS, "seconds_to_reward"] if target else COLUMNS
    print(f"{'':30s}" + "".join(f"{name:>21s}" for name in shown))
    for name, row in table.items():
        cells = (f"{'-' if row.get(c) is None else format(row[c], '.3f'):>21s}" for c in shown)
        print(f"{name:30s}" + "".join(cells))
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "sglang", "megatron-core")}
    result = {"cores": os.cpu_count(), "machine": cpu_name(), "packages": packages}
    result |= {"steps": steps, "reward": target, "median_seconds": table, "ratio": ratios(table)}
    for what, ratio in result["ratio"].items():
        print(f"{what}: TRL's faster layout takes {ratio:.2f}x as long as megarl's fastest")
    if args.shape == "vlm":
        answers = round(mean(row["answer tokens"] for row in table.values()))
        result["floor"] = step_floor(config, answers)
        floor = "{flops:.3g} operations at the {flops_per_second:.3g} a second that were measured: {seconds:.1f} s"
        print("floor: " + floor.format(**result["floor"]))
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
