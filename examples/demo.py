"""The main job: a tiny Qwen2.5-VL or LLaVA-1.5 learns to read handwritten digits, from an expert and from a reward.

    python examples/demo.py SEED=0 MODEL=qwen_vl

Runs `megarl sft examples/sft_<MODEL>_digits.py` and `megarl train examples/grpo_<MODEL>_digits.py`, and prints held-out
accuracy before and after the second. Running it again continues or repeats what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

MODELS = {"qwen_vl": ("qwen2_5_vl", ""), "llava": ("llava", "llava_")}  # what its directory and its runs are called
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
    seed, name = int(options.pop("SEED", "") or 0), options.pop("MODEL", "") or "qwen_vl"
    if options or name not in MODELS:
        sys.exit(f"demo.py takes SEED=<number> and MODEL={'|'.join(MODELS)}, not {' '.join(arguments)}")
    start, runs = time.monotonic(), Path("runs")
    model, run = MODELS[name]
    sft, grpo = runs / f"sft_{run}digits_seed{seed}", runs / f"grpo_{run}digits_seed{seed}"
    model = runs / f"tiny_{model}_seed{seed}"
    print(f"1/2 cold start: supervised, digits in random order -> {sft}", flush=True)
    overrides = [f"seed={seed}", f"model.path={model}", f"trainer.run_dir={sft}"]
    megarl("sft", f"examples/sft_{name}_digits.py", *overrides)
    print(f"2/2 GRPO: the reward wants them ascending -> {grpo}", flush=True)
    overrides = [f"seed={seed}", f"model.path={sft / 'hf'}", f"trainer.run_dir={grpo}"]
    megarl("train", f"examples/grpo_{name}_digits.py", *overrides)
    steps = [json.loads(line) for line in (grpo / "metrics.jsonl").read_text().splitlines()]
    evaluated = [step for step in steps if ROWS[0][0] in step]
    before, after = evaluated[0], evaluated[-1]
    print(f"\nheld-out digits, greedy, seed {seed}: before -> after {after['step']} steps of GRPO")
    for key, meaning in ROWS:
        print(f"  {before[key]:.3f} -> {after[key]:.3f}  {meaning}")
    print(f"report: {grpo / 'report.html'}   ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
