"""A measuring session and the state of a device, as a table for people and as plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.report import numbers
from targets.harness.device import Condition
from targets.harness.measurement import Measurement, Session, Statistic

STATISTICS: tuple[Statistic, ...] = ("p50", "mean", "p90", "p99")


def session_table(session: Session) -> Table:
    """One line a network: percentiles, and the ratio to the first network with its 99 % bounds."""
    first = next(iter(session.measurements))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("model", "p50", "99 % bounds", "mean", "p90", "p99", f"ratio to {first}", "99 % bounds"):
        table.add_column(escape(column), justify="left" if column == "model" else "right")
    for name, measured in session.measurements.items():
        table.add_row(escape(name), *_cells(measured), *_ratio(session, name, first))
    return table


def _cells(measured: Measurement) -> list[str]:
    p50 = measured.p50
    tails = [measured.p90.value_ms, measured.p99.value_ms]
    told = ["too few samples" if value is None else numbers.ms(value) for value in tails]
    return [numbers.ms(p50.value_ms), numbers.bounds((p50.low_ms, p50.high_ms)), numbers.ms(measured.mean_ms), *told]


def _ratio(session: Session, name: str, first: str) -> list[str]:
    ratio = session.ratio(name, first)
    return [numbers.ratio(ratio.center), "" if name == first else numbers.bounds((ratio.low, ratio.high), "x")]


def session_json(session: Session) -> dict[str, Any]:
    """The same as plain data; None stands for a bound or percentile that the samples do not allow."""
    first = next(iter(session.measurements))
    return {
        "models": {name: _model(session, name, first) for name in session.measurements},
        "reference": first,
        "contaminated": session.contaminated,
        "device": session.fingerprint.to_table(),
    }


def _model(session: Session, name: str, first: str) -> dict[str, Any]:
    measured, ratio = session.measurement(name), session.ratio(name, first)
    told: dict[str, Any] = {"sha256": measured.sha256, "inferences": int(measured.pooled_ns.size)}
    told["ratio"] = ratio.center
    told["ratio_bounds"] = [_finite(ratio.low), _finite(ratio.high)]
    for statistic in STATISTICS:
        at = measured.statistic(statistic)
        told[f"{statistic}_ms"] = _finite(at.value_ms)
        told[f"{statistic}_ms_bounds"] = [_finite(at.low_ms), _finite(at.high_ms)]
    return told


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def conditions_table(conditions: Iterable[Condition]) -> Table:
    """One line a condition: ok, worth knowing, or reason to stop, with what to do."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    for condition in conditions:
        mark = "[green]ok[/]" if condition.ok else "[red]stop[/]" if condition.fatal else "[yellow]note[/]"
        why = "" if condition.ok else f"{condition.why}: {condition.mend}"
        table.add_row(mark, escape(condition.name), escape(condition.value), escape(why))
    return table
