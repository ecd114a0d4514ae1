"""What every form of a check says, as text: one headline, sentences, and small tables of cells."""

from __future__ import annotations

import math

from pipeline.nouns import Change, CheckRecord, DeviceChange, LayerMove
from pipeline.report import numbers
from pipeline.report.grid import Grid
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE, MISSES, Stage, Tail, noticed

MARKS = {"pass": "✓", "improved": "✓", "warn": "!", "fail": "✗", "undecided": "?", "inconclusive": "?"}
LAYERS = 8
ARMS = (BASELINE, AGAIN, CANDIDATE)
SAME = "the same file: a check of the environment"
ONE_BUILD = "One build of each engine was judged; another build of the same network may be faster or slower."
SIMULATED = "The numbers come from a simulated device and are no user's."


def headline(record: CheckRecord) -> str:
    """Outcome and reason in one line."""
    return f"{record.verdict.outcome}: {reason(record)}"


def reason(record: CheckRecord) -> str:
    """Why the outcome is what it is; first of all, where it is so, that nothing new was compared."""
    return f"({SAME}) {record.verdict.reason}" if record.same else record.verdict.reason


def what(record: CheckRecord) -> str:
    """Which artifacts were compared, where and when."""
    pins = f"candidate {record.candidate.name} against baseline {record.baseline.name}"
    where = f"on {record.profile}, device {numbers.fact(record.device)}"
    return f"{pins} {where}, {numbers.utc(record.started)}, {numbers.seconds(record.seconds)}"


def detectable(record: CheckRecord) -> float | None:
    """Smallest slowdown that the last stage would have found, as a share; None where the check says nothing."""
    stages = record.verdict.stages
    if record.verdict.outcome == "inconclusive" or not stages or stages[-1].spoilt:
        return None
    if not math.isfinite(stages[-1].detectable):
        return None
    return stages[-1].detectable


def resolution(record: CheckRecord) -> str:
    """The sentence on the smallest slowdown that could have been seen; "" where the reason has it already."""
    seen = detectable(record)
    if seen is not None and noticed(seen) in record.verdict.reason:
        return ""
    if seen is not None:
        return f"The smallest slowdown this run could have seen is {numbers.share(seen)}."
    spoilt = next((stage.spoilt for stage in reversed(record.verdict.stages) if stage.spoilt), "")
    broken = "it broke off" if record.verdict.outcome == "inconclusive" else "it was too coarse"
    why = spoilt or ("it was not measured" if not record.verdict.stages else broken)
    return f"This run could not have seen a slowdown of any size: {why.rstrip('.')}."


def ledger(record: CheckRecord) -> str:
    """How often equal networks were called different on this device, and what follows from it."""
    own = record.ledger
    if not own.controls:
        return "No control was kept before this check, so the rate of false alarms is not known."
    alarms = f"{own.alarms} of {own.controls} controls so far would have been a false alarm ({numbers.share(own.rate)})"
    wider = f"the tolerances are widened {own.widened:.2f}x" if own.widened > 1 else "the tolerances are not widened"
    return f"{alarms}; {wider}."


def change(found: Change) -> str:
    """A change point in words."""
    size = numbers.change(found.before_ms, found.after_ms)
    moved = f"from {numbers.ms(found.before_ms)} to {numbers.ms(found.after_ms)} ({size})"
    return f"{found.series} moved {moved} at {numbers.utc(found.at)}, p = {found.p_value:.1g}"


def device_change(found: DeviceChange) -> str:
    """What a device told of itself otherwise than in the check before, and what the baseline took before and since."""
    told = ", ".join(f"{_label(name)} was {_fact(was)}, is {_fact(now)}" for name, (was, now) in found.fields.items())
    before, after = found.nights
    since = f"{numbers.ms(found.after_ms)} over {_nights(after)} since"
    if found.before_ms is None:
        return f"{told}; the baseline's p50 is {since}, and was not measured like this before"
    moved = numbers.change(found.before_ms, found.after_ms)
    return (
        f"{told}; the baseline's p50 was {numbers.ms(found.before_ms)} over {_nights(before)} and is {since} ({moved})"
    )


def _nights(count: int) -> str:
    return f"{count} night{'' if count == 1 else 's'}"


def environment(record: CheckRecord) -> str:
    """Whether the device is the one that the baseline was accepted on, and that of the check before, in sentences."""
    if record.moved is None:
        return _since_accepted(record)
    return f"{_since_accepted(record)} Since the check before: {device_change(record.moved)}."


def _since_accepted(record: CheckRecord) -> str:
    if record.changed:
        return f"The device has changed since the baseline was accepted: {', '.join(map(_label, record.changed))}."
    if not record.baseline.fingerprint:
        return "The device was not described when the baseline was accepted, so what changed since is not known."
    return "Nothing that the device tells of itself has changed since the baseline was accepted."


def _label(field: str) -> str:
    return field.replace("_", " ")


def sentences(record: CheckRecord) -> list[str]:
    """What has to be said beside the tables, in order."""
    simulated = [SIMULATED] if record.simulated else []
    seen = [resolution(record)] if resolution(record) else []
    advisory = [f"Advisory: {change(found)}." for found in record.changes]
    built = [engines(record)] if engines(record) else []
    spoilt = [f"Not in order: {condition.rstrip('.')}." for condition in record.conditions]
    return [*simulated, *seen, *built, environment(record), ledger(record), *advisory, *spoilt]


def engines(record: CheckRecord) -> str:
    """What is to be said of two engines, which differ from build to build; "" where none or one was measured."""
    built = str(record.baseline.fingerprint.get("runtime", "")).startswith("tensorrt")
    return ONE_BUILD if built and not record.same else ""


def grids(record: CheckRecord) -> list[Grid]:
    """The tables that there are data for."""
    made = [stages(record), absolute(record), changed(record), layers(record)]
    return [grid for grid in made if grid is not None]


def stages(record: CheckRecord) -> Grid | None:
    """One column a stage."""
    own = record.verdict.stages
    if not own:
        return None
    rows: list[tuple[str, list[str]]] = [
        ("latency ratio", [numbers.interval(stage.ratio) for stage in own]),
        ("ratio of block p10", [numbers.interval(stage.low) for stage in own]),
        ("control", [numbers.interval(stage.control) for stage in own]),
    ]
    names = dict.fromkeys(tail.name for stage in own for tail in stage.tails)
    rows += [(f"tail: {name}", [_tail(stage, name) for stage in own]) for name in names]
    rows.append(("smallest slowdown", ["–" if stage.spoilt else numbers.share(stage.detectable) for stage in own]))
    rows.append(("processes", [str(stage.ratio.n) for stage in own]))
    rows.append(("seconds", [f"{stage.seconds:.1f}" for stage in own]))
    if any(stage.spoilt for stage in own):
        rows.append(("spoilt", [stage.spoilt or "no" for stage in own]))
    head = ("", *(f"stage {stage.number}" for stage in own))
    note = "Ratio: candidate / baseline; control: baseline again / baseline; tails: candidate / baseline again"
    note += ", a budget's: candidate / limit; bounds are one-sided, 99 %."
    return Grid("Stages", head, tuple((label, *cells) for label, cells in rows), note)


def _tail(stage: Stage, name: str) -> str:
    found = next((tail for tail in stage.tails if tail.name == name), None)
    return "–" if found is None else tail_cell(found)


def tail_cell(tail: Tail) -> str:
    """A tail's ratio with bounds, or both miss ratios with the p-value; and whether it rose, or is over its limit."""
    own = tail.interval
    told = numbers.interval(own)
    if tail.name == MISSES:
        told = f"{numbers.share(own.low)} → {numbers.share(own.center)}, p = {own.high:.1g}"
    if tail.shared:
        return f"{told} over, as is the baseline"
    if tail.risen:
        return f"{told} risen"
    return f"{told} over" if tail.over else told


def absolute(record: CheckRecord) -> Grid | None:
    """Milliseconds of each arm; they move with the machine and judge nothing."""
    if not record.absolute:
        return None
    names = list(dict.fromkeys(name for arm in record.absolute.values() for name in arm))
    rows = tuple((arm, *(_ms(own.get(name)) for name in names)) for arm, own in record.absolute.items())
    note = "Absolute times move with the machine; only ratios of one session are judged."
    return Grid("Latency", ("", *names), rows, note)


def _ms(value: float | None) -> str:
    return "too few samples" if value is None or not math.isfinite(value) else numbers.ms(value)


def changed(record: CheckRecord) -> Grid | None:
    """What the device says of itself that it did not say when the baseline was accepted."""
    if not record.changed:
        return None
    rows = tuple((_label(name), _fact(was), _fact(now)) for name, (was, now) in record.changed.items())
    return Grid("Changed since the baseline was accepted", ("", "then", "now"), rows, text=(0, 1, 2))


def _fact(value: object) -> str:
    return numbers.fact(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def moved(record: CheckRecord) -> tuple[LayerMove, ...]:
    """The layers that moved most, in milliseconds, largest first; none that moved by under 1 % of the first."""

    def step(layer: LayerMove) -> float:
        return abs(layer.candidate_ms - layer.baseline_ms)

    order = sorted(record.layers, key=lambda layer: -step(layer))[:LAYERS]
    return tuple(layer for layer in order if step(layer) >= 0.01 * step(order[0]))


def layers(record: CheckRecord) -> Grid | None:
    """Where the change lies."""
    if not record.layers:
        return None
    whole = math.fsum(layer.candidate_ms - layer.baseline_ms for layer in record.layers)
    top = moved(record)
    rows = []
    for layer in top:
        step = layer.candidate_ms - layer.baseline_ms
        part = f"{100 * step / whole:.0f} %".replace("-", "−") if whole else "–"
        cells = (numbers.fine_ms(layer.baseline_ms), numbers.fine_ms(layer.candidate_ms), numbers.signed_ms(step), part)
        rows.append((layer.name, layer.op, *cells))
    held = math.fsum(layer.candidate_ms - layer.baseline_ms for layer in top)
    note = f"{len(top)} of {len(record.layers)} layers hold {numbers.signed_ms(held)} of {numbers.signed_ms(whole)}"
    note += f" ({100 * held / whole:.0f} % of the whole change)." if whole else "."
    head = ("layer", "operator", "baseline", "candidate", "change", "share of the change")
    return Grid("Layers that moved most", head, tuple(rows), note, text=(0, 1))
