"""A run as one page: curves, and rollouts with the images that the policy saw. Everything is inside the file."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure
from PIL import Image

import megarl
from megarl.observability.charts import Series, line_chart, smooth, stacked_bars
from megarl.observability.numbers import format_number
from megarl.observability.rollouts import read_rollouts, rollout_steps
from megarl.observability.tracker import METRICS_FILE, read_metrics

Row = dict[str, float]

MAX_GROUPS = 4  # of a step
MAX_RESPONSES = 8  # of a group
SMALL_IMAGE = 128  # pixels; smaller images are enlarged without smoothing
LARGE_IMAGE_BYTES = 200_000  # a larger one is shown as a JPEG of at most 768 pixels
SMOOTH_FROM = 24  # points

PACKAGES = ["torch", "megatron-core", "sglang", "ray", "transformers"]

# What a reader wants to know about a run before its curves.
SUMMARY_KEYS = [
    "model.path",
    "model.dtype",
    "parallel.tensor_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "trainer.num_nodes",
    "data.prompts_per_step",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.max_new_tokens",
    "algorithm.advantage",
    "algorithm.policy_loss",
    "algorithm.kl_coef",
    "optimizer.lr",
    "weight_sync.transport",
    "seed",
]


@dataclass
class Panel:
    """One chart of the page; ``keys`` are metrics with their labels, those that no step reported are left out."""

    title: str
    keys: dict[str, str]
    note: str = ""
    log: bool = False
    smoothed: bool = False
    dots: bool = False


PANELS = [
    Panel("Reward", {"critic/score/mean": "mean score"}, "of the step's rollouts", smoothed=True),
    Panel("Response length", {"response_length/mean": "mean", "response_length/max": "longest"}, "tokens"),
    Panel(
        "KL",
        {
            "actor/ppo_kl": "to the step's start",
            "actor/kl_loss": "to the reference",
            "actor/reward_kl_penalty": "to the reference",
        },
        "nats a token",
    ),
    Panel("Entropy", {"actor/entropy": "entropy"}, "nats a token"),
    Panel("Gradient norm", {"actor/grad_norm": "before clipping"}, smoothed=True),
    Panel("Policy loss", {"actor/pg_loss": "loss"}),
    Panel("Loss", {"train/loss": "trained on", "val-core/loss": "held out"}, "nats a token"),
    Panel("Token accuracy", {"train/token_accuracy": "trained on", "val-core/token_accuracy": "held out"}, "share"),
    Panel("Critic", {"critic/vf_explained_var": "explained variance of the returns"}, smoothed=True),
    Panel("Clipped", {"actor/pg_clipfrac": "ratio clipped", "response_length/clip_ratio": "responses cut"}, "share"),
    Panel(
        "Experts' answers",
        {
            "expert/actions_fraction": "of all actions",
            "expert/groups_gated": "groups that imitate",
            "expert/hint_bound": "longest hint, of an answer",
        },
        "share",
    ),
    Panel("Imitation", {"expert/nll": "cross entropy of experts' actions"}, "nats a token", smoothed=True),
    Panel("Throughput", {"perf/throughput": "tokens a second and rank"}, smoothed=True),
]


def points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """The (step, value) pairs of the rows that report ``key``."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _lines(rows: list[Row], panel: Panel) -> list[Series]:
    lines = []
    for index, (key, label) in enumerate(panel.keys.items()):
        values = points(rows, key)
        if panel.smoothed and len(values) >= SMOOTH_FROM:
            lines.append(Series(label, values, "faint", index))
            lines.append(Series(f"{label}, smoothed", smooth(Series("", values).points), "line", index))
        else:
            lines.append(Series(label, values, "dots" if panel.dots else "line", index))
    return lines


def _keys(rows: list[Row], *prefixes: str) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith(prefixes)})


def make_charts(rows: list[Row]) -> list[dict[str, str]]:
    """Title, note and SVG of every chart that has data."""
    held_out = Panel(
        "Held out", {key: key.partition("/")[2] for key in _keys(rows, "val-core/")}, "never trained on", dots=True
    )
    difference = {
        key: key.removeprefix("training/rollout_").removesuffix("_mean").replace("_", " ")
        for key in _keys(rows, "training/rollout_", "sync/canary")
        if key.endswith(("_mean", "_max", "_abs_diff"))
    }
    engine = Panel("Rollout against trainer", difference, "difference of the two sides, logarithmic", log=True)
    panels = [PANELS[0], held_out, *PANELS[1:5], engine, *PANELS[5:]]
    charts = [
        {"title": panel.title, "note": panel.note, "svg": line_chart(_lines(rows, panel), log=panel.log)}
        for panel in panels
    ]
    phases = [key for key in _keys(rows, "timing_s/") if key != "timing_s/step"]
    timing = stacked_bars([Series(key.partition("/")[2], points(rows, key)) for key in phases])
    charts.append({"title": "Time of a step", "note": "seconds by phase", "svg": timing})
    return [chart for chart in charts if chart["svg"]]


def _edges(values: list[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth."""
    size = max(1, len(values) // 10)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def make_tiles(rows: list[Row]) -> list[dict[str, str]]:
    """The run in a few numbers: label, value, and the value before training where there is one."""
    if not rows:
        return []
    tiles = [{"label": "steps", "value": format_number(rows[-1]["step"]), "before": ""}]
    if scores := [y for _, y in points(rows, "critic/score/mean")]:
        first, last = _edges(scores)
        before = f"{first:.3g}" if len(scores) > 1 else ""
        tiles.append({"label": "reward", "value": f"{last:.3g}", "before": before})
    for key in _keys(rows, "val-core/"):
        values = points(rows, key)
        before = f"{values[0][1]:.3g}" if len(values) > 1 else ""
        tiles.append({"label": f"held out: {key.partition('/')[2]}", "value": f"{values[-1][1]:.3g}", "before": before})
    if seconds := [y for _, y in points(rows, "timing_s/step")]:
        total = sum(seconds)
        text = f"{total / 3600:.1f} h" if total > 5400 else f"{total / 60:.1f} min" if total > 90 else f"{total:.0f} s"
        tiles.append({"label": f"time, {sum(seconds) / len(seconds):.3g} s a step", "value": text, "before": ""})
    if differences := [y for _, y in points(rows, "training/rollout_probs_diff_max")]:
        tiles.append({"label": "largest rollout-trainer difference", "value": f"{max(differences):.1e}", "before": ""})
    return tiles


def make_table(rows: list[Row]) -> list[list[str]]:
    """Every metric: name, first, last, lowest, highest."""
    table = []
    for key in _keys(rows, ""):
        values = [y for _, y in points(rows, key)]
        if key != "step" and values:
            table.append([key, *map(format_number, (values[0], values[-1], min(values), max(values)))])
    return table


def _image(path: Path) -> dict[str, Any] | None:
    """An image as a data URL with its size; None when the file is not there."""
    if not path.exists():
        return None
    data, kind = path.read_bytes(), path.suffix.removeprefix(".").replace("jpg", "jpeg")
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if len(data) > LARGE_IMAGE_BYTES:
            image.thumbnail((768, 768))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
            data, kind = buffer.getvalue(), "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"url": url, "width": width, "height": height, "small": max(width, height) <= SMALL_IMAGE}


def _printable(text: str) -> str:
    """Control characters, which a small policy does write, made visible."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _groups(rows: list[dict[str, Any]], images: Path) -> list[dict[str, Any]]:
    """The samples of a step by their prompt, the best first."""
    by_group: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_group.setdefault(row["group_id"], []).append(row)
    groups = []
    for samples in list(by_group.values())[:MAX_GROUPS]:
        samples.sort(key=lambda sample: -sample["reward"])
        first = samples[0]
        shown = [{**sample, "response": _printable(sample["response"])} for sample in samples[:MAX_RESPONSES]]
        groups.append(
            {
                "prompt_id": first["prompt_id"],
                "messages": first["messages"],
                "answer": first["answer"],
                "images": [image for image in (_image(images / name) for name in first["images"]) if image],
                "mean": sum(sample["reward"] for sample in samples) / len(samples),
                "samples": shown,
                "hidden": len(samples) - len(shown),
            }
        )
    return groups


def make_rollouts(run_dir: Path) -> list[dict[str, Any]]:
    """The first, the middle and the last step whose rollouts were saved, of those in the log."""
    files, (rows, _) = rollout_steps(run_dir), read_metrics(run_dir / METRICS_FILE)
    last = max((row["step"] for row in rows), default=0)
    steps = [step for step in files if step <= last]  # of later ones the run has gone on from before
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [{"step": s, "groups": _groups(read_rollouts(files[s]), run_dir / "rollouts" / "images")} for s in chosen]


def _versions() -> dict[str, str]:
    found = {"megarl": megarl.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _summary(config: dict[str, Any]) -> dict[str, str]:
    summary = {}
    for key in SUMMARY_KEYS:
        section, _, name = key.rpartition(".")
        values = config.get(section, {}) if section else config
        if name in values and values[name] != "":
            summary[key] = str(values[name])
    if config.get("tasks"):
        summary["tasks"] = ", ".join(config["tasks"])
    return summary


def write_reward_curve(rows: list[Row], path: Path) -> None:
    """Draw the mean score over steps, and what was held out, as a PNG."""
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    scores = Series("", points(rows, "critic/score/mean")).points
    if scores:
        smoothed = len(scores) >= SMOOTH_FROM
        axes.plot(*zip(*scores, strict=True), color="#4263eb", alpha=0.3 if smoothed else 1, label="mean score")
        if smoothed:
            axes.plot(*zip(*smooth(scores), strict=True), color="#4263eb", linewidth=2, label="smoothed")
    for colour, key in zip(["#f08c00", "#0ca678", "#e64980"], _keys(rows, "val-core/"), strict=False):
        held_out = points(rows, key)
        axes.plot(*zip(*held_out, strict=True), "o--", color=colour, label=f"held out: {key.partition('/')[2]}")
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and ``reward.png`` from what the run has left so far; return the page's path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run directory")
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise FileNotFoundError(f"{run_dir}: not a run directory: it has no config.yaml")
    rows, unreadable = read_metrics(run_dir / METRICS_FILE)
    config_text = config_file.read_text()
    config = yaml.safe_load(config_text) or {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = format_number
    page = environment.get_template("report.html").render(
        name=config.get("name", run_dir.name),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        versions=_versions(),
        summary=_summary(config),
        config_text=config_text,
        unreadable=unreadable,
        tiles=make_tiles(rows),
        charts=make_charts(rows),
        rollouts=make_rollouts(run_dir),
        table=make_table(rows),
    )
    path = run_dir / "report.html"
    path.write_text(page)
    write_reward_curve(rows, run_dir / "reward.png")
    return path
