"""A measuring session as one HTML page: distributions and time series, every statistic with its bounds, conditions."""

from __future__ import annotations

from pipeline.report import numbers, session, session_charts
from pipeline.report.grid import Grid
from pipeline.report.pages import fill
from targets.harness.measurement import Session


def measure_page(measured: Session) -> str:
    """The page of `deploy measure --html`."""
    names = list(measured.measurements)
    charts = {
        "latencies": session_charts.histograms([measured], names),
        "series": session_charts.series([measured], names),
        "processes": session_charts.processes(measured),
    }
    facts = measured.fingerprint.to_table()
    told = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in facts.items()}
    return fill(
        "measure.html",
        charts,
        session=measured,
        names=names,
        overview=session.overview(measured),
        statistics=session.statistics(measured),
        samples=_samples(measured),
        unstable=session.unstable(measured),
        protocol=session.protocol(measured),
        device=[(name.replace("_", " "), numbers.fact(value)) for name, value in told.items()],
    )


def _samples(measured: Session) -> Grid:
    rows = []
    for name, own in measured.measurements.items():
        timed = sum(block.ns.size for block in own.processes)
        warm = sum(block.warmup.seconds for block in own.processes)
        cells = (numbers.fact(own.sha256), own.runtime, str(len(own.processes)), str(timed), str(own.pooled_ns.size))
        told = f"{warm:.1f} s" if own.steady else f"{warm:.1f} s, unsteady"
        rows.append((name, *cells, numbers.share(own.flagged_share), told))
    head = ("model", "sha256", "runtime", "processes", "inferences timed", "used", "blocks flagged", "warm-up")
    return Grid("Raw samples", head, tuple(rows), text=(0, 1, 2))
