"""What the cells say: a line each, and whether our default leads as far as it has to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from scipy import stats

from benchmarks.frontier.cells import BUDGETS, DENSE, NETS, RECOVERIES, Store
from benchmarks.lines import Row

CONFIDENCE = 0.95
HALF, TENTH = 0.5, 0.001
"""Our loss may be half of the best peer's, or a tenth of a point."""
UNUSED, ROUNDS = 0.03, 4
"""How much of the budget our default may leave unused, and how many rounds it may take."""
OURS = "ours"


@dataclass(frozen=True)
class Line:
    """A finished cell. accuracy: of the test images, with its 95 % interval. ratio: measured / dense, 99 % bounds.

    final: whether the ratio is that of the common session, not of the contestant's own search. loss: against dense.
    unused: share of the budget. before: best validation accuracy without recovery, and its name.
    """

    net: str
    budget: str
    contestant: str
    recovery: str
    accuracy: float
    interval: tuple[float, float]
    loss: float
    ratio: float
    bounds: tuple[float, float]
    final: bool
    unused: float
    seconds: float
    recovery_seconds: float
    sittings: int
    before: tuple[str, float] | None

    @property
    def kept(self) -> bool:
        """Whether the budget is kept: the upper bound is within it, where it was measured with the others."""
        limit = float(self.budget.removesuffix("x"))
        return (self.bounds[1] if self.final else self.ratio) <= limit


def wilson(right: int, total: int) -> tuple[float, float]:
    """Interval of a share of independent images (Wilson 1927)."""
    found = stats.binomtest(right, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def lines(store: Store) -> list[Line]:
    """Every cell that ended with a network."""
    found = []
    for row in store.cells.values():
        dense = store.cells.get(f"{row['net']}/{DENSE}/{DENSE}")
        if row["contestant"] != DENSE and "onnx" in row and dense is not None and "accuracy" in dense:
            found.append(_line(row, dense, store.measured(row["group"]).get(row["contestant"])))
    return found


def _line(row: Row, dense: Row, times: Sequence[float] | None) -> Line:
    name, limit = row["contestant"], float(row["budget"].removesuffix("x"))
    ratio, low, high = times or (row["searched"], math.nan, math.nan)
    seconds = {step: took for step, took in row["seconds"].items() if step not in ("evaluate pruned", "accept")}
    recovery = seconds.pop("recover", 0.0)
    before = max(row["before"].items(), key=lambda each: each[1], default=None)
    right = round(row["accuracy"] * row["images"])
    return Line(
        row["net"], row["budget"], name, row["recovery"], row["accuracy"], wilson(right, row["images"]),
        dense["accuracy"] - row["accuracy"], ratio, (low, high), times is not None, 1 - ratio / limit,
        sum(seconds.values()), recovery, row["sittings"], before,
    )  # fmt: skip


# --- the criterion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Whether our default leads as it has to. loss, allowed, best_loss: in shares. best: the best peer, or none."""

    net: str
    budget: str
    stage: str
    loss: float
    allowed: float
    best: str | None
    best_loss: float

    @property
    def meets(self) -> bool:
        """At most what is allowed."""
        return self.loss <= self.allowed + 1e-9

    def __str__(self) -> str:
        told = f"{self.net} at {self.budget}, {self.stage}: ours loses {_points(self.loss)} points"
        if self.best is None:
            return f"{told}, no peer keeps the budget: meets the criterion"
        verdict = "meets the criterion" if self.meets else "does NOT meet the criterion"
        against = f"half of the {_points(self.best_loss)} of {self.best}, at least 0.10"
        return f"{told}, may lose {_points(self.allowed)} ({against}): {verdict}"


def criterion(net: str, budget: str, stage: str, ours: float, peers: Mapping[str, float]) -> Judged:
    """ours, peers: accuracies lost against the dense network. At most half of the best peer's loss, or 0.1 points."""
    best = min(peers, key=lambda name: peers[name]) if peers else None
    least = peers[best] if best is not None else math.inf
    allowed = max(HALF * least, TENTH) if peers else math.inf
    return Judged(net, budget, stage, ours, allowed, best, least)


def judged(store: Store) -> list[Judged]:
    """Every network, budget and recovery where our default has a result, and before the recovery."""
    found, every = [], lines(store)
    for net in NETS:
        dense = store.cells.get(f"{net}/{DENSE}/{DENSE}", {})
        for budget in BUDGETS:
            here = [line for line in every if (line.net, line.budget) == (net, budget)]
            kept = [line for line in here if line.kept and not line.contestant.startswith(OURS)]
            for recovery in RECOVERIES:
                own = [line for line in here if (line.contestant, line.recovery) == (OURS, recovery)]
                peers = {line.contestant: line.loss for line in kept if line.recovery == recovery}
                found += [criterion(net, budget, recovery, line.loss, peers) for line in own]
            own = [line for line in here if line.contestant == OURS and line.before][:1]
            peers = {line.contestant: dense["validate"] - line.before[1] for line in kept if line.before}
            for line in own:
                assert line.before is not None
                stage = "before recovery (validation)"
                found.append(criterion(net, budget, stage, dense["validate"] - line.before[1], peers))
    return found


# --- text ----------------------------------------------------------------------------------------------------------


def table(store: Store) -> str:
    """Everything that is known, best accuracy first."""
    every, told = lines(store), []
    for net in NETS:
        dense = store.cells.get(f"{net}/{DENSE}/{DENSE}")
        if dense is None or "accuracy" not in dense:
            continue
        told += ["", f"{net}: dense {_percent(dense['accuracy'])} of {dense['images']} test images; {taken_on(dense)}"]
        for budget in BUDGETS:
            here = [line for line in every if (line.net, line.budget) == (net, budget)]
            for recovery in RECOVERIES:
                own = sorted((x for x in here if x.recovery == recovery), key=lambda x: -x.accuracy)
                if own:
                    told += ["", f"{net} at {budget}, {recovery}", HEAD, *map(_text, own)]
            told += _without(store, net, budget)
            told += [demands(line) for line in here if (line.contestant, line.recovery) == (OURS, RECOVERIES[0])]
            told += [str(each) for each in judged(store) if (each.net, each.budget) == (net, budget)]
    return "\n".join(told).strip() or "no results yet"


def demands(line: Line) -> str:
    """Whether ours keeps the budget, leaves little of it unused and needs few rounds."""
    kept = "keeps the budget" if line.kept else "does NOT keep the budget"
    unused = f"{100 * line.unused:.1f} % unused ({_at_most(line.unused, UNUSED, f'{100 * UNUSED:g} %')})"
    rounds = f"{line.sittings} rounds ({_at_most(line.sittings, ROUNDS, str(ROUNDS))})"
    return f"{line.net} at {line.budget}: ours {kept}, {unused}, {rounds}"


def _at_most(value: float, most: float, told: str) -> str:
    return f"at most {told}" if value <= most else f"NOT at most {told}"


HEAD = (
    f"  {'contestant':<30} {'accuracy, % [95 %]':<22} {'loss':>6}  {'measured ratio [99 %]':<24} {'unused':>7}"
    f" {'search s':>9} {'recovery s':>10} {'rounds':>6}  before, validation %"
)


def _text(line: Line) -> str:
    interval = f"{_percent(line.accuracy)} [{_percent(line.interval[0])}, {_percent(line.interval[1])}]"
    bounds = f"[{line.bounds[0]:.4f}, {line.bounds[1]:.4f}]" if line.final else "(own search)"
    before = f"{_percent(line.before[1])} ({line.before[0]})" if line.before else "-"
    flag = "" if line.kept else "  BUDGET NOT KEPT"
    return (
        f"  {line.contestant:<30} {interval:<22} {_points(line.loss):>6}  {f'{line.ratio:.4f} {bounds}':<24}"
        f" {100 * line.unused:6.1f}% {line.seconds:9.0f} {line.recovery_seconds:10.0f} {line.sittings:6d}"
        f"  {before}{flag}"
    )


def _without(store: Store, net: str, budget: str) -> list[str]:
    """Contestants that ended without a network, and why."""
    rows = [row for row in store.cells.values() if row["group"] == f"{net}/{budget}" and "onnx" not in row]
    reasons = {row["contestant"]: row.get("missed") or f"failed: {row['failed']}" for row in rows}
    took = {row["contestant"]: sum(row["seconds"].values()) for row in rows}
    return [f"  {name:<30} {reason} ({took[name]:.0f} s)" for name, reason in sorted(reasons.items())]


def taken_on(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    return f"{row['machine']['cpu']}, {row['machine']['cores']} cores; {versions}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _points(share: float) -> str:
    return f"{100 * share:.2f}"


def record(store: Store) -> dict[str, Any]:
    """Lines, verdicts and what they were taken on as plain data."""
    dense: Sequence[Row] = [row for row in store.cells.values() if row["contestant"] == DENSE]
    found = {
        "dense": {row["net"]: {k: row.get(k) for k in ("accuracy", "validate", "images")} for row in dense},
        "machine": next((row["machine"] for row in dense), None),
        "versions": next((row["versions"] for row in dense), None),
        "cells": [asdict(line) | {"kept": line.kept} for line in lines(store)],
        "without": [
            {k: row.get(k) for k in ("cell", "missed", "failed", "seconds")}
            for row in store.cells.values() if "onnx" not in row
        ],
        "criterion": [asdict(each) | {"meets": each.meets} for each in judged(store)],
    }  # fmt: skip
    return cast(dict[str, Any], finite(found))


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
