"""A finished check as one HTML page: the verdict, what it rests on as pictures and tables, and what might excuse it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.nouns import CheckRecord, Pin
from pipeline.report import check_charts, check_rows, numbers, session_charts
from pipeline.report.check import NOTHING_SEEN
from pipeline.report.grid import Grid
from pipeline.report.pages import fill
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE
from targets.harness.measurement import Session


def check_page(record: CheckRecord, sessions: Sequence[Session]) -> str:
    """The page. sessions: the stages' own, in order; without them it has the tables and no pictures."""
    arms = [BASELINE, AGAIN, CANDIDATE]
    own = [session for session in sessions if set(arms) <= set(session.measurements)]
    stages = record.verdict.stages
    return fill(
        "check.html",
        _charts(record, own, arms),
        record=record,
        mark=check_rows.MARKS[record.verdict.outcome],
        simulated=record.simulated or any(session.simulated for session in sessions),
        reason=check_rows.reason(record),
        what=check_rows.what(record),
        last=stages[-1] if stages else None,
        detectable=check_rows.detectable(record),
        resolution=check_rows.resolution(record),
        environment=check_rows.environment(record),
        ledger=f"{check_rows.engines(record)} {check_rows.ledger(record)}".strip(),
        changes=[check_rows.change(found) for found in record.changes],
        stages=check_rows.stages(record),
        absolute=check_rows.absolute(record),
        changed=check_rows.changed(record),
        layers=check_rows.layers(record),
        bars=_bars(record),
        samples=_samples(own, arms, check_charts.headings(record, own)),
        device=_device(own),
        pins=[("baseline", *_pin(record.baseline)), ("candidate", *_pin(record.candidate))],
        tolerances=[(name.replace("_", " "), f"{value:g}") for name, value in record.spec.model_dump().items()],
    )


def error_page(profile: str, message: str) -> str:
    """The page of a check that could not be made, in the place where a verdict would be."""
    return fill("check_error.html", {}, profile=profile, message=message, nothing=NOTHING_SEEN)


def _charts(record: CheckRecord, sessions: Sequence[Session], arms: Sequence[str]) -> dict[str, str]:
    if not sessions:
        return {}
    return {
        "candidate": check_charts.forest(record, sessions, control=False),
        "control": check_charts.forest(record, sessions, control=True),
        "latencies": session_charts.histograms(sessions, arms),
        "series": session_charts.series(sessions, arms, check_charts.headings(record, sessions), level=True),
    }


def _bars(record: CheckRecord) -> list[tuple[str, str, str, str, str]]:
    """Layers that moved most: name, operator, both widths in percent of the longest, and the change."""
    top = check_rows.moved(record)
    longest = max((max(layer.baseline_ms, layer.candidate_ms) for layer in top), default=0.0) or 1.0
    return [
        (layer.name, layer.op, f"{100 * layer.baseline_ms / longest:.1f}", f"{100 * layer.candidate_ms / longest:.1f}",
         numbers.signed_ms(layer.candidate_ms - layer.baseline_ms))
        for layer in top
    ]  # fmt: skip


def _samples(sessions: Sequence[Session], arms: Sequence[str], headings: Sequence[str]) -> Grid | None:
    """How many raw samples the verdict rests on."""
    rows = []
    for heading, session in zip(headings, sessions, strict=True):
        for arm in arms:
            own = session.measurement(arm)
            timed, blocks = sum(b.ns.size for b in own.processes), sum(len(b.ns) for b in own.processes)
            cells = (arm, str(len(own.processes)), str(blocks), str(timed), str(own.pooled_ns.size))
            steady = "yes" if own.steady else "no"
            rows.append((heading, *cells, numbers.share(own.flagged_share), steady))
    head = ("", "arm", "processes", "blocks", "inferences timed", "inferences used", "blocks flagged", "steady")
    return Grid("Raw samples", head, tuple(rows), text=(0, 1)) if rows else None


def _device(sessions: Sequence[Session]) -> list[tuple[str, str]]:
    """The fingerprint as it was in the last session."""
    if not sessions:
        return []
    facts = sessions[-1].fingerprint.to_table()
    told = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in facts.items()}
    return [(name.replace("_", " "), numbers.fact(value)) for name, value in told.items()]


def _pin(pin: Pin) -> tuple[str, str]:
    budget = f", built for {pin.budget}" if pin.budget else ""
    accepted = f", accepted {numbers.utc(pin.accepted)}" if pin.accepted else ""
    return pin.name, f"{numbers.fact(pin.sha256)} from {pin.source}{budget}{accepted}"
