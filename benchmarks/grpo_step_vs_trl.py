"""Time of a GRPO step, and time to a reward, against TRL's GRPOTrainer with HF generate, on the same two cores.

    pip install --no-deps trl==1.16.0
    python benchmarks/grpo_step_vs_trl.py [--steps 60] [--reward 0.7]

Both start from the demo's cold start (make demo) and see the same prompts in the same order, 16 x 8 samples a step.
TRL runs as one process with two threads and as two data-parallel processes with one. Results go to
benchmarks/results/grpo_step_vs_trl_<cores>_cores.json.
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
from pathlib import Path
from statistics import mean, median

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3  # steps left out of the median
WINDOW = 10  # steps over which a reward is averaged
OURS = {
    "megarl, tensor 2": [],
    "megarl, data 2": ["parallel.tensor_model_parallel_size=1", "trainer.ranks_per_node=2"],
}
OURS["megarl, data 2, 2 engines"] = [*OURS["megarl, data 2"], "rollout.num_engines=2"]
PEERS = {"TRL, 1 process x 2 threads": (1, 2), "TRL, 2 processes x 1 thread": (2, 1)}
Row = dict[str, float]


def megarl(overrides: list[str], directory: Path) -> list[Row]:
    """Reward and seconds by phase of each step of ``megarl train``."""
    off = ["trainer.eval_prompts=0", f"trainer.run_dir={directory}"]
    train = [sys.executable, "-m", "megarl.cli", "train", "examples/grpo_qwen_vl_digits.py", *overrides, *off]
    subprocess.run(train, check=True, stdout=sys.stderr)
    rows = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        m = json.loads(line)
        phases = {"generate and reward": m["timing_s/gen"], "train": m["timing_s/load"] + m["timing_s/update_actor"]}
        phases["weight sync"] = m["timing_s/update_weights"]
        total = m["timing_s/step"]
        rows.append(
            {"seconds": total, "reward": m["critic/score/mean"], **phases, "rest": total - sum(phases.values())}
        )
    return rows


def trl(overrides: list[str], directory: Path, processes: int, threads: int) -> list[Row]:
    """The same of TRL."""
    out = directory / f"trl_{processes}x{threads}.json"
    script = [str(Path(__file__).parent / "trl_grpo.py"), "--processes", str(processes), "--threads", str(threads)]
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [os.getcwd(), *sys.path[1:]]
    )  # for the experiment: it names its neighbour
    command = [sys.executable, *launch, *script, "--out", str(out), *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    rows = []
    for m in json.loads(out.read_text()):
        before = {"generate and reward": m["generate"] + m["judge"], "train": m["seconds"] - m["prepare"]}
        rows.append({"seconds": m["seconds"], "reward": m["reward"], **before, "weight sync": 0.0})
        rows[-1]["rest"] = m["seconds"] - sum(before.values())
    return rows


def time_to(rows: list[Row], reward: float) -> float | None:
    """Seconds until the mean reward of ``WINDOW`` steps reaches ``reward``."""
    for end in range(WINDOW, len(rows) + 1):
        if mean(row["reward"] for row in rows[end - WINDOW : end]) >= reward:
            return sum(row["seconds"] for row in rows[:end])
    return None


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--reward", type=float, default=0.7)
    arguments.add_argument("--model", default="runs/sft_digits_seed0/hf")
    args = arguments.parse_args()
    overrides = [f"model.path={args.model}", f"trainer.num_steps={args.steps}"]
    with tempfile.TemporaryDirectory(prefix="megarl_vs_trl_") as folder:
        directory = Path(folder)
        runs = {}
        for index, (name, layout) in enumerate(OURS.items()):
            runs[name] = megarl([*overrides, *layout], directory / f"run{index}")
        for name, (processes, threads) in PEERS.items():
            runs[name] = trl(overrides, directory, processes, threads)
    table: dict[str, Row] = {}
    columns = ["seconds", "generate and reward", "train", "weight sync", "rest"]
    print(f"\nmedian seconds of a step, 16 prompts x 8 samples, {args.steps} steps")
    print(f"{'':30s}" + "".join(f"{name:>21s}" for name in [*columns, f"to reward {args.reward}"]))
    for name, rows in runs.items():
        row = {column: median(r[column] for r in rows[WARM_UP:]) for column in columns}
        reached = time_to(rows, args.reward)
        table[name] = row | {"seconds_to_reward": reached, "last_rewards": mean(r["reward"] for r in rows[-WINDOW:])}
        print(f"{name:30s}" + "".join(f"{row[c]:21.3f}" for c in columns) + f"{reached or float('nan'):21.1f}")
    ours, theirs = (min((table[name] for name in names), key=lambda row: row["seconds"]) for names in (OURS, PEERS))
    ratio = {"step": theirs["seconds"] / ours["seconds"]}
    print(f"a step of TRL's, the faster of its two, takes {ratio['step']:.2f}x as long as megarl's fastest", end="")
    if ours["seconds_to_reward"] and theirs["seconds_to_reward"]:
        ratio["reward"] = theirs["seconds_to_reward"] / ours["seconds_to_reward"]
        print(f", the reward {ratio['reward']:.2f}x", end="")
    print()
    RESULTS.mkdir(exist_ok=True)
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "sglang", "megatron-core")}
    result = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine(), "packages": packages}
    result |= {"steps": args.steps, "reward": args.reward, "median_seconds": table, "ratio": ratio}
    path = RESULTS / f"grpo_step_vs_trl_{os.cpu_count()}_cores.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
