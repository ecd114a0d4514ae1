"""The loop between solver and device: choose widths, try them, correct what was believed, choose again.

Two beliefs are corrected. Losses: values of single cuts do not add up, so around each chosen plan the value of every
edit is measured again while the others stay as they are, and the programme is solved with these; the plan of lowest
measured loss is kept. Latency: the best plans are narrowed from the dense ONNX and measured interleaved with the dense
network, and the table is recalibrated with their ratios. A later round begins around the best candidates measured so
far, and measures only what loses less than those that keep the budget. Every plan starts from the dense network: a
round is a function of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.latency.feedback import Seen, near, recalibrate, residuals
from pipeline.latency.solvers.base import Solver
from pipeline.nouns import LatencyTable, PruningPlan, Ranking, Sensitivity, Solution, Topology
from pipeline.prune.sensitivity import LOOKS, around
from profiles.errors import DeployError, MissedError
from profiles.schema import PruneSpec

EVALUATIONS = (140, 60)
"""How many plans may be tried to measure values around chosen ones, in the first round and in each later one, for a
network of ResNet-20's or -56's size: four turns or two. A count and not a time, so that a resumed run searches the
same; large networks get fewer (`Loop.effort`), down to a quarter."""

MEASURED = 3
AIM = 0.975
"""The share of the budget that is solved for, and the share below which a short measurement counts as keeping it: the
accepting measurement then has room for its interval."""

NEARER = 0.98
"""The share that is solved for when the search settled with more of the budget unused than the slack."""

KEEPS = 0.985
NEAR = 1.02


@dataclass(frozen=True)
class Measured:
    """Latency of a candidate relative to the dense network of the same session, with 99 % bounds.

    device: digest of the session's fingerprint, where later builds may believe it; None when it was contaminated.
    """

    ratio: float
    low: float
    high: float
    dense_ms: float
    device: str | None = None

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

    @property
    def ratio(self) -> float:
        """Latency relative to the dense network: measured, else predicted."""
        return self.measured.ratio if self.measured else self.predicted_ratio

    @property
    def seen(self) -> Seen:
        """What the table's corrections are made from."""
        return self.widths, self.dropped, self.ratio


@dataclass(frozen=True)
class Round:
    """One turn: what was measured, the correction of the table around the plan it ended at, and what followed."""

    number: int
    candidates: tuple[Candidate, ...]
    correction: float
    spread: float
    said: str


@dataclass(frozen=True)
class Found:
    """How a search ended. chosen: the best candidate measured to keep the budget, or None. table: corrected."""

    chosen: Candidate | None
    rounds: tuple[Round, ...]
    tried: tuple[Candidate, ...]
    table: LatencyTable

    @property
    def seen(self) -> list[Seen]:
        """What was measured."""
        return [c.seen for c in self.tried if c.measured]

    def lasting(self, device: str) -> list[Seen]:
        """What was measured on this device in sessions that were not contaminated, for later builds."""
        return [c.seen for c in self.tried if c.measured and c.measured.device == device]


@dataclass(frozen=True)
class Loop:
    """What a search needs of the other parts.

    plan_for: widths and removed blocks -> plan. loss: of a plan after repair. recovered: after a short recovery too.
    measure: plans -> their latencies, taken together. effort: share of EVALUATIONS that a network of this size is
    worth.
    """

    topology: Topology
    rankings: Mapping[str, Ranking]
    solver: Solver
    spec: PruneSpec
    plan_for: Callable[[Mapping[str, int], frozenset[str]], PruningPlan]
    loss: Callable[[PruningPlan], float]
    recovered: Callable[[PruningPlan], float]
    measure: Callable[[str, Sequence[PruningPlan]], Sequence[Measured]]
    progress: Callable[[str], None]
    effort: float = 1.0


@dataclass(frozen=True)
class Choice:
    """Widths of all groups and the removed blocks."""

    widths: Mapping[str, int]
    dropped: frozenset[str]

    @classmethod
    def of(cls, solution: Solution) -> Choice:
        """What a solver chose."""
        return cls(solution.widths, solution.dropped)


class Trials:
    """A search as a solver sees it that tries its choices (`nouns.Trial`)."""

    def __init__(self, search: Search, number: int) -> None:
        self.search, self.number, self.asked = search, number, 0
        self.known: dict[str, float] = {}

    def loss(self, choice: Solution) -> float:
        """Calibration loss after local repair."""
        return self.search._loss(self.number, choice.widths, choice.dropped)

    def recovered(self, choice: Solution) -> float:
        """Calibration loss after a short recovery."""
        plan = self.search.loop.plan_for(choice.widths, choice.dropped)
        key = plan.to_json()
        if key not in self.known:
            self.known[key] = self.search.loop.recovered(plan)
        return self.known[key]

    def measure(self, choices: Sequence[Solution]) -> list[float]:
        """Latency on the target, measured in sessions of a few."""
        self.asked += 1
        return self.search.latencies(f"round {self.number} trial {self.asked}", choices)


class Search:
    """Rounds of choosing and measuring until the budget holds and little of it is left unused.

    ratio: the budget relative to the dense network. table and values are what is believed, and are corrected. known:
    candidates that were measured before this search.
    """

    def __init__(
        self, loop: Loop, table: LatencyTable, values: Sensitivity, ratio: float, known: Sequence[Seen] = ()
    ) -> None:
        self.loop, self.values, self.ratio, self.known = loop, values, ratio, known
        self.single = values
        self.residuals = residuals(table, known)
        self.table = recalibrate(table, self.residuals, ratio)
        self.tried: dict[str, Candidate] = {}
        self.asked: set[str] = set()
        self.confirmed: set[str] = set()
        self.rounds: list[Round] = []
        self.aim = AIM

    def run(self) -> Found:
        """Search. Raises MissedError when no network that the table allows fits."""
        for number in range(1, self.loop.spec.rounds + 1):
            now = self._turn(number)
            if not now and self._far():
                self.aim = NEARER
                now = self._turn(number)
            before = self.table
            self.residuals = residuals(before, [*self.known, *(c.seen for c in self.tried.values() if c.measured)])
            self.table = recalibrate(before, self.residuals, self.ratio)
            said, done = self._verdict(now)
            self.rounds.append(Round(number, tuple(now), before.correction, before.spread, said))
            self.loop.progress(f"round {number}: {said}")
            if done:
                break
            self.aim = self._next_aim(now)
        return Found(self.best, tuple(self.rounds), tuple(self.tried.values()), self.table)

    def _turn(self, number: int) -> list[Candidate]:
        """Candidates that were measured for the first time, those that a solver measured itself among them."""
        before = {key for key, c in self.tried.items() if c.measured}
        most = EVALUATIONS[0] if number == 1 else EVALUATIONS[1]
        self._explore(number, round(most * min(1.0, max(0.25, self.loop.effort))))
        self._measure(number)
        return [c for key, c in self.tried.items() if c.measured and key not in before]

    @property
    def best(self) -> Candidate | None:
        """Of the candidates that were measured to keep the budget the one of lowest loss."""
        good = [c for c in self.tried.values() if c.measured is not None and c.measured.ratio <= self.ratio * KEEPS]
        return min(good, key=lambda c: c.loss, default=None)

    def _explore(self, number: int, evaluations: int) -> None:
        """From several starts, go from choice to choice while the measured loss falls, until so many plans were tried.

        Where one look around leads nowhere, the next of LOOKS is tried. On a made-up device whose best choices are
        known (tests/pipeline/test_search.py), the chosen ones lose 0.4 % more than these, 2.5 % with the first look
        alone, 5.4 % from the first start alone; on MobileNetV1/VWW at 0.5x they lost 4 and 17 % less than with the
        first look alone, on ResNet-20/GTSRB as much.

        A solver that tries by itself, or whose choice depends on no values, is asked once.

        A later round starts at the best candidate so far, to spend what that leaves of the budget, and at the fastest
        of those above the budget that lose less, to cut it a little more; the one whose latency is nearer to the aim
        is first.
        """
        loop = self.loop
        if loop.solver.TRIES or not loop.solver.VALUES:
            trials = Trials(self, number) if loop.solver.TRIES else None
            try:
                choice = self._solve(self.values, self._budget_ms(), trials=trials)
            except MissedError:
                if number == 1:  # later it means that the corrected table has nothing more that fits
                    raise
                return
            self._loss(number, choice.widths, choice.dropped)
            return
        before = len(self.asked)
        seen: set[tuple[PruningPlan, str]] = set()
        for here in self._measured_starts() if self.best else self._starts(number):
            looks = list(LOOKS)
            while looks:
                plan, look = loop.plan_for(here.widths, here.dropped), looks.pop(0)
                if (plan, look) in seen:
                    break
                if seen and len(self.asked) - before + self._edits() > evaluations:
                    return
                seen.add((plan, look))
                self._look_around(number, here, look)
                after = self._step(number, here)
                if loop.plan_for(after.widths, after.dropped) != plan:
                    here, looks = after, list(LOOKS)

    def _starts(self, number: int) -> Iterator[Choice]:
        """What the solver makes of several beliefs, the choice that loses least first."""
        values, table = self.single, self.table
        found: dict[PruningPlan, tuple[float, Choice]] = {}
        for believed, spec in self._beliefs():
            try:
                choice = Choice.of(self._solve(believed, self._budget_ms(), spec))
            except DeployError:
                if not self.tried:  # the first of all: nothing fits, and the error says what would
                    raise
                continue
            plan = self.loop.plan_for(choice.widths, choice.dropped)
            found[plan] = self._loss(number, choice.widths, choice.dropped), choice
        for _, choice in sorted(found.values(), key=lambda start: start[0]):
            self.values, self.table = values, table
            yield choice

    def _beliefs(self) -> list[tuple[Sensitivity, PruneSpec]]:
        """The values of single cuts, their roots, cuts that are all alike; the first two where no block goes.

        Roots, since a divergence grows with the square of an error: where the errors of cuts point the same way, the
        loss of all is the square of the sum of their roots. Losses of choices have many local minima: what each of
        these is worth, `benchmarks/starts.py` measures.
        """
        values, choices, asked = self.single, self.table.choices, self.loop.spec
        roots = Sensitivity(
            {id: {width: _root(loss) for width, loss in curve.items()} for id, curve in values.groups.items()},
            {id: _root(loss) for id, loss in values.blocks.items()},
        )
        alike = Sensitivity(
            {g.id: {w: (1 - w / g.size) ** 2 for w in choices[g.id]} for g in self.loop.topology.offered},
            dict.fromkeys(values.blocks, 1.0),
        )
        beliefs = [(values, asked), (roots, asked), (alike, asked)]
        if asked.drop_blocks and self.loop.topology.removable:
            whole = asked.model_copy(update={"drop_blocks": False})
            beliefs += [(values, whole), (roots, whole)]
        return beliefs

    def _measured_starts(self) -> list[Choice]:
        """The best candidate, and the fastest of those that lose less, which are all above the budget."""
        best = self.best
        assert best is not None
        above = min(
            (c for c in self.tried.values() if c.measured and c.loss < best.loss), key=lambda c: c.ratio, default=best
        )
        aimed = self.ratio * self.aim
        nearer = sorted((best, above), key=lambda c: abs(math.log(c.ratio / aimed)))
        return [Choice(c.widths, c.dropped) for c in nearer]

    def _step(self, number: int, here: Choice) -> Choice:
        """What the solver makes of the values around this choice, where that loses less; else this one.

        A choice that is predicted to be above the budget gives way to any other, unless it was measured to keep it.
        """
        loop, best = self.loop, self.best
        self.table = near(self.table, self.residuals, here.widths, here.dropped)
        budget_ms, ms = self._budget_ms(), self.table.predict(here.widths, here.dropped).ms
        known = self._loss(number, here.widths, here.dropped)
        if best is not None and loop.plan_for(here.widths, here.dropped) == best.plan:
            budget_ms = max(budget_ms, ms)
        elif ms > budget_ms * NEAR:
            known = math.inf
        try:
            choice = Choice.of(self._solve(self.values, budget_ms))
        except DeployError:
            return here
        return choice if self._loss(number, choice.widths, choice.dropped) < known else here

    def _budget_ms(self) -> float:
        return self.ratio * self.aim * self.table.dense_ms

    def _solve(
        self, values: Sensitivity, budget_ms: float, spec: PruneSpec | None = None, trials: Trials | None = None
    ) -> Solution:
        loop = self.loop
        rankings = list(loop.rankings.values())
        return loop.solver.solve(rankings, values, self.table, loop.topology, budget_ms, spec or loop.spec, trials)

    def _look_around(self, number: int, here: Choice, look: str) -> None:
        """Measure the value of every edit while the others stay as they are in this choice."""
        self.values = around(
            lambda near, without: self._loss(number, near, without),
            self.loop.topology, self.table.choices, here.widths, here.dropped, self.values,
            look=look, blocks=self.loop.spec.drop_blocks,
        )  # fmt: skip

    def latencies(self, name: str, choices: Sequence[Solution]) -> list[float]:
        """Measured latencies of choices in the table's milliseconds; they become candidates that were measured."""
        plans = [self.loop.plan_for(choice.widths, choice.dropped) for choice in choices]
        open_ = {p.to_json(): (p, c) for p, c in zip(plans, choices, strict=True)}
        for key, (_, choice) in open_.items():
            if key not in self.tried:
                self._loss(len(self.rounds) + 1, choice.widths, choice.dropped)
        new = [key for key in open_ if self.tried[key].measured is None]
        for start in range(0, len(new), MEASURED):
            part = new[start : start + MEASURED]
            results = self.loop.measure(f"{name} {start // MEASURED + 1}", [open_[key][0] for key in part])
            for key, measured in zip(part, results, strict=True):
                c = self.tried[key]
                share = self._share(c.widths, c.dropped)
                self.tried[key] = replace(c, predicted_ratio=share, round=len(self.rounds) + 1, measured=measured)
        return [self.tried[plan.to_json()].ratio * self.table.dense_ms for plan in plans]

    def _edits(self) -> int:
        """About how many plans one turn of measuring values tries."""
        topology = self.loop.topology
        widths = sum(min(3, len(self.table.choices[group.id])) for group in topology.offered)
        return max(1, widths + len(topology.removable) * self.loop.spec.drop_blocks)

    def _loss(self, number: int, widths: Mapping[str, int], dropped: frozenset[str]) -> float:
        """Measured loss of a choice; one whose widths are all in the table becomes a candidate."""
        inside = {g.id: g.size for g in self.loop.topology.offered if g.block in dropped}
        widths = {**widths, **inside}  # as solvers give them: what lives in a removed block is whole
        plan = self.loop.plan_for(widths, dropped)
        key = plan.to_json()
        if key in self.tried:
            return self.tried[key].loss
        loss = self.loop.loss(plan)
        self.asked.add(key)
        try:
            share = self._share(widths, dropped)
        except KeyError:  # a sum of widths that the table does not hold: good for a value, not for a candidate
            return loss
        self.tried[key] = Candidate(plan, dict(widths), dropped, share, loss, number)
        return loss

    def _share(self, widths: Mapping[str, int], dropped: frozenset[str]) -> float:
        return near(self.table, self.residuals, widths, dropped).predict(widths, dropped).ms / self.table.dense_ms

    def _measure(self, number: int) -> None:
        """Measure the candidates of lowest loss that are predicted to fit and have not been measured.

        Where one is known to keep the budget, only such as lose less.
        """
        fitting, best = [], self.best
        for c in self.tried.values():
            share = self._share(c.widths, c.dropped)
            worth = c.measured is None and (best is None or c.loss < best.loss)
            if worth and share <= self.ratio * self.aim * NEAR:
                fitting.append(replace(c, predicted_ratio=share, round=number))
        chosen = sorted(fitting, key=lambda c: c.loss)[:MEASURED]
        results = self.loop.measure(f"round {number}", [c.plan for c in chosen]) if chosen else ()
        self.tried |= {c.plan.to_json(): replace(c, measured=m) for c, m in zip(chosen, results, strict=True)}
        while (best := self.best) is not None and (key := best.plan.to_json()) not in self.confirmed:
            self.confirmed.add(key)
            self.tried[key] = self._confirmed(number, best)

    def _confirmed(self, number: int, best: Candidate) -> Candidate:
        """Measure the best candidate once more: the fastest of several short measurements flatters itself."""
        (again,) = self.loop.measure(f"confirm {number}", [best.plan])
        first = best.measured
        assert first is not None
        ratio, low, high = math.sqrt(first.ratio * again.ratio), min(first.low, again.low), max(first.high, again.high)
        device = first.device if first.device == again.device else None
        return replace(best, measured=Measured(ratio, low, high, again.dense_ms, device))

    def _verdict(self, now: Sequence[Candidate]) -> tuple[str, bool]:
        best = self.best
        if not now and best is None:
            return f"no further plan is predicted to fit, budget {self.ratio:.3f}x is not kept", True
        if not now:
            return "no plan that is predicted to fit loses less; the search has settled", True
        ratios = [f"{c.ratio:.3f}x" for c in now]
        told = ", ".join(ratios) if len(now) <= 2 * MEASURED else f"{len(now)} from {min(ratios)} to {max(ratios)}"
        if best is None:
            return f"measured {told}, budget {self.ratio:.3f}x is not kept yet", False
        kept = f"measured {told}, best {best.ratio:.3f}x, {100 * self._unused():.1f} % of the budget unused"
        return kept, self._unused() < self.loop.spec.slack

    def _far(self) -> bool:
        """Whether much of the budget is unused and the solver was not yet asked for plans nearer to it."""
        return not self.loop.solver.TRIES and self.aim < NEARER and self.loop.spec.slack <= self._unused() < math.inf

    def _unused(self) -> float:
        """Part of the budget that the best candidate leaves; infinite when none keeps it."""
        return 1 - self.best.ratio / self.ratio if self.best else math.inf

    def _next_aim(self, now: Sequence[Candidate]) -> float:
        """Lower when everything that was measured is above the budget although the table was corrected."""
        least = min(c.measured.ratio for c in now if c.measured)
        predicted = min(self._share(c.widths, c.dropped) for c in now)
        return max(AIM, self.aim) if least <= self.ratio * KEEPS else max(0.9 * AIM, AIM * min(1.0, predicted / least))


def _root(loss: float) -> float:
    """Rounding may leave a loss of nothing a little below 0."""
    return math.sqrt(max(loss, 0.0))
