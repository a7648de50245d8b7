"""The run in the terminal: the latest metrics and a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megarl.observability.numbers import format_number

# In a plain line, and first in the table; what a step does not report is left out.
HEADLINE = {
    "critic/score/mean": "score",
    "response_length/mean": "length",
    "actor/pg_loss": "loss",
    "train/loss": "loss",
    "train/token_accuracy": "token accuracy",
    "actor/entropy": "entropy",
    "actor/ppo_kl": "kl",
    "actor/grad_norm": "grad norm",
    "training/rollout_probs_diff_mean": "probs diff",
    "timing_s/step": "seconds",
}
FIRST = ("val-core/", "reward/")  # next in the table
MAX_ROWS = 28


class Console:
    """A live table and progress bar of a training loop; says nothing when not ``enabled``."""

    def __init__(self, total_steps: int, enabled: bool = True) -> None:
        self.total_steps = total_steps
        self._enabled = enabled
        self._started = time.monotonic()
        self._previous: dict[str, float] = {}
        self._evaluated: dict[str, float] = {}
        self._live: Live | None = None
        if enabled and sys.stdout.isatty():
            self._rich = RichConsole()
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._rich,
            )
            self._task = self._progress.add_task("step", total=total_steps)
            self._phase = self._progress.add_task("", visible=False)
            self._live = Live(self._progress, console=self._rich, refresh_per_second=2)
            self._live.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics of ``step``, the number of steps that are done."""
        if self._live is not None:
            self._progress.update(self._task, completed=step)
            self._evaluated |= {key: value for key, value in metrics.items() if key.startswith("val-core/")}
            metrics = self._evaluated | metrics  # the last evaluation stays in sight
            self._live.update(Group(self._table(metrics), self._progress))
            self._previous = metrics
        elif self._enabled:
            shown = [f"{label} {format_number(metrics[key])}" for key, label in HEADLINE.items() if key in metrics]
            shown += [f"{key} {format_number(metrics[key])}" for key in metrics if key.startswith("val-core/")]
            print(f"step {step}/{self.total_steps}  " + "  ".join(shown), flush=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` items of a phase of the step are finished; only the live view does."""
        if self._live is not None:
            self._progress.update(
                self._phase, description=phase, completed=done, total=total, visible=done < total, refresh=False
            )

    def message(self, text: str) -> None:
        """Print a line that stays above the live view."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(f"[{time.monotonic() - self._started:6.1f}s] {text}", flush=True)

    def close(self) -> None:
        """End the live view; the last table stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self, metrics: dict[str, float]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("metric", style="cyan", no_wrap=True)
        table.add_column("value", justify="right")
        table.add_column("change", justify="right", style="dim")
        keys = [key for key in HEADLINE if key in metrics]
        keys += sorted(metrics.keys() - HEADLINE.keys(), key=lambda key: (not key.startswith(FIRST), key))
        for key in keys[: min(MAX_ROWS, max(4, self._rich.height - 4))]:
            before = self._previous.get(key)
            change = "" if before is None else f"{metrics[key] - before:+.3g}"
            table.add_row(key, format_number(metrics[key]), change)
        return table
