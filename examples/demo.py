"""The main job: a tiny Qwen2.5-VL learns to read handwritten digits, first from an expert, then from a reward.

    python examples/demo.py SEED=0

Runs `megarl sft examples/sft_qwen_vl_digits.py` and `megarl train examples/grpo_qwen_vl_digits.py`, and prints held-out
accuracy before and after the second. Running it again continues or repeats what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROWS = [  # metric, what it says
    ("val-core/digits_list/score/mean@1", "list in ascending order (exact match: what the reward asks for)"),
    ("val-aux/digits_list/right_digits/mean@1", "list in any order (perception)"),
    ("val-core/digits_sum/score/mean@1", "sum"),
]


def megarl(*arguments: str) -> None:
    """Run a command of megarl's, or leave with its status."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    status = subprocess.run([sys.executable, "-m", "megarl.cli", *arguments], env=environment, check=False).returncode
    if status:
        sys.exit(status)


def main(arguments: list[str]) -> None:
    options = dict(argument.partition("=")[::2] for argument in arguments)
    seed = int(options.pop("SEED", "") or 0)
    if options:
        sys.exit(f"demo.py takes SEED=<number>, not {' '.join(options)}")
    start, runs = time.monotonic(), Path("runs")
    sft, grpo = runs / f"sft_digits_seed{seed}", runs / f"grpo_digits_seed{seed}"
    model = runs / f"tiny_qwen2_5_vl_seed{seed}"
    print(f"1/2 cold start: supervised, digits in random order -> {sft}", flush=True)
    megarl("sft", "examples/sft_qwen_vl_digits.py", f"seed={seed}", f"model.path={model}", f"trainer.run_dir={sft}")
    print(f"2/2 GRPO: the reward wants them ascending -> {grpo}", flush=True)
    overrides = [f"seed={seed}", f"model.path={sft / 'hf'}", f"trainer.run_dir={grpo}"]
    megarl("train", "examples/grpo_qwen_vl_digits.py", *overrides)
    steps = [json.loads(line) for line in (grpo / "metrics.jsonl").read_text().splitlines()]
    evaluated = [step for step in steps if ROWS[0][0] in step]
    before, after = evaluated[0], evaluated[-1]
    print(f"\nheld-out digits, greedy, seed {seed}: before -> after {after['step']} steps of GRPO")
    for key, meaning in ROWS:
        print(f"  {before[key]:.3f} -> {after[key]:.3f}  {meaning}")
    print(f"report: {grpo / 'report.html'}   ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
