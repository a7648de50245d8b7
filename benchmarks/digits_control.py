"""What does GRPO teach on the digits task that the same CPU time of more supervised training does not?

    python benchmarks/digits_control.py [SEED]

Trains the demo's cold start, then continues it twice, for the same CPU seconds of all processes: by GRPO and by more
of the cold start. Held-out accuracies go to benchmarks/results/digits_control_seed<SEED>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from process_tree import Sample, run, training_cpu

RESULTS = Path(__file__).parent / "results"
SFT, GRPO = "examples/sft_qwen_vl_digits.py", "examples/grpo_qwen_vl_digits.py"
COLUMNS = {
    "list, ascending": "val-core/digits_list/score/mean@1",
    "list, any order": "val-aux/digits_list/right_digits/mean@1",
    "sum": "val-core/digits_sum/score/mean@1",
}


def megarl(command: str, experiment: str, directory: Path, *overrides: str) -> list[Sample]:
    """Run a command of megarl's in ``directory``."""
    arguments = [sys.executable, "-m", "megarl.cli", command, experiment, f"trainer.run_dir={directory}", *overrides]
    return run(arguments, directory / "metrics.jsonl")


def rows(directory: Path) -> list[dict[str, float]]:
    """The log of a run."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def accuracies(row: dict[str, float]) -> dict[str, float]:
    return {name: row[key] for name, key in COLUMNS.items()}


def main(seed: int) -> None:
    base = Path("runs") / f"control_seed{seed}"
    shutil.rmtree(base, ignore_errors=True)
    cold, grpo, more = base / "cold_start", base / "grpo", base / "more_sft"
    start = [f"seed={seed}", f"model.path={base / 'model'}"]
    samples = megarl("sft", SFT, cold, *start)
    cold_steps = rows(cold)[-1]["step"]
    cpu_per_sft_step = training_cpu(samples, 0, cold_steps - 1) / (cold_steps - 1)

    samples = megarl("train", GRPO, grpo, f"seed={seed}", f"model.path={cold / 'hf'}", "trainer.eval_every=0")
    grpo_steps = rows(grpo)[-1]["step"]
    budget = training_cpu(samples, 0, grpo_steps - 1) * grpo_steps / (grpo_steps - 1)

    steps = round(budget / cpu_per_sft_step)
    shutil.copytree(cold, more)  # its checkpoint: the optimizer and the place in the data go on
    megarl("sft", SFT, more, *start, f"trainer.num_steps={cold_steps + steps}")
    megarl("eval", GRPO, more, f"seed={seed}", f"model.path={more / 'hf'}", "trainer.resume=never")

    table = {
        f"cold start, {cold_steps} SFT steps": accuracies(rows(grpo)[0]),
        f"+ {grpo_steps} GRPO steps": accuracies(rows(grpo)[-1]),
        f"+ {steps} SFT steps, same CPU time": accuracies(rows(more / "eval")[-1]),
    }
    print(f"\nheld-out accuracy, greedy, seed {seed}; {budget:.0f} CPU seconds each")
    print(f"{'':36s}" + "".join(f"{name:>18s}" for name in COLUMNS))
    for name, values in table.items():
        print(f"{name:36s}" + "".join(f"{value:18.3f}" for value in values.values()))
    RESULTS.mkdir(exist_ok=True)
    result = {"seed": seed, "cores": os.cpu_count(), "cpu_seconds": budget, "held_out_accuracy": table}
    (RESULTS / f"digits_control_seed{seed}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
