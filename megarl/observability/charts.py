"""Charts as inline SVG: colours are CSS variables of the page, and the numbers ride along for its tooltip."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from html import escape

from megarl.observability.numbers import format_number

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 24
NUM_COLOURS = 8
Point = tuple[float, float]


@dataclass
class Series:
    """One line of a chart."""

    label: str
    points: list[Point]  # (step, value), steps ascending; values that are not finite are left out
    style: str = "line"  # line | faint (raw values behind a smoothed line) | dots (few points, joined)
    colour: int = field(default=-1)  # index of the page's palette; -1: by position in the chart

    def __post_init__(self) -> None:
        self.points = [(x, y) for x, y in self.points if math.isfinite(y)]


def smooth(points: list[Point]) -> list[Point]:
    """A centred moving average with Gaussian weights, as wide as a thirtieth of the points."""
    width = max(len(points) / 30, 1.0)
    reach = math.ceil(3 * width)
    weights = [math.exp(-0.5 * (k / width) ** 2) for k in range(reach + 1)]
    result = []
    for index, (x, _) in enumerate(points):
        near = range(max(0, index - reach), min(len(points), index + reach + 1))
        total = sum(weights[abs(k - index)] for k in near)
        result.append((x, sum(weights[abs(k - index)] * points[k][1] for k in near) / total))
    return result


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round values that lie in [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


@dataclass
class _Axes:
    """From data to the picture."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool = False

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = (math.log10(self.y0), math.log10(self.y1)) if self.log else (self.y0, self.y1)
        value = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        parts = []
        if self.log:
            first, last = math.ceil(math.log10(self.y0) - 1e-9), math.floor(math.log10(self.y1) + 1e-9)
            ticks = [10.0**k for k in range(first, last + 1, max(1, (last - first) // 4))]
        else:
            ticks = nice_ticks(self.y0, self.y1)
        for tick in ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{format_number(tick)}</text>')
        for tick in nice_ticks(self.x0, self.x1, 5):
            if tick == int(tick):
                parts.append(
                    f'<text x="{self.x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{format_number(tick)}</text>'
                )
        return "".join(parts)


def _limits(values: list[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    if 0 < low < 0.4 * high:
        low = 0.0
    margin = 0.06 * (high - low)
    return (low - margin if low != 0 else 0.0), high + margin


def _figure(svg: str, axes: _Axes, series: list[Series]) -> str:
    """Wrap a chart with its legend and the numbers that the page's tooltip shows."""
    steps = sorted({step for line in series for step, _ in line.points})
    lines = []
    for line in series:
        values = dict(line.points)
        shown = [format_number(values[step]) if step in values else "" for step in steps]
        lines.append({"label": line.label, "colour": line.colour, "values": shown})
    data = {"steps": [format_number(step) for step in steps], "at": [round(axes.x(step), 1) for step in steps]}
    legend = "".join(
        f'<span><i class="{line.style}" style="background:var(--c{line.colour})"></i>{escape(line.label)}</span>'
        for line in series
    )
    return (
        f'<div class="chart" data-chart="{escape(json.dumps(data | {"lines": lines}))}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{axes.grid()}{svg}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<div class="legend">{legend}</div></div>'
    )


def line_chart(series: list[Series], *, log: bool = False) -> str:
    """Lines over steps, or an empty string when there is not one finite value; ``log`` needs positive values."""
    series = [line for line in series if line.points]
    if not series:
        return ""
    for index, line in enumerate(series):
        line.colour = line.colour if line.colour >= 0 else index % NUM_COLOURS
    values = [y for line in series for _, y in line.points]
    steps = [x for line in series for x, _ in line.points]
    log = log and min(values) > 0
    x0, x1 = min(steps), max(steps)
    axes = _Axes(*((x0, x1) if x1 > x0 else (x0 - 1, x1 + 1)), *_limits(values, log), log=log)
    parts = []
    for line in series:
        at = [(axes.x(x), axes.y(y)) for x, y in line.points]
        colour = f"var(--c{line.colour})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        if len(at) > 1:
            kind = "faint" if line.style == "faint" else "line"
            parts.append(f'<polyline class="{kind}" style="stroke:{colour}" points="{path}"/>')
        if line.style == "dots" or len(at) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>' for x, y in at]
    return _figure("".join(parts), axes, series)


def stacked_bars(series: list[Series], *, num_bars: int = 60) -> str:
    """Values of each step stacked on one another; more steps than ``num_bars`` are averaged by neighbours."""
    series = sorted((line for line in series if line.points), key=lambda line: -sum(y for _, y in line.points))
    if not series:
        return ""
    if len(series) > NUM_COLOURS:
        head, tail = series[: NUM_COLOURS - 1], series[NUM_COLOURS - 1 :]
        rest: dict[float, float] = {}
        for line in tail:
            for x, y in line.points:
                rest[x] = rest.get(x, 0.0) + y
        series = [*head, Series("other", sorted(rest.items()))]
    steps = sorted({x for line in series for x, _ in line.points})
    width = math.ceil(len(steps) / num_bars)
    bins = [steps[i : i + width] for i in range(0, len(steps), width)]
    by_label = {line.label: dict(line.points) for line in series}
    means = {
        label: {group[0]: sum(values.get(step, 0.0) for step in group) / len(group) for group in bins}
        for label, values in by_label.items()
    }
    highest = max(sum(means[label][group[0]] for label in means) for group in bins)
    gap = bins[1][0] - bins[0][0] if len(bins) > 1 else 1.0
    axes = _Axes(bins[0][0] - gap / 2, bins[-1][0] + gap / 2, 0.0, highest * 1.06 or 1.0)
    bar = (WIDTH - LEFT - RIGHT) / ((axes.x1 - axes.x0) / gap) * 0.86
    bar = min(bar, 48.0)
    parts = []
    for group in bins:
        base = 0.0
        for colour, label in enumerate(means):
            value = means[label][group[0]]
            top, bottom = axes.y(base + value), axes.y(base)
            left = axes.x(group[0]) - bar / 2
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{bar:.1f}" height="{max(bottom - top, 0):.1f}" '
                f'style="fill:var(--c{colour})"/>'
            )
            base += value
    shown = [Series(label, sorted(values.items()), colour=i) for i, (label, values) in enumerate(means.items())]
    return _figure("".join(parts), axes, shown)
