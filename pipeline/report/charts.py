"""Charts of a build's report as inline SVG, drawn on `pipeline.report.drawing`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pipeline.report.data import Distribution, PointRow, ReportData, RoundRow
from pipeline.report.drawing import INK, SERIES, drawn, limit, short

DENSE, PRUNED = SERIES[:2]


def rounds(data: ReportData) -> str:
    """Predicted against measured latency for every round, with the budget as a line."""
    with drawn("Predicted and measured latency of every round", (5.2, 3.1)) as (axes, out):
        numbers = [row.number for row in data.rounds]
        predicted, spread = [row.predicted_ms for row in data.rounds], [row.spread_ms for row in data.rounds]
        look = {"capsize": 3, "markersize": 6}
        before = [number - 0.08 for number in numbers]
        axes.errorbar(before, predicted, spread, fmt="D", color=DENSE, mfc="white", label="predicted", **look)
        measured = [row for row in data.rounds if row.measured_ms is not None]
        after, heights = [row.number + 0.08 for row in measured], [row.measured_ms or 0.0 for row in measured]
        axes.errorbar(after, heights, _around(measured), fmt="o", color=PRUNED, label="measured", **look)
        limit(axes, data.budget_ms, "budget", horizontal=True)
        axes.set(xlabel="round", ylabel="ms", xticks=numbers, xlim=(min(numbers) - 0.5, max(numbers) + 0.5))
        axes.margins(y=0.18)
        axes.legend(frameon=False, loc="best", fontsize=9)
    return out[0]


def _around(measured: Sequence[RoundRow]) -> list[list[float]]:
    lower, upper = [], []
    for row in measured:
        centre = row.measured_ms or 0.0
        low, high = row.interval_ms or (centre, centre)
        lower.append(max(0.0, centre - low))
        upper.append(max(0.0, high - centre) if np.isfinite(high) else 0.0)
    return [lower, upper]


def points(data: ReportData, *, loss: bool) -> str:
    """Networks that were tried: latency against accuracy, or against the loss where only that is known."""
    rows = [row for row in data.points if (row.loss if loss else row.accuracy) is not None]
    title = f"Latency and {data.loss_name if loss else 'accuracy'} of every network tried"
    with drawn(title, (5.2, 3.1)) as (axes, out):
        floor = -np.inf if loss else _floor(data, rows)
        middle = float(np.mean([min(row.latency_ms for row in rows), max(row.latency_ms for row in rows)]))
        for row in rows:
            _point(axes, row, float((row.loss if loss else row.accuracy) or 0.0), floor, left=row.latency_ms > middle)
        limit(axes, data.budget_ms, "budget", horizontal=False)
        if not loss and data.max_drop is not None and data.dense.accuracy is not None:
            limit(axes, data.dense.accuracy - data.max_drop, "lowest agreed", horizontal=True)
        axes.set(xlabel=f"{data.percentile} latency, ms", ylabel=data.loss_name if loss else short(data.metric))
        axes.margins(0.16)
    return out[0]


def _floor(data: ReportData, rows: Sequence[PointRow]) -> float:
    """The lowest accuracy drawn to scale, so that a ruined network does not flatten all others into one line."""
    best = max(row.accuracy or 0.0 for row in rows)
    shipped = [row.accuracy for row in rows if row.shipped and row.accuracy is not None]
    return best - 4.0 * max(best - min(shipped, default=best), data.max_drop or 0.0, 0.005 * abs(best))


def _point(axes: Axes, row: PointRow, height: float, floor: float, *, left: bool) -> None:
    below = height < floor
    marker, size, face = ("*", 170, PRUNED) if row.shipped else ("v" if below else "o", 42, "white")
    label = f"{short(row.label)}: {height:.3g}" if below else short(row.label)
    height = max(height, floor)
    axes.scatter([row.latency_ms], [height], marker=marker, s=size, facecolor=face, edgecolor=PRUNED, zorder=3)
    place = {"xytext": (-8, 0), "ha": "right"} if left else {"xytext": (9, 0), "ha": "left"}
    look = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
    text = axes.annotate(label, (row.latency_ms, height), **look, **place)
    text.set_in_layout(False)


def distributions(data: ReportData) -> str:
    """How the latencies of the accepting session are distributed: the first network and the last, on one axis."""
    there = [row for row in data.distributions if row.samples_ms]
    shown = [there[0], there[-1]] if len(there) > 1 else there
    with drawn("Latencies of the accepting session", (5.2, 3.1)) as (axes, out):
        budget = () if data.budget_ms is None else (data.budget_ms,)
        top = max([*budget, *(_tail(row.samples_ms) for row in shown)])
        bottom = min([*budget, *(float(np.min(row.samples_ms)) for row in shown)])
        edges = np.linspace(bottom * 0.95, top * 1.05, 90)
        for row, colour in zip(shown, (DENSE, PRUNED), strict=False):
            _hill(axes, row, edges, colour)
        limit(axes, data.budget_ms, "budget", horizontal=False)
        axes.set(xlabel="ms of one inference", ylabel="share of inferences", xlim=(edges[0], edges[-1]), yticks=[])
        axes.legend(frameon=False, loc="best", fontsize=9)
    return out[0]


def _tail(samples_ms: Sequence[float]) -> float:
    """Where the axis may end: the 99th percentile, or twice the median where a few disturbed inferences lie far out."""
    return float(min(np.quantile(samples_ms, 0.99), 2.0 * np.median(samples_ms)))


def _hill(axes: Axes, row: Distribution, edges: NDArray[np.float64], colour: str) -> None:
    heights, _ = np.histogram(row.samples_ms, edges)
    axes.stairs(heights / max(1, len(row.samples_ms)), edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(heights / max(1, len(row.samples_ms)), edges, color=colour, label=short(row.name))


def processes(data: ReportData) -> str:
    """The latency ratio in every fresh process, the interval of their mean, and the budget where it is relative."""
    with drawn("Measured / dense, one point a process", (5.2, 1.9)) as (axes, out):
        ratios = data.process_ratios
        axes.scatter(ratios, np.linspace(0.75, 1.25, len(ratios)), color=PRUNED, s=28, zorder=3)
        if data.ratio is not None and data.ratio_interval is not None:
            low, high = data.ratio_interval
            span = [low, min(high, max(ratios) * 1.1)]
            axes.plot(span, [0.45, 0.45], color=INK, linewidth=2.5, solid_capstyle="butt")
            axes.scatter([data.ratio], [0.45], marker="|", s=120, color=INK)
            place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 8.5}
            axes.annotate("99 % bounds", (data.ratio, 0.45), **place)
        if data.budget.partition("@")[0].endswith("x"):
            limit(axes, float(data.budget.partition("@")[0][:-1]), "budget", horizontal=False)
        axes.set(xlabel="latency ratio", ylim=(0.1, 1.45), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.12)
    return out[0]
