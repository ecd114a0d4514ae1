"""A measuring session and the state of a device, as tables for people and as plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report import numbers
from pipeline.report.escape import printable
from pipeline.report.grid import Grid
from targets.harness.device import Condition
from targets.harness.measurement import STATISTICS, Measurement, Percentile, Session

GPU = "GPU "
"""Before the name of a statistic: of the time between CUDA events."""


def show_session(session: Session, console: Console) -> None:
    """Print a line a network, every statistic with its bounds, what was not in order, and how it was measured."""
    console.print(session_table(session), highlight=False)
    console.print()
    console.print(statistics_table(session), highlight=False)
    for sentence in unstable(session):
        console.print()
        console.print(Text(printable(sentence), style="yellow"), soft_wrap=True)
    if session.preflight.spoilt:
        console.print()
        console.print(conditions_table(session.preflight.spoilt), highlight=False)
    console.print()
    console.print(Text(printable(protocol(session))), soft_wrap=True)


def session_table(session: Session) -> Table:
    """One line a network: statistics, spread of processes, deadline misses when paced, ratio to the first network."""
    return overview(session).table()


def statistics_table(session: Session) -> Table:
    """One line a statistic: its value with bounds, or why there is none."""
    return statistics(session).table()


def overview(session: Session) -> Grid:
    """Cells of `session_table`."""
    first = next(iter(session.measurements))
    paced = any(m.deadline_misses is not None for m in session.measurements.values())
    heat = any(m.drift is not None for m in session.measurements.values())
    gpu = any(m.on_gpu is not None for m in session.measurements.values())
    rows = []
    for name, measured in session.measurements.items():
        cells = [_value(measured.statistic(statistic)) for statistic in STATISTICS]
        cells += [_value(measured.on_gpu.p50) if measured.on_gpu else "–"] if gpu else []
        cells.append(spread(measured))
        cells += [misses(measured)] if paced else []
        cells += [numbers.change(1.0, measured.drift)] if heat else []
        ratio = session.ratio(name, first)
        bounds = "" if name == first else numbers.bounds((ratio.low, ratio.high), "x")
        rows.append((name, *cells, numbers.ratio(ratio.center), bounds))
    more = [*(["missed"] if paced else []), *(["drift"] if heat else [])]
    head = ("model", *STATISTICS, *([GPU + "p50"] if gpu else []), "spread", *more, f"ratio to {first}", "99 % bounds")
    return Grid("Overview", head, tuple(rows))


def statistics(session: Session) -> Grid:
    """Cells of `statistics_table`."""
    rows = []
    for name, measured in session.measurements.items():
        told: dict[str, Percentile] = {statistic: measured.statistic(statistic) for statistic in STATISTICS}
        if measured.on_gpu:
            told |= {GPU + statistic: measured.on_gpu.statistic(statistic) for statistic in STATISTICS}
        for index, (label, at) in enumerate(told.items()):
            bounds = numbers.bounds((at.low_ms, at.high_ms))
            rows.append(("" if index else name, label, _value(at), bounds, at.reason))
    head = ("model", "statistic", "value", "99 % bounds", "why there is no value")
    return Grid("Statistics", head, tuple(rows), text=(0, 1, 4))


def _value(at: Percentile) -> str:
    return "too few samples" if at.value_ms is None else numbers.ms(at.value_ms)


def spread(measured: Measurement) -> str:
    """Process-to-process spread in percent; a single process shows none."""
    return numbers.share(measured.spread) if len(measured.processes) > 1 else "one process"


def misses(measured: Measurement) -> str:
    """Deadlines missed, of how many, when paced."""
    counted = measured.deadline_misses
    if counted is None:
        return "–"
    return f"{counted[0]} of {counted[1]} ({numbers.share(counted[0] / counted[1]) if counted[1] else '–'})"


def unstable(session: Session) -> list[str]:
    """A sentence for every network of which a process never became steady: its times are those of warming up."""
    told = []
    for name, measured in session.measurements.items():
        if not measured.steady:
            shaky = f"{measured.unsteady} of {len(measured.processes)} processes of '{name}'"
            told.append(f"UNSTABLE: {shaky} never became steady.")
    return told


def protocol(session: Session) -> str:
    """How it was measured, in one line."""
    processes = max(len(m.processes) for m in session.measurements.values())
    shapes = {(len(b.ns), b.ns.shape[1]) for m in session.measurements.values() for b in m.processes}
    rounds = " to ".join(str(n) for n in sorted({min(r for r, _ in shapes), max(r for r, _ in shapes)}))
    paces = {m.paced_ms for m in session.measurements.values() if m.paced_ms is not None}
    mode = f"paced at {', '.join(f'{pace:g} ms' for pace in sorted(paces))}" if paces else "back to back"
    threads = f"{session.spec.threads} thread{'s' if session.spec.threads > 1 else ''}"
    spin = "spinning" if session.spec.spin else "no spinning"
    how = f"{processes} processes x {rounds} rounds, {mode}, {threads}, {spin}, seed {session.seed}"
    return f"protocol: {session.protocol}; {how}; {numbers.utc(session.started)}{_lasted(session)}"


def _lasted(session: Session) -> str:
    """How long it took by the device's monotonic clock; times of day may jump and are never subtracted."""
    spent = session.telemetry.get("seconds")
    return "" if spent is None else f", {numbers.seconds(spent)}"


def session_json(session: Session) -> dict[str, Any]:
    """The same as plain data; None stands for a bound or percentile that the samples do not allow."""
    first = next(iter(session.measurements))
    table = {
        "models": {name: _model(session, name, first) for name in session.measurements},
        "reference": first,
        "contaminated": session.contaminated,
        "simulated": session.simulated,
        "conditions": session.preflight.to_table(),
        "protocol": protocol(session),
        "mode": session.mode,
        "seed": session.seed,
        "started": session.started,
        "ended": session.ended,
        "spec": session.spec.model_dump(),
        "telemetry": dict(session.telemetry),
        "device": session.fingerprint.to_table(),
    }
    return dict(numbers.strict(table))


def _model(session: Session, name: str, first: str) -> dict[str, Any]:
    measured, ratio = session.measurement(name), session.ratio(name, first)
    told: dict[str, Any] = {"sha256": measured.sha256, "runtime": measured.runtime}
    told["inferences"] = int(measured.pooled_ns.size)
    told["ratio"] = ratio.center
    told["ratio_bounds"] = [_bound(ratio.low), ratio.high]
    told |= _statistics(measured)
    if measured.on_gpu:
        told["gpu"] = _statistics(measured.on_gpu)
    told["processes"] = len(measured.processes)
    told["process_p50_ms"] = [at.value_ms for at in measured.by_process("p50")]
    told["spread"] = measured.spread if len(measured.processes) > 1 else None
    told["flagged_share"] = measured.flagged_share
    told["steady"] = measured.steady
    told["drift"] = measured.drift
    told["paced_ms"] = measured.paced_ms
    counted = measured.deadline_misses
    told["deadline_misses"] = None if counted is None else {"missed": counted[0], "inferences": counted[1]}
    told["deadline_miss_ratio"] = measured.miss_ratio
    return told


def _statistics(measured: Measurement) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for statistic in STATISTICS:
        at = measured.statistic(statistic)
        told[f"{statistic}_ms"] = at.value_ms
        told[f"{statistic}_ms_bounds"] = [_bound(at.low_ms), at.high_ms]
        told[f"{statistic}_reason"] = at.reason or None
    return told


def _bound(low: float) -> float | None:
    return low if math.isfinite(low) and low > 0 else None


def conditions_table(conditions: Iterable[Condition]) -> Table:
    """One line a condition: ok, worth knowing, or reason to stop, with what to do."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    for condition in conditions:
        mark = "[green]ok[/]" if condition.ok else "[red]stop[/]" if condition.fatal else "[yellow]note[/]"
        why = "" if condition.ok else f"{condition.why}: {condition.mend}"
        table.add_row(mark, *(Text(printable(text)) for text in (condition.name, condition.value, why)))
    return table
