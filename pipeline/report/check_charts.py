"""Charts of checks: the ratio in every process against the tolerances, ratios and times night by night."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from pipeline.nouns import Change, CheckRecord
from pipeline.report import numbers
from pipeline.report.drawing import INK, LIMIT, SERIES, SOFT, WIDTH, drawn, limit, short, stacked
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE, Outcome, Stage
from targets.harness.measurement import Interval, Session, percentile_bounds

LOOK: dict[Outcome, tuple[str, str]] = {
    "pass": ("o", "#009e73"), "improved": ("^", "#0072b2"), "warn": ("D", "#e69f00"), "fail": ("s", "#d55e00"),
    "undecided": ("o", "white"), "inconclusive": ("X", "#7a838c"),
}  # fmt: skip
"""Marker and colour of an outcome: shape and colour each tell it alone."""


@dataclass(frozen=True)
class _Row:
    """A line of the forest: a ratio with bounds in percent of change. pooled: over all processes of a stage."""

    label: str
    center: float
    low: float
    high: float
    pooled: bool


def percent(ratio: float) -> float:
    """A ratio as a change in percent."""
    return 100.0 * (ratio - 1.0)


def forest(record: CheckRecord, sessions: Sequence[Session], *, control: bool) -> str:
    """The ratio of every process with its bounds, and each stage's below; dashed: the tolerances of this check."""
    rows, span = _rows(record, sessions, control=control), _span(record, sessions, control=control)
    title = "Baseline again over baseline" if control else "Candidate over baseline"
    with drawn(title, (WIDTH, 1.0 + 0.17 * len(rows))) as (axes, out):
        for height, row in enumerate(rows):
            _branch(axes, height, row)
        axes.axvline(0.0, color=INK, linewidth=0.9)
        _tolerances(axes, record, control=control)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.pooled else "normal")
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=span, xlabel="change of latency, % (99 % bounds)")
        axes.grid(visible=False, axis="y")
    return out[0]


def _branch(axes: Axes, height: int, row: _Row) -> None:
    low, high = max(row.low, -1e3), min(row.high, 1e3)
    shade = SERIES[1] if row.pooled else SOFT
    axes.plot([low, high], [height, height], color=shade, linewidth=3 if row.pooled else 1, solid_capstyle="butt")
    axes.plot([row.center], [height], "D" if row.pooled else "s", color=shade, markersize=7 if row.pooled else 3.5)


def _tolerances(axes: Axes, record: CheckRecord, *, control: bool) -> None:
    spec = record.spec
    if control:
        limit(axes, 100 * spec.control, "control", horizontal=False, align="left", lift=12)
        limit(axes, percent(1 / (1 + spec.control)), "", horizontal=False)
        return
    limit(axes, 100 * spec.warn, "warn", horizontal=False, align="left")
    limit(axes, 100 * spec.fail, "fail", horizontal=False, align="left", lift=12)
    limit(axes, percent(1 / (1 + spec.warn)), "improved", horizontal=False, align="right", colour=SERIES[3])


def headings(record: CheckRecord, sessions: Sequence[Session]) -> list[str]:
    """What each session is called: its stage where they are one to one."""
    return [heading for heading, _ in _stages(record, sessions)]


def _stages(record: CheckRecord, sessions: Sequence[Session]) -> list[tuple[str, Stage | None]]:
    """A heading and the stage of each session; None where sessions and stages are not one to one."""
    own = record.verdict.stages
    if len(own) == len(sessions):
        return [(f"stage {stage.number}", stage) for stage in own]
    return [(f"session {index + 1}", None) for index in range(len(sessions))]


def _rows(record: CheckRecord, sessions: Sequence[Session], *, control: bool) -> list[_Row]:
    arm, rows = (AGAIN if control else CANDIDATE), []
    for session, (heading, stage) in zip(sessions, _stages(record, sessions), strict=True):
        ratios = session.process_ratios(arm, BASELINE)
        for index, (center, (low, high)) in enumerate(zip(ratios, _bounds(session, arm), strict=True)):
            rows.append(_Row(f"process {index + 1}", percent(center), percent(low), percent(high), False))
        whole = _whole(session, arm, stage, control=control)
        rows.append(_Row(heading, percent(whole.center), percent(whole.low), percent(whole.high), True))
    return rows


def _whole(session: Session, arm: str, stage: Stage | None, *, control: bool) -> Interval:
    if stage is None:
        return session.ratio(arm, BASELINE)
    return stage.control if control else stage.ratio


def _bounds(session: Session, arm: str) -> list[tuple[float, float]]:
    """Distribution-free 99 % bounds of the median over rounds of every process's ratio, from order statistics."""
    told = []
    pairs = zip(session.measurement(arm).processes, session.measurement(BASELINE).processes, strict=True)
    for one, two in pairs:
        usable = ~one.flagged & ~two.flagged
        usable = usable if bool(usable.any()) else np.ones_like(usable)
        millionths = np.rint(1e6 * one.medians_ns[usable] / two.medians_ns[usable]).astype(np.int64)
        told.append(percentile_bounds(millionths, 0.5))
    return told


def _span(record: CheckRecord, sessions: Sequence[Session], *, control: bool) -> tuple[float, float]:
    """Limits in percent: those of both forests, so that they compare, save where one would shrink the other's much."""
    own, other = (_reached(record, sessions, control=each) for each in (control, not control))
    low, high = min(own[0], other[0]), max(own[1], other[1])
    if high - low > 3.0 * (own[1] - own[0]):
        low, high = own
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _reached(record: CheckRecord, sessions: Sequence[Session], *, control: bool) -> tuple[float, float]:
    """What a forest has to hold: centres, bounds of stages, tolerances; bounds of processes up to 3x as far."""
    spec = record.spec
    held = [-100 * spec.control, 100 * spec.control] if control else [percent(1 / (1 + spec.fail)), 100 * spec.fail]
    wide: list[float] = []
    for row in _rows(record, sessions, control=control):
        ends = [each for each in (row.low, row.high) if math.isfinite(each) and each > -99.0]
        held += [row.center, *(ends if row.pooled else [])]
        wide += ends
    low, high = min(held), max(held)
    reach = high - low
    return max(min([*wide, low]), low - reach), min(max([*wide, high]), high + reach)


# --- nights ----------------------------------------------------------------------------------------------------------


def nights(records: Sequence[CheckRecord], page: int = 1) -> str:
    """The ratio that each check judged, with its bounds and the tolerance of that night; page: tells charts apart."""
    with drawn(f"Candidate over baseline, night by night ({page})", (WIDTH * 2, 3.2)) as (axes, out):
        seen = [(index, stage) for index, stage in enumerate(map(last, records)) if stage is not None]
        for index, stage in seen:
            _night(axes, index, stage.ratio, records[index].verdict.outcome)
        lost = [index for index, record in enumerate(records) if last(record) is None]
        axes.plot(lost, [0.03] * len(lost), "x", color=INK, transform=axes.get_xaxis_transform(), linestyle="none")
        edges = np.arange(len(records) + 1) - 0.5
        for name in ("warn", "fail"):
            heights = [100 * getattr(record.spec, name) for record in records]
            axes.stairs(heights, edges, baseline=None, color=LIMIT, linestyle=(0, (5, 3)), linewidth=1.2)
            axes.annotate(name, (edges[-1], heights[-1]), xytext=(3, 0), textcoords="offset points", va="center",
                          color=LIMIT, fontsize=8.5)  # fmt: skip
        axes.axhline(0.0, color=INK, linewidth=0.9)
        _legend(axes, records, lost=bool(lost))
        axes.set_ylim(*_reach(records))
        axes.set_ylabel("change of latency, %")
        _dates(axes, records)
    return out[0]


def last(record: CheckRecord) -> Stage | None:
    """The stage that decided, where its ratio is a number."""
    stages = record.verdict.stages
    return stages[-1] if stages and math.isfinite(stages[-1].ratio.center) else None


def _night(axes: Axes, index: int, ratio: Interval, outcome: Outcome) -> None:
    marker, face = LOOK[outcome]
    edge = SOFT if face == "white" else face
    low, high = max(percent(ratio.low), -100.0), min(percent(ratio.high), 1e4)
    axes.plot([index, index], [low, high], color=edge, linewidth=1.4)
    axes.plot([index], [percent(ratio.center)], marker, color=edge, markerfacecolor=face, markersize=7, zorder=3)


def _reach(records: Sequence[CheckRecord]) -> tuple[float, float]:
    """Limits in percent that hold every centre and tolerance; bounds up to three times as far."""
    held = [0.0, -0.5, *(100 * record.spec.fail for record in records)]
    wide: list[float] = []
    for stage in map(last, records):
        if stage is not None:
            held.append(percent(stage.ratio.center))
            wide += [percent(end) for end in (stage.ratio.low, stage.ratio.high) if math.isfinite(end) and end > 0]
    low, high = min(held), max(held)
    reach = high - low
    low, high = max(min([*wide, low]), low - reach), min(max([*wide, high]), high + reach)
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _legend(axes: Axes, records: Sequence[CheckRecord], *, lost: bool) -> None:
    there = {record.verdict.outcome for record in records}
    for outcome, (marker, face) in LOOK.items():
        if outcome in there:
            look = {"color": SOFT if face == "white" else face, "markerfacecolor": face}
            axes.plot([], [], marker, linestyle="none", label=outcome, **look)
    if lost:
        axes.plot([], [], "x", color=INK, linestyle="none", label="not measured")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=8.5, ncols=7)


def _dates(axes: Axes, records: Sequence[CheckRecord]) -> None:
    step = max(1, math.ceil(len(records) / 8))
    ticks = list(range(0, len(records), step))
    axes.set_xticks(ticks, [short(numbers.utc(records[index].started)[:10]) for index in ticks], fontsize=8.5)
    axes.set_xlim(-0.6, len(records) - 0.4)


def absolutes(
    records: Sequence[CheckRecord], changes: Sequence[Change], page: int = 1, moved: Sequence[int] = ()
) -> str:
    """p50 and p99 of the baseline arm of every night, with the change points found in them; page: as in `nights`.

    moved: places of the nights before which the device changed. The line breaks where another network became the
    baseline.
    """
    shown = [name for name in ("p50", "p99") if any(_at(record, name) is not None for record in records)]
    pins = [record.baseline.sha256 for record in records]
    breaks = [0, *(i for i in range(1, len(pins)) if pins[i] != pins[i - 1]), len(pins)]
    with stacked(f"Baseline, night by night ({page})", (WIDTH * 2, 0.6 + 1.5 * len(shown)), len(shown)) as (axes, out):
        for own, name in zip(axes, shown, strict=True):
            ms = [_at(record, name) for record in records]
            heights = [math.nan if value is None else value for value in ms]
            for start, end in pairwise(breaks):
                own.plot(range(start, end), heights[start:end], "o-", color=SOFT, markersize=4, linewidth=1)
            for start in breaks[1:-1]:
                _mark(own, start, "new baseline", 2)
            for start in moved:
                _mark(own, start, "device changed", 13)
            own.set_ylabel(f"{name}, ms")
            own.margins(y=0.15)
            for change in changes:
                if name in change.series or not any(other in change.series for other in shown):
                    _break(own, records, change)
        _dates(axes[-1], records)
    return out[0]


def _mark(axes: Axes, start: int, label: str, lift: int) -> None:
    """A line before a night, with what happened there in `lift` points above the axis."""
    axes.axvline(start - 0.5, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    place = {"xytext": (3, lift), "textcoords": "offset points", "va": "bottom", "fontsize": 8.5}
    axes.annotate(label, (start - 0.5, 0.0), xycoords=axes.get_xaxis_transform(), **place)


def _at(record: CheckRecord, name: str) -> float | None:
    value = record.absolute.get(BASELINE, {}).get(name)
    return value if value is not None and math.isfinite(value) else None


def _break(axes: Axes, records: Sequence[CheckRecord], change: Change) -> None:
    at = next((index for index, record in enumerate(records) if record.started >= change.at), None)
    if at is None or change.at < records[0].started:
        return  # after the last night that is shown, or before the first
    axes.axvline(at - 0.5, color=LIMIT, linewidth=1.2, linestyle=(0, (5, 3)))
    label = numbers.change(change.before_ms, change.after_ms)
    axes.annotate(label, (at - 0.5, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(3, -2), va="top",
                  textcoords="offset points", color=LIMIT, fontsize=8.5)  # fmt: skip
