"""What the cells say: a line each, and whether our default leads as far as it has to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from benchmarks.frontier import noise
from benchmarks.frontier.cells import BUDGETS, DENSE, NETS, PADDED, RECOVERIES, SCRATCH, Store, asked, peers
from benchmarks.frontier.noise import CONFIDENCE as CONFIDENCE
from benchmarks.lines import Row

HALF, TENTH = 0.5, 0.001
"""Our loss may be half of the best peer's, or a tenth of a point."""
UNUSED, ROUNDS = 0.03, 4
"""How much of the budget our default may leave unused, and how many rounds it may take."""
OURS = "ours"


@dataclass(frozen=True)
class Line:
    """A finished cell. accuracy: of the test images, with its 95 % interval (noise.py). ratio: measured / dense, with
    99 % bounds.

    final: whether the ratio is that of the common session, not of the contestant's own search. loss: against dense.
    unused: share of the budget. sittings: sessions of its own, `contaminated` of them disturbed; rounds: those of our
    search. truncated: epochs of a training from nothing that was cut short, and those that it should have. before: best
    validation accuracy without recovery, and its name.
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
    contaminated: int
    rounds: int
    truncated: tuple[int, int] | None
    before: tuple[str, float] | None

    @property
    def kept(self) -> bool:
        """Whether the budget is kept: the upper bound is within it, where it was measured with the others."""
        limit = float(self.budget.removesuffix("x"))
        return (self.bounds[1] if self.final else self.ratio) <= limit


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
    seconds = {step: took for step, took in row["seconds"].items() if step not in ("evaluate pruned", "export")}
    recovery = seconds.pop("recover", 0.0)
    before = max(row["before"].items(), key=lambda each: each[1], default=None)
    facts = row.get("facts", {})
    interval = noise.wilson(row["accuracy"], row["images"], noise.design(row))
    return Line(
        row["net"], row["budget"], name, row["recovery"], row["accuracy"], interval,
        dense["accuracy"] - row["accuracy"], ratio, (low, high), times is not None, 1 - ratio / limit,
        sum(seconds.values()), recovery, row["sittings"], int(row.get("contaminated", 0)),
        facts.get("search rounds", 0), facts.get("truncated"), before,
    )  # fmt: skip


# --- the criterion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Whether our default leads as it has to. loss, allowed, best_loss: in shares. best: the best peer, or none.

    kept: whether ours keeps the budget in the common session, None where it is not in it. noise: half of the 95 %
    interval of loss - allowed. missing: asked peers without a result. left_out: peers that were not asked.
    """

    net: str
    budget: str
    stage: str
    loss: float
    allowed: float
    best: str | None
    best_loss: float
    best_unused: float
    kept: bool | None
    noise: float
    missing: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """'meets', 'does NOT meet' or 'undecided'."""
        if self.kept is False:
            return "does NOT meet"
        if self.kept is None or self.missing or abs(self.loss - self.allowed) <= self.noise:
            return "undecided"
        return "meets" if self.loss < self.allowed else "does NOT meet"

    def __str__(self) -> str:
        said = f"{self.net} at {self.budget}, {self.stage}: ours loses {_points(self.loss)} points, "
        if self.best is None:
            said += "no peer keeps the budget"
        else:
            against = f"half of the {_points(self.best_loss)} of {self.best}, {100 * self.best_unused:.1f} % unused"
            said += f"may lose {_points(self.allowed)} ({against}; at least 0.10), noise {_points(self.noise)}"
        said += f": {'undecided' if self.verdict == 'undecided' else f'{self.verdict} the criterion'}"
        if self.kept is not True:
            said += "; ours " + ("is not in the common session" if self.kept is None else "does not keep the budget")
        for name, found in (("missing", self.missing), ("not asked in the core", self.left_out)):
            said += f"; {name}: {', '.join(found)}" if found else ""
        return said


def allowance(peers: Mapping[str, float]) -> tuple[str | None, float, float]:
    """The best peer, what it loses and what ours may: half of that, or 0.1 points. peers: accuracies lost."""
    best = min(peers, key=lambda name: peers[name]) if peers else None
    least = peers[best] if best is not None else math.inf
    return best, least, max(HALF * least, TENTH)


def judged(store: Store, core: bool = False) -> list[Judged]:
    """Every network, budget and recovery where our default has a result, and before the recovery."""
    found, every = [], lines(store)
    for net in NETS:
        for budget in BUDGETS:
            here = [line for line in every if (line.net, line.budget) == (net, budget)]
            for recovery in RECOVERIES:
                own = [line for line in here if (line.contestant, line.recovery) == (OURS, recovery)]
                found += [_judged(store, line, here, core, "") for line in own]
            own = [line for line in here if line.contestant == OURS and line.before][:1]
            found += [_judged(store, line, here, core, "before recovery (validation)") for line in own]
    return found


def _judged(store: Store, own: Line, here: Sequence[Line], core: bool, before: str) -> Judged:
    """One verdict. before: the name of the stage without recovery, if that is judged."""
    net, budget, group = own.net, own.budget, f"{own.net}/{own.budget}"
    names, times = asked(net, budget, core), store.measured(group)
    if before:
        names = tuple(name for name in names if name not in SCRATCH)
    rows = {name: store.cells.get(f"{group}/{name}/{own.recovery}", {"failed": "no result"}) for name in (OURS, *names)}
    dense = store.cells[f"{net}/{DENSE}/{DENSE}"]
    missing = [name for name in names if "failed" in rows[name] or ("onnx" in rows[name] and name not in times)]
    rivals = {
        line.contestant: line for line in here
        if line.contestant in names and line.recovery == own.recovery and line.final and line.kept
        and not line.truncated and (line.before or not before)
    }  # fmt: skip
    best, least, allowed = allowance({name: _lost(line, dense, before) for name, line in rivals.items()})
    weights = [(-1.0, OURS), (HALF, str(best))] if HALF * least > TENTH and best else [(-1.0, OURS)]
    weighed = [(-sum(weight for weight, _ in weights), dense), *((weight, rows[name]) for weight, name in weights)]
    if before:
        shares = [(weight, rivals.get(name, own).before) for weight, name in weights]
        at = [(weighed[0][0], dense["validate"]), *((weight, told[1]) for weight, told in shares if told)]
        variance = sum(weight**2 * share * (1 - share) for weight, share in at)
        half = noise.scatter(variance, int(dense.get("held out") or dense["images"]), noise.design(dense))
    else:
        half = noise.half(weighed)
    return Judged(
        net, budget, before or own.recovery, _lost(own, dense, before), allowed, best, least,
        rivals[best].unused if best else 0.0, own.kept if own.final else None, half if best else 0.0,
        tuple(missing), tuple(name for name in peers(net) if core and name not in asked(net, budget, core)),
    )  # fmt: skip


def _lost(line: Line, dense: Row, before: str) -> float:
    return float(dense["validate"] - line.before[1]) if before and line.before else line.loss


# --- text ----------------------------------------------------------------------------------------------------------


def table(store: Store, core: bool = False) -> str:
    """Everything that is known, best accuracy first. core: verdicts ask for the peers of the core alone."""
    every, told = lines(store), []
    for net in NETS:
        dense = store.cells.get(f"{net}/{DENSE}/{DENSE}")
        if dense is None or "accuracy" not in dense:
            continue
        told += ["", f"{net}: dense {_percent(dense['accuracy'])} of {dense['images']} test images; {taken_on(dense)}"]
        told += [_images(dense)]
        for budget in BUDGETS:
            here = [line for line in every if (line.net, line.budget) == (net, budget)]
            for recovery in RECOVERIES:
                own = sorted((x for x in here if x.recovery == recovery), key=lambda x: -x.accuracy)
                if own:
                    told += ["", f"{net} at {budget}, {recovery}", HEAD, *map(_text, own)]
            told += _without(store, net, budget)
            told += [demands(line) for line in here if (line.contestant, line.recovery) == (OURS, RECOVERIES[0])]
            told += [str(each) for each in judged(store, core) if (each.net, each.budget) == (net, budget)]
    return "\n".join(told).strip() or "no results yet"


def demands(line: Line) -> str:
    """Whether ours keeps the budget, leaves little of it unused and needs few rounds."""
    kept = "keeps the budget" if line.kept else "does NOT keep the budget"
    unused = f"{100 * line.unused:.1f} % unused ({_at_most(line.unused, UNUSED, f'{100 * UNUSED:g} %')})"
    rounds = f"{line.rounds} rounds ({_at_most(line.rounds, ROUNDS, str(ROUNDS))})"
    return f"{line.net} at {line.budget}: ours {kept}, {unused}, {rounds}"


def _at_most(value: float, most: float, told: str) -> str:
    return f"at most {told}" if value <= most else f"NOT at most {told}"


HEAD = (
    f"  {'contestant':<40} {'accuracy, % [95 %]':<22} {'loss':>6}  {'measured ratio [99 %]':<24} {'unused':>7}"
    f" {'search s':>9} {'recovery s':>10} {'sessions':>8} {'disturbed':>9}  before, validation %"
)


def _text(line: Line) -> str:
    interval = f"{_percent(line.accuracy)} [{_percent(line.interval[0])}, {_percent(line.interval[1])}]"
    bounds = f"[{line.bounds[0]:.4f}, {line.bounds[1]:.4f}]" if line.final else "(own search)"
    before = f"{_percent(line.before[1])} ({line.before[0]})" if line.before else "-"
    flag = "" if line.kept else "  BUDGET NOT KEPT"
    flag += f"  TRUNCATED: {line.truncated[0]} of {line.truncated[1]} epochs" if line.truncated else ""
    return (
        f"  {shown(line.net, line.contestant):<40} {interval:<22} {_points(line.loss):>6}"
        f"  {f'{line.ratio:.4f} {bounds}':<24} {100 * line.unused:6.1f}% {line.seconds:9.0f}"
        f" {line.recovery_seconds:10.0f} {line.sittings:8d} {line.contaminated:9d}"
        f"  {before}{flag}"
    )


def shown(net: str, contestant: str) -> str:
    """A contestant's name, and whether it takes a padded shortcut as it is."""
    whole = net in PADDED and contestant.startswith("torch-pruning-") and not contestant.endswith("-freed")
    return f"{contestant} (as is)" if whole else contestant


def _images(dense: Row) -> str:
    """What the intervals take the test images for."""
    effect, images = noise.design(dense), dense["images"]
    if effect == 1 and not dense["net"].endswith("_gtsrb"):
        return "  intervals take the test images as independent"
    told = "estimated on held-out tracks" if "design" in dense else "all frames of a sign taken to be alike"
    least = noise.wilson(dense["accuracy"], images, noise.FRAMES)
    return (
        f"  the test images are {images // noise.FRAMES} signs in {noise.FRAMES} frames: intervals are those of images"
        f" divided by a design effect, of dense {effect:.1f} ({told}); of so many independent signs, dense would have"
        f" [{_percent(least[0])}, {_percent(least[1])}]"
    )


def _without(store: Store, net: str, budget: str) -> list[str]:
    """Contestants that ended without a network, and why."""
    rows = [row for row in store.cells.values() if row["group"] == f"{net}/{budget}" and "onnx" not in row]
    reasons = {row["contestant"]: row.get("missed") or f"failed: {row['failed']}" for row in rows}
    took = {row["contestant"]: sum(row["seconds"].values()) for row in rows}
    return [f"  {shown(net, name):<40} {reason} ({took[name]:.0f} s)" for name, reason in sorted(reasons.items())]


def taken_on(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    return f"{row['machine']['cpu']}, {row['machine']['cores']} cores; {versions}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _points(share: float) -> str:
    return f"{100 * share:.2f}"


def record(store: Store, core: bool = False) -> dict[str, Any]:
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
        "criterion": [asdict(each) | {"verdict": each.verdict} for each in judged(store, core)],
    }  # fmt: skip
    return cast(dict[str, Any], finite(found))


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
