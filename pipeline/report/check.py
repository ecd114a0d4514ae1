"""A finished check for people, for machines, for a pull request's summary and for CI: text, JSON, Markdown, JUnit."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.nouns import CheckRecord, DeviceChange, LayerMove, Pin
from pipeline.report import check_rows, numbers
from pipeline.report.check_rows import MARKS
from pipeline.report.escape import markdown, printable
from targets.harness.compare import MISSES, Outcome, Stage, Tail
from targets.harness.measurement import Interval

COLOURS: dict[Outcome, str] = {
    "pass": "green", "improved": "green", "warn": "yellow", "fail": "red", "undecided": "yellow",
    "inconclusive": "yellow",
}  # fmt: skip
NOTHING_SEEN = "There is no verdict, so no slowdown of any size could have been seen."
NOT_MEASURED: tuple[Outcome, ...] = ("undecided", "inconclusive")


def show(record: CheckRecord, console: Console) -> None:
    """Print the verdict in the first line, then what it rests on."""
    outcome = record.verdict.outcome
    verdict = Text(outcome, style=f"bold {COLOURS[outcome]}")
    verdict.append(f": {printable(check_rows.reason(record))}", style="not bold default")
    console.print(verdict, soft_wrap=True)
    _say(console, check_rows.what(record))
    for grid in check_rows.grids(record):
        console.print()
        console.print(Text(grid.title, style="bold"))
        console.print(grid.table(), highlight=False)
        if grid.note:
            _say(console, grid.note)
    console.print()
    for sentence in check_rows.sentences(record):
        _say(console, sentence)


def _say(console: Console, text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True, highlight=False)


# --- for machines ----------------------------------------------------------------------------------------------------


def to_json(record: CheckRecord) -> dict[str, Any]:
    """Everything in the record and what follows from it, as strict JSON; None for a number that does not exist."""
    verdict = record.verdict
    table = {
        "version": 1,
        "outcome": verdict.outcome,
        "exit_code": verdict.exit_code,
        "reason": check_rows.reason(record),
        "simulated": record.simulated,
        "detectable": check_rows.detectable(record),
        "started": record.started,
        "seconds": record.seconds,
        "profile": record.profile,
        "device": record.device,
        "machine": record.machine,
        "baseline": _pin(record.baseline),
        "candidate": _pin(record.candidate),
        "same": record.same,
        "stages": [_stage(stage) for stage in verdict.stages],
        "absolute_ms": {arm: dict(values) for arm, values in record.absolute.items()},
        "changed": {name: {"then": then, "now": now} for name, (then, now) in record.changed.items()},
        "moved": None if record.moved is None else device_change(record.moved),
        "conditions": record.conditions,
        "layers": [_layer(layer) for layer in record.layers],
        "ledger": {**asdict(record.ledger), "rate": record.ledger.rate},
        "changes": [asdict(change) for change in record.changes],
        "tolerances": record.spec.model_dump(),
        "protocol": record.protocol,
    }
    return dict(numbers.strict(table))


def device_change(found: DeviceChange) -> dict[str, Any]:
    """As strict JSON, the fields like those of `changed`."""
    told = {name: {"then": then, "now": now} for name, (then, now) in found.fields.items()}
    return dict(numbers.strict({**asdict(found), "fields": told}))


def _pin(pin: Pin) -> dict[str, Any]:
    return {
        "name": pin.name,
        "sha256": pin.sha256,
        "source": pin.source,
        "budget": pin.budget,
        "accepted": pin.accepted,
        "fingerprint": dict(pin.fingerprint),
        "inputs": [{"name": name, "shape": shape} for name, shape in pin.inputs],
        "outputs": [{"name": name, "shape": shape} for name, shape in pin.outputs],
        "project": pin.project or None,
        "profile": pin.profile or None,
    }


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "number": stage.number,
        "ratio": _interval(stage.ratio),
        "low": _interval(stage.low),
        "control": _interval(stage.control),
        "tails": [_tail(tail) for tail in stage.tails],
        "detectable": stage.detectable,
        "spoilt": stage.spoilt,
        "seconds": stage.seconds,
    }


def _tail(tail: Tail) -> dict[str, Any]:
    own = tail.interval
    if tail.name == MISSES:
        numbers_of = {"candidate": own.center, "baseline_again": own.low, "p_value": own.high}
        return {"name": tail.name, "risen": tail.risen, **numbers_of}
    return {"name": tail.name, "risen": tail.risen, "over": tail.over, "shared": tail.shared, **_interval(own)}


def _interval(interval: Interval) -> dict[str, Any]:
    low = interval.low if interval.low > 0 else None
    bounds = [low, interval.high]
    return {"ratio": interval.center, "bounds": bounds, "sd": interval.sd, "processes": interval.n}


def _layer(layer: LayerMove) -> dict[str, Any]:
    return {**asdict(layer), "change_ms": layer.candidate_ms - layer.baseline_ms}


# --- for a summary on GitHub -----------------------------------------------------------------------------------------


def to_markdown(record: CheckRecord) -> str:
    """The same in GitHub's Markdown; every name in it is text."""
    parts = [f"### {MARKS[record.verdict.outcome]} {markdown(check_rows.headline(record))}"]
    parts.append(markdown(check_rows.what(record)))
    parts += [grid.markdown() for grid in check_rows.grids(record)]
    parts.append("\n".join(f"- {markdown(sentence)}" for sentence in check_rows.sentences(record)))
    return "\n\n".join(parts) + "\n"


def markdown_error(profile: str, message: str) -> str:
    """What to say of a check that could not be made."""
    return f"### ? not measured: check on {markdown(profile)}\n\n{markdown(message)}\n\n{markdown(NOTHING_SEEN)}\n"


# --- for CI ----------------------------------------------------------------------------------------------------------


def to_junit(records: Iterable[CheckRecord]) -> str:
    """One test suite with one test case a check; what was not measured is an error and never passes."""
    own = tuple(records)
    errors = sum(record.verdict.outcome in NOT_MEASURED for record in own)
    failures = sum(record.verdict.outcome == "fail" for record in own)
    root, suite = _suite(len(own), failures, errors, sum(record.seconds for record in own))
    if own:
        suite.set("timestamp", own[0].started[:19])
    for record in own:
        _case(suite, record)
    return _xml(root)


def junit_error(profile: str, message: str) -> str:
    """The suite of a check that could not be made: one test case, an error."""
    root, suite = _suite(1, 0, 1, 0.0)
    case = ET.SubElement(suite, "testcase", classname=f"deploy.check.{printable(profile)}", name="check", time="0.000")
    told = printable(message)
    ET.SubElement(case, "error", type="not measured", message=f"{told.rstrip('.')}. {NOTHING_SEEN}").text = told
    return _xml(root)


def _suite(tests: int, failures: int, errors: int, seconds: float) -> tuple[ET.Element, ET.Element]:
    counts = {"tests": str(tests), "failures": str(failures), "errors": str(errors)}
    totals = {"name": "deploy check", **counts, "time": f"{seconds:.3f}"}
    root = ET.Element("testsuites", totals)
    return root, ET.SubElement(root, "testsuite", {**totals, "skipped": "0"})


def _xml(root: ET.Element) -> str:
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, record: CheckRecord) -> None:
    outcome = record.verdict.outcome
    name = printable(f"{record.candidate.name} against {record.baseline.name}")
    case = ET.SubElement(suite, "testcase", classname=printable(f"deploy.check.{record.profile}"), name=name)
    case.set("time", f"{record.seconds:.3f}")
    told = plain(record)
    if outcome == "fail" or outcome in NOT_MEASURED:
        tag = "failure" if outcome == "fail" else "error"
        message = printable(f"{check_rows.headline(record).rstrip('.')}. {check_rows.resolution(record)}".strip())
        ET.SubElement(case, tag, type=outcome, message=message).text = told
    else:
        ET.SubElement(case, "system-out").text = told


def plain(record: CheckRecord) -> str:
    """The whole check as lines of plain text."""
    lines = [check_rows.headline(record), check_rows.what(record)]
    for grid in check_rows.grids(record):
        lines += ["", grid.title, *grid.lines(), *([grid.note] if grid.note else [])]
    return "\n".join(printable(line) for line in [*lines, "", *check_rows.sentences(record)])
