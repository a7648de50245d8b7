"""The demo's GRPO phase with engines and ranks taking turns, and with the engines one step ahead, on the same cores.

One step ahead, weights change when responses are finished, or amid them (``rollout.partial``).

    python benchmarks/pipelined_vs_sync.py [--steps 100] [--ranks 1 2] [--model runs/sft_digits_seed0/hf] [--seed 0]

All start from the demo's cold start (make demo), at the demo's settings, 16 x 8 samples a step, without evaluations.
Seconds are from the end of the first step to the end of the last, so that no start is in them. Writes
benchmarks/results/pipelined_vs_sync_<cores>_cores.{json,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import mean, median

RESULTS = Path(__file__).parent / "results"
WINDOW = 10  # steps over which a reward is averaged
AHEAD = ["trainer.max_staleness=1", "algorithm.rollout_correction=truncate"]
WAYS = {
    "in turns": ["trainer.max_staleness=0"],
    "ahead": [*AHEAD, "rollout.partial=False"],
    "ahead, amid responses": [*AHEAD, "rollout.partial=True"],
}
COLOURS = {"in turns": "#4c6a92", "ahead": "#d1603d", "ahead, amid responses": "#e3a23c"}
PHASES = {
    "step": "timing_s/step",
    "generate": "timing_s/gen",
    "wait for samples": "timing_s/wait_gen",
    "train": "timing_s/update_actor",
    "sync": "timing_s/update_weights",
}
Row = dict[str, float]


def train(name: str, overrides: list[str], directory: Path) -> list[Row]:
    """The log of a run, a row a step."""
    print(f"--- {name}", file=sys.stderr)
    off = ["trainer.eval_prompts=0", "observability.save_rollouts_every=0", f"trainer.run_dir={directory}"]
    command = [sys.executable, "-m", "megarl.cli", "train", "examples/grpo_qwen_vl_digits.py", *overrides, *off]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # in turns the ranks wait for all of it; ahead, for what is left before a step or before a sync
        finish = row.get("timing_s/finish_gen", 0.0)
        row["timing_s/wait_gen"] = row.get("timing_s/wait_gen", row["timing_s/gen"]) + finish
        row["timing_s/update_weights"] -= finish
    return rows


def summary(rows: list[Row]) -> dict[str, float]:
    """What a run took and reached."""
    result = {name: median(row[key] for row in rows[1:]) for name, key in PHASES.items()}
    result["total"] = sum(row["timing_s/step"] for row in rows[1:])
    result["last_rewards"] = mean(row["critic/score/mean"] for row in rows[-WINDOW:])
    for name in ("rollout/staleness_mean", "rollout/partial_fraction", "training/rollout_logprobs_diff_mean"):
        result[name] = mean(row[name] for row in rows[1:])
    return result


def smoothed(values: list[float]) -> list[float]:
    """Means of the last ``WINDOW`` values."""
    return [mean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


def plot(runs: dict[str, list[Row]], table: dict[str, dict[str, float]], path: Path) -> None:
    """Reward by step, reward by second, and where a step's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_step, by_time, bars) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, rows in runs.items():
        way, _, layout = name.rpartition(", ")
        style = {"color": COLOURS[way], "linestyle": "-" if layout == "1 rank" else "--", "linewidth": 1.8}
        rewards = [row["critic/score/mean"] for row in rows]
        seconds = [0.0, *accumulate(row["timing_s/step"] for row in rows[1:])]
        by_step.plot([row["step"] for row in rows], smoothed(rewards), label=name, **style)
        by_time.plot(seconds, smoothed(rewards), label=name, **style)
    by_step.set(xlabel="step", ylabel=f"reward, mean of {WINDOW} steps", title="the same steps")
    by_time.set(xlabel="seconds since the first step", title="the same seconds")
    figure.legend(*by_step.get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=len(WAYS))
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    parts = {"wait for samples": "#e3b23c", "train": "#6a994e", "sync": "#7b6d8d"}
    names, bottom = list(runs)[::-1], [0.0] * len(runs)
    for part, colour in parts.items():
        widths = [table[name][part] for name in names]
        bars.barh(names, widths, left=bottom, color=colour, label=part, height=0.6)
        bottom = [left + width for left, width in zip(bottom, widths, strict=True)]
    rest = [max(0.0, table[name]["step"] - left) for name, left in zip(names, bottom, strict=True)]
    bars.barh(names, rest, left=bottom, color="#cccccc", label="rest", height=0.6)
    for place, name in enumerate(names):
        bars.text(table[name]["step"], place, f" {table[name]['step']:.2f} s", va="center")
    bars.set(xlabel="seconds of the ranks, median step", title="where a step's time goes")
    bars.margins(x=0.15)
    bars.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
    figure.savefig(path, dpi=130)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="1 leaves the engine a core of two")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", default="runs/sft_digits_seed0/hf")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    args = arguments.parse_args()
    fixed = [f"model.path={args.model}", f"seed={args.seed}", f"trainer.num_steps={args.steps}"]
    with tempfile.TemporaryDirectory(prefix="megarl_pipelined_") as folder:
        runs = {}
        for way, overrides in WAYS.items():
            for ranks in args.ranks:
                name = f"{way}, {ranks} rank{'s' if ranks > 1 else ''}"
                layout = f"parallel.tensor_model_parallel_size={ranks}"
                runs[name] = train(name, [*fixed, layout, *overrides], Path(folder) / str(len(runs)))
    table = {name: summary(rows) for name, rows in runs.items()}
    columns = [*PHASES, "total", "last_rewards"]
    print(f"\nmedian seconds of a step, 16 prompts x 8 samples, {args.steps} steps")
    print(f"{'':26s}" + "".join(f"{name:>18s}" for name in columns))
    for name, row in table.items():
        print(f"{name:26s}" + "".join(f"{row[column]:18.3f}" for column in columns))
    fastest = {way: min(row["total"] for name, row in table.items() if name.rpartition(", ")[0] == way) for way in WAYS}
    ratio = {way: fastest["in turns"] / seconds for way, seconds in fastest.items()}
    for way in list(WAYS)[1:]:
        print(f"the same steps, in turns, take {ratio[way]:.2f}x as long as {way}, each at its fastest layout")
    args.out.mkdir(exist_ok=True)
    stem = args.out / f"pipelined_vs_sync_{os.cpu_count()}_cores"
    packages = {name: version(name) for name in ("torch", "transformers", "sglang", "megatron-core")}
    result = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine(), "packages": packages}
    result |= {"steps": args.steps, "seed": args.seed, "runs": table, "wall_time_ratio": ratio}
    result["rewards"] = {name: [row["critic/score/mean"] for row in rows] for name, rows in runs.items()}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, table, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
