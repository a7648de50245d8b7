"""Metrics of a run: ``metrics.jsonl`` (one line a step), TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.config import RunConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> tuple[list[dict[str, float]], int]:
    """Return the rows of a ``metrics.jsonl`` by ascending step, and how many lines could not be read.

    A process that was killed leaves half a line; a step that was run again replaces the earlier row.
    """
    rows: dict[int, dict[str, float]] = {}
    unreadable = 0
    path = Path(path)
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return [rows[step] for step in sorted(rows)], unreadable


class Tracker:
    """Writes each step's metrics to the trackers that ``observability.trackers`` names."""

    def __init__(self, run_dir: str | Path, config: RunConfig) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self.run_dir / METRICS_FILE
        self._config = config
        self._last_step: int | None = None
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        trackers = config.observability.trackers
        self._jsonl = "jsonl" in trackers
        self._wants_tensorboard = "tensorboard" in trackers
        if self._jsonl and self._path.exists():
            self._rewrite(read_metrics(self._path)[0])
        if "wandb" in trackers:
            self._wandb = self._start_wandb()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` of ``step``; values are numbers or tensors of one element."""
        row = {}
        for key, value in metrics.items():
            try:
                row[key] = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"metric {key}={value!r} of step {step} is not a number") from error
        if self._jsonl:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        if self._wants_tensorboard:
            writer = self._open_tensorboard(step)
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()
        if self._wandb is not None:
            self._wandb.log({"training/global_step": step, **row})
        self._last_step = step

    def truncate(self, step: int) -> None:
        """Forget everything after ``step``, from which the run goes on; call it before the first ``log``."""
        if self._last_step is not None:
            raise RuntimeError("truncate comes before the first log")
        if self._jsonl and self._path.exists():
            self._rewrite([row for row in read_metrics(self._path)[0] if row["step"] <= step])

    def close(self) -> None:
        """Flush and end every tracker."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        partial = self._path.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, self._path)

    def _open_tensorboard(self, first_step: int) -> SummaryWriter:
        """The writer, made with the first step it gets: TensorBoard then hides what an earlier try wrote after it."""
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, and only where it is used

            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first_step)
        return self._tensorboard

    def _start_wandb(self) -> Any:
        """A run whose id lives in the run directory, so that a resumed process continues it; WANDB_MODE is honoured."""
        import wandb  # optional: only when observability.trackers names it

        id_file = self.run_dir / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        run = wandb.init(
            project=self._config.observability.project,
            name=self._config.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(self.run_dir),
            config=dataclasses.asdict(self._config),
        )
        # Steps are a metric, not wandb's own counter: that one refuses to go back when a run resumes from a checkpoint.
        run.define_metric("training/global_step")
        run.define_metric("*", step_metric="training/global_step")
        return run
