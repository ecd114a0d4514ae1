"""What the ablations say: a line each, and what every part is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from benchmarks.ablations.arms import ARMS, BUDGET, NET, OURS, Cell
from benchmarks.frontier.cells import DENSE, Store
from benchmarks.frontier.table import CONFIDENCE, finite, taken_on
from benchmarks.lines import Row


@dataclass(frozen=True)
class Result:
    """An ablation over its seeds; shares, not points. first: ratios that the first builds measured.

    ratio, bounds: of the common session where there is one, else of the cell's own (bounds: none). repaired, recovered:
    test accuracies of each seed. seconds: mean of search and repair. builds: mean number of them.
    """

    arm: str
    seeds: tuple[int, ...]
    ratios: tuple[float, ...]
    final: bool
    first: tuple[float, ...]
    repaired: tuple[float, ...]
    recovered: tuple[float, ...]
    seconds: float
    builds: float


@dataclass(frozen=True)
class Worth:
    """Accuracy lost without a part, the mean over the seeds that both have. half: of its 95 % interval, or NaN."""

    repaired: float
    repaired_half: float
    recovered: float
    recovered_half: float
    seeds: int


def results(store: Store) -> list[Result]:
    """Every ablation with a network, in their order."""
    every = [result(store, arm) for arm in ARMS]
    return [each for each in every if each is not None]


def result(store: Store, arm: str) -> Result | None:
    """One ablation, or None while no cell of it ended with a network."""
    group, rows = f"{NET}/{BUDGET}", dict[int, Row]()
    for row in store.cells.values():
        cell = Cell(row["net"], row["budget"], row["contestant"])
        if row["group"] == group and cell.contestant != DENSE and cell.arm == arm and "onnx" in row:
            rows[cell.seed] = row
    if not rows:
        return None
    rows = dict(sorted(rows.items()))
    measured = store.measured(group)
    final = all(row["contestant"] in measured for row in rows.values())
    ratios = [measured[row["contestant"]][0] if final else row["searched"] for row in rows.values()]
    tried = [row["facts"]["tried"] for row in rows.values()]
    seconds = [sum(took for step, took in row["seconds"].items() if step != "recover") for row in rows.values()]
    return Result(
        arm, tuple(rows), tuple(ratios), final, tuple(each[0][1] for each in tried if each),
        tuple(row["facts"]["repaired"] for row in rows.values()), tuple(row["accuracy"] for row in rows.values()),
        fmean(seconds), fmean(len(each) for each in tried),
    )  # fmt: skip


def worth(ours: Result, without: Result) -> Worth | None:
    """What is lost without a part, seed by seed; None where no seed has both."""
    both = sorted(set(ours.seeds) & set(without.seeds))
    if not both:
        return None

    def lost(of_ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
        mine, theirs = (dict(zip(r.seeds, v, strict=True)) for r, v in ((ours, of_ours), (without, others)))
        return interval([mine[seed] - theirs[seed] for seed in both])

    repaired, recovered = lost(ours.repaired, without.repaired), lost(ours.recovered, without.recovered)
    return Worth(*repaired, *recovered, len(both))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


# --- text ----------------------------------------------------------------------------------------------------------

HEAD = (
    f"  {'without':<20} {'seeds':>5}  {'measured ratio':<15} {'first build':<13} {'repaired, %':>11} {'epoch, %':>9}"
    f"  {'worth repaired, points':<24} {'worth after the epoch':<24} {'search s':>8} {'builds':>6}"
)


def table(store: Store) -> str:
    """Every ablation, what each part is worth, and what has no network."""
    dense = store.cells.get(f"{NET}/{DENSE}/{DENSE}")
    if dense is None or "accuracy" not in dense:
        return "no results yet"
    told = [
        f"{NET} at {BUDGET}: dense {100 * dense['accuracy']:.2f} % of {dense['images']} test images; {taken_on(dense)}",
        HEAD,
    ]
    every = results(store)
    ours = next((each for each in every if each.arm == OURS), None)
    told += [_text(each, worth(ours, each) if ours else None) for each in every]
    told += [f"  {row['contestant']:<20} {row.get('missed') or row.get('failed')}" for row in _without(store)]
    if ours:
        told += [sentence(each, found) for each in every if each.arm != OURS and (found := worth(ours, each))]
    return "\n".join(told)


def _without(store: Store) -> list[Row]:
    return [row for row in store.cells.values() if row["contestant"] != DENSE and "onnx" not in row]


def _text(each: Result, lost: Worth | None) -> str:
    ratio = f"{fmean(each.ratios):.4f}x{'' if each.final else ' (own)'}"
    first = f"{fmean(each.first):.4f}x" if each.first else "-"
    shown = "-" if lost is None or each.arm == OURS else _points(lost.repaired, lost.repaired_half)
    after = "-" if lost is None or each.arm == OURS else _points(lost.recovered, lost.recovered_half)
    return (
        f"  {each.arm:<20} {len(each.seeds):5d}  {ratio:<15} {first:<13} {100 * fmean(each.repaired):11.2f}"
        f" {100 * fmean(each.recovered):9.2f}  {shown:<24} {after:<24} {each.seconds:8.0f} {each.builds:6.1f}"
    )


def _points(value: float, half: float) -> str:
    return f"{100 * value:+.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")


def sentence(each: Result, lost: Worth) -> str:
    """What a part is worth, and whether that is more than the seeds scatter."""
    shown = abs(lost.recovered) > lost.recovered_half
    certain = "one seed says little" if lost.seeds < 2 else "shown" if shown else "NOT shown by these seeds"
    return (
        f"{ARMS[each.arm].worth}: worth {_points(lost.recovered, lost.recovered_half)} points after the epoch and"
        f" {_points(lost.repaired, lost.repaired_half)} before it ({certain})"
    )


def record(store: Store) -> dict[str, Any]:
    """The same as plain data, with what it was taken on."""
    dense, every = store.cells.get(f"{NET}/{DENSE}/{DENSE}", {}), results(store)
    ours = next((each for each in every if each.arm == OURS), None)
    told = [asdict(each) | {"worth": asdict(w) if ours and (w := worth(ours, each)) else None} for each in every]
    head = {key: dense.get(key) for key in ("accuracy", "images", "machine", "versions")}
    found: dict[str, Any] = finite({"net": NET, "budget": BUDGET, "dense": head, "ablations": told})
    return found
