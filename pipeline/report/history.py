"""The checks of many nights: one line each as text, plain data, and one HTML page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.nouns import Change, CheckRecord, DeviceChange
from pipeline.report import check_charts, check_rows, numbers
from pipeline.report.check import COLOURS, device_change, to_json
from pipeline.report.check_charts import last
from pipeline.report.escape import printable
from pipeline.report.grid import Grid
from pipeline.report.pages import fill
from targets.harness.compare import BASELINE

OUTCOME = 3
"""Column of the outcome."""
MOVED = "*"
"""Marks the number of a check before which the device changed."""
Records = Sequence[CheckRecord] | Mapping[int, CheckRecord]
"""Checks, oldest first; with their numbers, or numbered from 1."""


def _numbered(records: Records) -> dict[int, CheckRecord]:
    return dict(records) if isinstance(records, Mapping) else dict(enumerate(records, start=1))


def show_history(
    records: Records, console: Console, changes: Sequence[Change] = (), moved: Sequence[DeviceChange] = ()
) -> None:
    """Print one line a check, in the order given, and a sentence a change point and a change of the device."""
    if not records:
        console.print(Text("no check has been made yet."), soft_wrap=True)
        return
    several = len({record.profile for record in _numbered(records).values()}) > 1
    grid = nights(records, moved, several=several)
    console.print(grid.table(style=_style), highlight=False)
    told = [f"Check {each.number}{MOVED}: {check_rows.device_change(each)}." for each in moved]
    for sentence in [
        *([grid.note] if grid.note else []),
        *told,
        *(f"Advisory: {check_rows.change(c)}." for c in changes),
    ]:
        console.print(Text(printable(sentence)), soft_wrap=True)


def _style(column: int, cell: str) -> str:
    return next((look for outcome, look in COLOURS.items() if outcome == cell), "") if column == OUTCOME else ""


def nights(records: Records, moved: Sequence[DeviceChange] = (), *, several: bool = False) -> Grid:
    """Cells of the history: number, time, candidate, outcome, ratio, control, smallest slowdown that could be seen.

    moved: checks that are marked, since the device changed before them; several: with the target of each at the end.
    """
    rows, marked = [], {each.number for each in moved}
    for number, record in _numbered(records).items():
        stage, seen = last(record), check_rows.detectable(record)
        ratios = ["–", "–"] if stage is None else [numbers.interval(stage.ratio), numbers.interval(stage.control)]
        began = numbers.utc(record.started).removesuffix(" UTC")
        name = f"{record.candidate.name} (the same file)" if record.same else record.candidate.name
        cells = (f"{number}{MOVED if number in marked else ''}", began, name, record.verdict.outcome, *ratios)
        rows.append((*cells, "–" if seen is None else numbers.share(seen), *([record.profile] if several else [])))
    head = ("", "UTC", "candidate", "outcome", "ratio", "control", "detectable", *(["target"] if several else []))
    same = any(record.same for record in _numbered(records).values())
    notes = [*([f"({check_rows.SAME})"] if same else []), *([f"{MOVED} the device changed before it"] if moved else [])]
    return Grid("Checks", head, tuple(rows), "; ".join(notes), text=(1, 2, 3, 7))


def history_json(
    records: Records, changes: Sequence[Change] = (), moved: Sequence[DeviceChange] = ()
) -> dict[str, Any]:
    """Every check as `deploy check --json` gives it, numbered as in the text; outcomes counted; change points.

    device_changes: the checks before which the device changed, with the baseline's levels as they are known now.
    """
    counts: dict[str, int] = {}
    for record in _numbered(records).values():
        counts[record.verdict.outcome] = counts.get(record.verdict.outcome, 0) + 1
    checks = [{"number": number, **to_json(record)} for number, record in _numbered(records).items()]
    told = [dict(numbers.strict(asdict(change))) for change in changes]
    events = [device_change(each) for each in moved]
    return {"version": 1, "outcomes": counts, "checks": checks, "changes": told, "device_changes": events}


def history_page(records: Records, changes: Sequence[Change], moved: Sequence[DeviceChange] = ()) -> str:
    """The page: for every target the ratio of each night with bounds and the baseline's times with change points."""
    numbered = _numbered(records)
    own = list(numbered.values())
    profiles = list(dict.fromkeys(record.profile for record in own))
    charts: dict[str, str] = {}
    sections = []
    for number, profile in enumerate(profiles, start=1):
        here = [record for record in own if record.profile == profile]
        found = [each for each in changes if len(profiles) == 1 or each.series.endswith(f" on {profile}")]
        charts[f"nights {number}"] = check_charts.nights(here, number)
        if any(BASELINE in record.absolute for record in here):
            order = [each for each, record in numbered.items() if record.profile == profile]
            marks = [order.index(each.number) for each in moved if each.number in order]
            charts[f"absolutes {number}"] = check_charts.absolutes(here, found, number, marks)
        told = [check_rows.change(each) for each in found]
        events = [f"check {m.number}: {check_rows.device_change(m)}" for m in moved if m.profile == profile]
        section = {"profile": profile, "changes": told, "moved": events, "ledger": check_rows.ledger(here[-1])}
        sections.append(section)
    return fill(
        "history.html",
        charts,
        where=", ".join(profiles) or "no target",
        count=len(own),
        outcomes=history_json(records)["outcomes"],
        nights=nights(records, moved, several=len(profiles) > 1),
        sections=sections,
    )
