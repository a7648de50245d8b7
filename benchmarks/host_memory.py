"""Host memory of a GRPO run over its steps, by role: it should be flat.

    python benchmarks/host_memory.py [STEPS] [key=value ...]

Trains examples/grpo_qwen_vl_digits.py and writes benchmarks/results/host_memory_<cores>_cores.{json,png}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from process_tree import run

RESULTS = Path(__file__).parent / "results"
WARM_UP = 20  # steps in which most is allocated


def main(arguments: list[str]) -> None:
    steps, overrides = int(arguments[0]) if arguments else 200, arguments[1:]
    directory = Path(tempfile.mkdtemp(prefix="megarl_memory_"))
    model = ["model.path=" + str(directory / "model"), "model.factory=examples/tiny_models.py:qwen2_5_vl"]
    command = [sys.executable, "-m", "megarl.cli", "train", "examples/grpo_qwen_vl_digits.py", *model]
    command += [f"trainer.run_dir={directory / 'run'}", f"trainer.num_steps={steps}", *overrides]
    samples = [s for s in run(command, directory / "run" / "metrics.jsonl") if 1 <= s.step < steps]
    last, warm = max(s.step for s in samples), min(WARM_UP, steps // 2)
    roles = sorted({role for sample in samples for role in sample.memory})
    rows = []
    for step in sorted({s.step for s in samples}):
        seen = [s.memory for s in samples if s.step == step]
        rows.append({"step": step} | {role: float(np.median([m.get(role, 0.0) for m in seen])) for role in roles})
    at, middle = np.array([row["step"] for row in rows]), last // 2
    growth = {}
    print(f"MB{'':12s}{'step 1':>9s}{f'step {last}':>9s}   growth a step: from step {warm}, from step {middle}")
    for name in [*roles, "all"]:
        values = np.array([sum(row[r] for r in roles) if name == "all" else row[name] for row in rows])
        growth[name] = {
            f"from_{first}": float(np.polyfit(at[at >= first], values[at >= first], 1)[0]) for first in (warm, middle)
        }
        print(f"{name:14s}{values[0]:9.0f}{values[-1]:9.0f}" + "".join(f"{g:+12.3f}" for g in growth[name].values()))
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"host_memory_{os.cpu_count()}_cores"
    stem.with_suffix(".json").write_text(
        json.dumps({"unit": "MB (PSS)", "growth_per_step": growth, "steps": rows}, indent=1) + "\n"
    )
    plot(rows, roles, stem.with_suffix(".png"))


def plot(rows: list[dict[str, float]], roles: list[str], path: Path) -> None:
    """Memory by role over steps, stacked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    order = sorted(roles, key=lambda role: -rows[-1][role])
    axes.stackplot([r["step"] for r in rows], [[r[role] / 1e3 for r in rows] for role in order], labels=order)
    axes.set(xlabel="step", ylabel="host memory (GB, PSS)", title="GRPO on digits, tp2 trainer and one engine")
    axes.margins(x=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
