"""Every algorithm of the literature on the demo's digits: twenty steps each, from the same cold start.

    python benchmarks/presets_on_digits.py [--steps 20] [--presets grpo dapo ...] [--model runs/sft_digits_seed0/hf]

The cold start is the demo's first half, made here where it is missing. All train with the demo's settings, learning
rate included, which were chosen for GRPO: the table says that an algorithm works, not which is best. Held-out scores
are of greedy answers to 128 images, exact match; rewards are means over the first and the last five steps (where an
expert begins answers, UFT, they say how much of the answer it gives). One Ray session serves all; a preset that is done
for the present commit is not run again, one that cannot run as configured is listed with the reason. Writes
benchmarks/results/presets_on_digits_<cores>_cores.json after each preset.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megarl.algorithms.presets import PRESETS
from megarl.config import RunConfig
from megarl.experiment import load_experiment
from megarl.launch.cluster import cluster
from megarl.launch.placement import placed
from megarl.trainer.rl import RLTrainer
from megarl.trainer.run import Run, check

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
EXPERIMENT = str(ROOT / "examples" / "grpo_qwen_vl_digits.py")
ENDS = 5  # steps over which the first and the last reward are averaged
EVAL_PROMPTS = 128  # of each of the two tasks
# An expert who lists the digits as the reward wants them: for algorithms that learn from one
EXPERT = ["tasks.digits_list.kwargs.order=ascending", "tasks.digits_sum.kwargs.order=ascending"]
CHANGES = {  # what a preset needs besides its row
    "ppo": ["critic.lr=5e-4", "critic.warmup_steps=5"],
    "remax": ["data.prompts_per_step=64", "rollout.group_size=1"],
    **dict.fromkeys(["luffy", "srft", "hpt"], EXPERT),
    # their schedules are of hundreds of steps
    "uft": [*EXPERT, "algorithm.hint_segments=3", "algorithm.hint_steps=20"],
    "uft_simplified": [*EXPERT, "algorithm.hint_steps=20"],
    "chord": [*EXPERT, "algorithm.chord_mu_warmup_steps=4", "algorithm.chord_mu_decay_steps=16"],
}
HELD_OUT = "val-core/digits_list/score/mean@1"
Row = dict[str, float]


def commit() -> str:
    """Of the working tree; what has changed since makes it another."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "megarl", "examples", __file__], check=False)
    return head + ("-changed" if changed.returncode else "")


def cold_start(model: Path) -> None:
    """Make ``model`` as the demo does, unless it is there."""
    if model.is_dir():
        return
    run = model.parent
    overrides = ["seed=0", "model.path=runs/tiny_qwen2_5_vl_seed0", f"trainer.run_dir={run}"]
    command = [sys.executable, "-m", "megarl.cli", "sft", "examples/sft_qwen_vl_digits.py", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)


def configured(name: str, steps: int, model: Path, directory: Path) -> RunConfig:
    """The experiment with a preset. Raises ``ValueError`` when it cannot run."""
    quiet = ["observability.console=False", "observability.save_rollouts_every=0", "observability.trackers=[jsonl]"]
    length = [f"trainer.num_steps={steps}", f"trainer.eval_prompts={EVAL_PROMPTS}", "trainer.eval_every=0"]
    place = [f"model.path={model}", f"trainer.run_dir={directory}"]
    changes = CHANGES.get(name, [])
    config = load_experiment(EXPERIMENT, [f"algorithm={name}", *changes, *quiet, *length, *place], PRESETS)
    check(config)
    return config


def train(config: RunConfig) -> list[Row]:
    """The log of a run, the evaluation before it first."""
    run = Run(config)
    with placed(config) as (config, placement), run:
        trainer = RLTrainer(config, run, placement)
        try:
            trainer.fit()
        finally:
            trainer.close()
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def summary(rows: list[Row], seconds: float) -> dict[str, Any]:
    """What a run reached, and whether all it logged were numbers."""
    steps = rows[1:]
    rewards = [row["critic/score/mean"] for row in steps]
    return {
        "held_out": [rows[0][HELD_OUT], steps[-1][HELD_OUT]],
        "reward": [mean(rewards[:ENDS]), mean(rewards[-ENDS:])],
        "finite": all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)),
        "seconds_a_step": median(row["timing_s/step"] for row in steps),
        "seconds": seconds,
    }


def result_of(name: str, steps: int, model: Path) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = configured(name, steps, model, Path(folder) / name)
        except ValueError as error:
            return {"refused": str(error)}
        try:
            return summary(train(config), time.monotonic() - start)
        except Exception as error:  # the other presets have nothing to do with it
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def line(name: str, result: dict[str, Any]) -> str:
    for key in ("refused", "failed"):
        if key in result:
            return f"{name:30s}{key}: {result[key]}"
    before, after = result["held_out"]
    first, last = result["reward"]
    # two standard errors of a difference between shares of EVAL_PROMPTS
    verdict = (
        "improves" if after > before else "holds" if before - after <= 2 * (0.5 / EVAL_PROMPTS) ** 0.5 else "FALLS"
    )
    verdict = verdict if result["finite"] else "NOT FINITE"
    return (
        f"{name:30s}{before:7.3f} ->{after:6.3f}{first:11.3f} ->{last:6.3f}{result['seconds_a_step']:9.2f}"
        f"{result['seconds']:8.0f}   {verdict}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--model", type=Path, default=Path("runs/sft_digits_seed0/hf"))
    args = parser.parse_args()
    cold_start(args.model)
    path = RESULTS / f"presets_on_digits_{os.cpu_count()}_cores.json"
    kept = json.loads(path.read_text())["presets"] if path.is_file() else {}
    stamp = {"commit": commit(), "steps": args.steps}
    with cluster(load_experiment(EXPERIMENT)):
        for name in args.presets:
            if kept.get(name, {}).items() >= stamp.items() and "failed" not in kept[name]:
                continue
            kept[name] = result_of(name, args.steps, args.model) | stamp
            print(line(name, kept[name]), file=sys.stderr, flush=True)
            machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
            versions = {package: version(package) for package in ("torch", "sglang", "ray", "transformers")}
            ordered = {preset: kept[preset] for preset in PRESETS if preset in kept}
            result = {"hardware": machine, "versions": versions, "eval_prompts": EVAL_PROMPTS, "presets": ordered}
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'preset':30s}{'held out, ascending':>16s}{'reward of steps':>18s}{'s a step':>9s}{'seconds':>8s}")
    for name in args.presets:
        print(line(name, kept[name]))
    return int(any("failed" in kept[name] or not kept[name].get("finite", True) for name in args.presets))


if __name__ == "__main__":
    sys.exit(main())
