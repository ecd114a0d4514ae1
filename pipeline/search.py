"""The loop between solver and device: choose widths, try them, correct what was believed, choose again.

Two beliefs are corrected. Losses: single edits do not add up, so the loss of each chosen plan after repair is measured,
and the values of its edits are scaled by (measured / believed)^½; the solver then sees what it had overlooked.
Latency: the best plans are narrowed from the dense ONNX and measured interleaved with the dense network; the table is
recalibrated with their ratios. Every plan starts from the dense network, so a round is a function of the plan alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.latency.feedback import recalibrate
from pipeline.latency.solvers.base import Solver, added_loss
from pipeline.nouns import LatencyTable, PruningPlan, Ranking, Sensitivity, Solution, Topology
from profiles.schema import PruneSpec

TRIES = 6
MEASURED = 3
AIM = 0.99


@dataclass(frozen=True)
class Measured:
    """Latency of a candidate relative to the dense network of the same session, with 99 % bounds."""

    ratio: float
    low: float
    high: float
    dense_ms: float

    @property
    def ms(self) -> float:
        """Latency of the candidate in milliseconds of its session."""
        return self.ratio * self.dense_ms


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried. loss: calibration divergence after repair."""

    plan: PruningPlan
    widths: Mapping[str, int]
    dropped: frozenset[str]
    predicted_ratio: float
    loss: float
    round: int
    measured: Measured | None = None


@dataclass(frozen=True)
class Round:
    """One turn: what was measured, with the correction that its predictions used, and what followed."""

    number: int
    candidates: tuple[Candidate, ...]
    correction: float
    spread: float
    said: str


@dataclass(frozen=True)
class Found:
    """How a search ended. chosen: the best candidate that was measured to keep the budget, or None. table: corrected."""

    chosen: Candidate | None
    rounds: tuple[Round, ...]
    tried: tuple[Candidate, ...]
    table: LatencyTable


@dataclass(frozen=True)
class Loop:
    """What a search needs of the other parts. ratio: the budget relative to the dense network.

    plan_for: widths and removed blocks -> plan. loss: of a plan after repair. measure: plans -> their latencies, together.
    """

    topology: Topology
    rankings: Mapping[str, Ranking]
    solver: Solver
    spec: PruneSpec
    plan_for: Callable[[Mapping[str, int], frozenset[str]], PruningPlan]
    loss: Callable[[PruningPlan], float]
    measure: Callable[[int, Sequence[PruningPlan]], Sequence[Measured]]
    progress: Callable[[str], None]


def search(loop: Loop, table: LatencyTable, sensitivity: Sensitivity, ratio: float) -> Found:
    """Rounds of choosing and measuring until the budget holds and little of it is left unused.

    Raises MissedError when no network that the table allows fits.
    """
    tried: dict[str, Candidate] = {}
    rounds: list[Round] = []
    dense_ms = dense_prediction(table, loop.topology)
    aim = AIM
    for number in range(1, loop.spec.rounds + 1):
        sensitivity = _explore(loop, table, sensitivity, ratio * aim * dense_ms, dense_ms, number, tried)
        fresh = _worth_measuring(tried.values(), table, dense_ms, ratio)
        results = loop.measure(number, [c.plan for c in fresh]) if fresh else ()
        now = [replace(c, measured=m, round=number) for c, m in zip(fresh, results, strict=True)]
        tried.update({c.plan.to_json(): c for c in now})
        before = table
        if now:
            table = recalibrate(table, [(c.widths, c.dropped, c.measured.ratio * dense_ms) for c in now if c.measured])
        best = _best(tried.values(), ratio)
        said, done = _verdict(best, now, ratio, loop.spec.slack)
        rounds.append(Round(number, tuple(now), before.correction, before.spread, said))
        loop.progress(f"round {number}: {said}")
        if done:
            break
        aim = min(aim, AIM) * _tighten(now, ratio)
    return Found(_best(tried.values(), ratio), tuple(rounds), tuple(tried.values()), table)


def dense_prediction(table: LatencyTable, topology: Topology) -> float:
    """What the uncorrected table says of the dense network: the unit in which ratios are predicted."""
    return replace(table, correction=1.0).predict({g.id: g.size for g in topology.groups}).ms


def _explore(
    loop: Loop, table: LatencyTable, sensitivity: Sensitivity, budget_ms: float, dense_ms: float, number: int, tried: dict[str, Candidate]
) -> Sensitivity:
    """Solve a few times with losses corrected by what the chosen plans really lose; what was tried is added to `tried`."""
    for _ in range(TRIES):
        solution = loop.solver.solve(list(loop.rankings.values()), sensitivity, table, loop.topology, budget_ms, loop.spec, None)
        plan = loop.plan_for(solution.widths, solution.dropped)
        key = plan.to_json()
        if key in tried and tried[key].round == number:
            break
        loss = tried[key].loss if key in tried else loop.loss(plan)
        if key not in tried:
            share = table.predict(solution.widths, solution.dropped).ms / dense_ms
            tried[key] = Candidate(plan, dict(solution.widths), solution.dropped, share, loss, number)
        elif tried[key].measured is None:
            tried[key] = replace(tried[key], round=number)
        believed = added_loss(sensitivity, loop.topology, solution.widths, solution.dropped)
        sensitivity = _corrected(sensitivity, loop.topology, solution, loss, believed)
    return sensitivity


def _corrected(sensitivity: Sensitivity, topology: Topology, solution: Solution, loss: float, believed: float) -> Sensitivity:
    """Scale the values of a plan's edits toward the loss that was measured."""
    factor = min(4.0, max(0.5, (max(loss, 1e-9) / max(believed, 1e-9)) ** 0.5))
    sizes = {group.id: group for group in topology.groups}
    groups = {}
    for id, curve in sensitivity.groups.items():
        group = sizes[id]
        cut = solution.widths[id] < group.size and group.block not in solution.dropped
        groups[id] = {width: value * factor for width, value in curve.items()} if cut else dict(curve)
    blocks = {id: value * (factor if id in solution.dropped else 1.0) for id, value in sensitivity.blocks.items()}
    return Sensitivity(groups, blocks)


def _worth_measuring(tried: Sequence[Candidate] | object, table: LatencyTable, dense_ms: float, ratio: float) -> list[Candidate]:
    """The candidates of lowest loss that have no measurement yet and are predicted near the budget."""
    near = []
    for candidate in tried:  # type: ignore[attr-defined]
        share = table.predict(candidate.widths, candidate.dropped).ms / dense_ms
        if candidate.measured is None and share <= ratio * 1.02:
            near.append(replace(candidate, predicted_ratio=share))
    return sorted(near, key=lambda c: c.loss)[:MEASURED]


def keeps(measured: Measured, ratio: float) -> bool:
    """The upper bound of the measured ratio is within the budget."""
    return measured.high <= ratio


def _best(tried: object, ratio: float) -> Candidate | None:
    """Of the candidates that keep the budget the one of lowest loss."""
    good = [c for c in tried if c.measured is not None and keeps(c.measured, ratio)]  # type: ignore[attr-defined]
    return min(good, key=lambda c: c.loss, default=None)


def _verdict(best: Candidate | None, now: Sequence[Candidate], ratio: float, slack: float) -> tuple[str, bool]:
    if not now:
        return "no other plan fits; the search has settled", True
    told = ", ".join(f"{c.measured.ratio:.3f}x" for c in now if c.measured)
    if best is None or best.measured is None:
        return f"measured {told}, budget {ratio:.3f}x is not kept yet", False
    unused = 1 - best.measured.ratio / ratio
    if unused < slack:
        return f"measured {told}, kept with {100 * unused:.1f} % unused", True
    return f"measured {told}, kept, and {100 * unused:.1f} % is unused", False


def _tighten(now: Sequence[Candidate], ratio: float) -> float:
    """How much lower to aim when everything measured is above the budget although the table was corrected."""
    above = [c.measured.high / ratio for c in now if c.measured]
    return 1.0 if not above or min(above) <= 1.0 else max(0.95, 1.0 / min(above))
