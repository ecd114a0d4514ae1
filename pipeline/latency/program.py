"""A choice of widths and blocks as a mixed-integer programme: exact, because latency is a sum over small tables.

    x[g, w]  binary   group g has width w                 sum_w x[g, w] = 1 - d[b], b the removable block around g
    d[b]     binary   block b is removed
    p[a, b]  >= 0     joint of two summed widths          sum_b p[a, b] = P(a), sum_a p[a, b] = P(b)
    z[s, k]  >= 0     site s runs at the widths k         sum over k with dim i at v of z[s, k] = P(dim i = v)
    y[s, o]  >= 0     its branch is gone, outer widths o  z and y share the outer marginals

    minimise    sum loss[g, w] x[g, w] + sum loss[b] d[b] + tie * latency
    subject to  latency = sum ms[s, k] z[s, k] + sum dropped_ms[s, o] y[s, o] + fixed <= budget

P(.) of a dim over one group is x itself. A dim that sums groups (a padded stream, a concatenation) is a chain of
pairwise joints p, longest known part first, so the grid belongs to the sum: sums that the table does not hold get no
column. With whole x and d the marginals leave z, y and p one whole value each (transport form), so only x and d are
branched on.
The one-hot form with bilinear cost is that of MDP (Sun et al., 2025); the marginals make it linear.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from pipeline.latency.solvers.base import FIT, added_loss, allowed_widths, droppable, infeasible
from pipeline.nouns import Dim, LatencyTable, Sensitivity, SiteCost, Solution, Topology
from profiles.errors import DeployError
from profiles.schema import PruneSpec

Columns = dict[int, list[int]]
"""Value of a channel count -> columns whose sum is 1 when it is taken."""


NEAR = 0.03
"""First reach beyond the relaxation, relative to its value."""

WIDEN = 4.0
"""Factor on the reach while nothing was found within it."""

TINY = 1e-6


@dataclass(frozen=True)
class Answer:
    """point: one value a column, or None; bound: no answer is below it; done: solved to the end (or proven empty)."""

    point: NDArray[np.float64] | None
    bound: float
    done: bool


@dataclass
class Spread:
    """Where a channel count can lie. block: the removable block without which it has no value, or None."""

    columns: Columns
    block: str | None = None


@dataclass
class Program:
    """Columns and rows of the programme, built by `formulate`. latency and loss hold one coefficient a column."""

    x: dict[str, dict[int, int]] = field(default_factory=dict)
    d: dict[str, int] = field(default_factory=dict)
    latency: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    constant_ms: float = 0.0
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def column(self, *, ms: float = 0.0, loss: float = 0.0, whole: bool = False) -> int:
        """Add a column between 0 and 1 and return its index."""
        self.latency.append(ms)
        self.loss.append(loss)
        self.whole.append(1 if whole else 0)
        self.upper.append(1.0)
        return len(self.latency) - 1

    def row(self, terms: Iterable[tuple[int, float]], low: float, high: float) -> None:
        """Add low <= sum of coefficient * column <= high."""
        index = len(self.low)
        self.entries.extend((index, column, value) for column, value in terms)
        self.low.append(low)
        self.high.append(high)

    def minimise(
        self,
        objective: NDArray[np.float64],
        *,
        budget_ms: float | None = None,
        seconds: float = 15.0,
        incumbent: float = np.inf,
    ) -> Answer:
        """Minimise over the programme, with the latency held at or below `budget_ms` where given.

        incumbent: value of a known answer. The linear relaxation comes first, value L and reduced costs r. A column
        with r > reach has no part in an answer of value <= L + reach, so the whole programme is solved over the other
        columns only; when its value is above L + reach, the reach is widened to it and it is solved again.
        """
        until = time.monotonic() + seconds
        limits = self._limits(budget_ms)
        upper = np.array(self.upper)
        relaxed, floor, reduced = _relax(objective, limits, upper, seconds)
        if not relaxed:
            return Answer(None, np.inf if floor == np.inf else -np.inf, False)
        room = incumbent - floor
        reach = min(room, NEAR * max(abs(floor), 1e-9))
        best: NDArray[np.float64] | None = None
        while True:
            near = np.where(reduced <= reach + TINY, upper, 0.0)
            left = max(until - time.monotonic(), 0.05)
            with _stdout_kept():
                result = milp(
                    objective,
                    integrality=np.array(self.whole),
                    bounds=Bounds(0.0, near),
                    constraints=limits,
                    options={"time_limit": left, "mip_rel_gap": TINY},
                )
            if result.x is not None and (best is None or result.fun < floor + room):
                best, room = result.x, min(room, result.fun - floor)
            if result.status == 1 or time.monotonic() > until:
                proven = result.mip_dual_bound if result.mip_dual_bound is not None else floor
                return Answer(best, max(floor, min(float(proven), floor + reach)), False)
            if room <= reach + TINY or bool(np.all(near == upper)):
                return Answer(best, floor + min(room, reach) if best is None else float(objective @ best), True)
            reach = room if np.isfinite(room) else reach * WIDEN

    def _limits(self, budget_ms: float | None) -> LinearConstraint:
        """All rows, and the budget scaled to one."""
        rows, columns, values = (list(part) for part in zip(*self.entries, strict=True))
        low, high = list(self.low), list(self.high)
        if budget_ms is not None:
            room = budget_ms - self.constant_ms
            scale = max(abs(room), 1e-9)
            spent = [(column, ms / scale) for column, ms in enumerate(self.latency) if ms]
            rows += [len(low)] * len(spent)
            columns += [column for column, _ in spent]
            values += [value for _, value in spent]
            low.append(-np.inf)
            high.append(room / scale)
        matrix = csr_array((values, (rows, columns)), shape=(len(low), len(self.latency)))
        return LinearConstraint(matrix, np.array(low), np.array(high))

    def decode(self, point: NDArray[np.float64], topology: Topology) -> tuple[dict[str, int], frozenset[str]]:
        """Widths and removed blocks of a solved point; what lives in a removed block is given its full size."""
        dropped = frozenset(block for block, column in self.d.items() if point[column] > 0.5)
        widths = {}
        for group in topology.groups:
            options = self.x[group.id]
            best = max(options, key=lambda width: float(point[options[width]]))
            widths[group.id] = group.size if group.block in dropped else best
        return widths, dropped


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send what the solver's library prints by itself to standard error: standard output is the caller's."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _relax(
    objective: NDArray[np.float64], limits: LinearConstraint, upper: NDArray[np.float64], seconds: float
) -> tuple[bool, float, NDArray[np.float64]]:
    """Solve the linear relaxation: (solved, value, reduced costs); the value is infinite where it has no answer."""
    equal = limits.lb == limits.ub
    above, below = ~equal & np.isfinite(limits.ub), ~equal & np.isfinite(limits.lb)
    rows = vstack([limits.A[above], -limits.A[below]]).tocsr()
    result = linprog(
        objective,
        A_ub=rows if rows.shape[0] else None,
        b_ub=np.concatenate([limits.ub[above], -limits.lb[below]]) if rows.shape[0] else None,
        A_eq=limits.A[equal],
        b_eq=limits.ub[equal],
        bounds=np.stack([np.zeros(len(upper)), upper], axis=1),
        method="highs",
        options={"time_limit": seconds},
    )
    if result.status == 0:
        return True, float(result.fun), np.asarray(result.lower.marginals)
    return False, np.inf if result.status == 2 else -np.inf, np.zeros(len(upper))


def formulate(
    table: LatencyTable,
    topology: Topology,
    spec: PruneSpec,
    sensitivity: Sensitivity | None,
    ceiling: float = np.inf,
) -> Program:
    """The programme of a table.

    ceiling: a cut that adds more than this above the best of its group cannot be in a better answer and is left out.
    """
    program = Program()
    blocks = droppable(topology, spec, sensitivity)
    for block in blocks:
        loss = sensitivity.blocks[block] if sensitivity else 0.0
        program.d[block] = program.column(loss=loss, whole=True)
        program.upper[-1] = float(loss - min(loss, 0.0) <= ceiling)
    options = allowed_widths(table, topology, sensitivity)
    for group in topology.groups:
        _one_hot(program, group.id, group.block, group.size, options[group.id], sensitivity, ceiling)
    homes = {group.id: group.block for group in topology.groups if group.block in program.d}
    spreads: dict[Dim, Spread] = {}
    joints: dict[frozenset[tuple[str, int]], Spread] = {}
    wanted = _seen_values(table)
    for cost in table.sites:
        for dim in sorted(cost.site.dims, key=lambda dim: len(dim.terms)):
            if dim not in spreads:
                spreads[dim] = _spread(program, dim, homes, joints, wanted)
    for cost in table.sites:
        _site(program, cost, spreads)
    program.constant_ms += table.fixed_ms
    return program


def _one_hot(
    program: Program,
    group: str,
    block: str | None,
    size: int,
    options: Sequence[int],
    sensitivity: Sensitivity | None,
    ceiling: float,
) -> None:
    valued = sensitivity is not None and group in sensitivity.groups
    losses = {w: sensitivity.loss(group, w) if sensitivity and valued else 0.0 for w in options}
    best = min(0.0, *losses.values())
    columns: dict[int, int] = {}
    for width, loss in losses.items():
        if loss - best <= ceiling or width == size:
            columns[width] = program.column(loss=loss, whole=True)
    program.x[group] = columns
    gone = [(program.d[block], 1.0)] if block in program.d else []
    program.row([(column, 1.0) for column in columns.values()] + gone, 1.0, 1.0)


def _seen_values(table: LatencyTable) -> dict[Dim, frozenset[int]]:
    """Dim -> channel counts at which some site of it has a row; nothing else may be taken."""
    seen: dict[Dim, frozenset[int]] = {}
    for cost in table.sites:
        keys = [*cost.ms, *cost.dropped_ms]
        for position, dim in enumerate(cost.site.dims):
            values = frozenset(key[position] for key in keys)
            seen[dim] = seen[dim] & values if dim in seen else values
    return seen


def _spread(
    program: Program,
    dim: Dim,
    homes: Mapping[str, str | None],
    joints: dict[frozenset[tuple[str, int]], Spread],
    wanted: Mapping[Dim, frozenset[int]],
) -> Spread:
    """Columns of a dim's values, shifted by its constant and cut to what the table holds."""
    if not dim.terms:
        return Spread({dim.constant: []})
    total = _sum(program, dim.terms, homes, joints)
    columns: Columns = {}
    for value, members in total.columns.items():
        if value + dim.constant in wanted[dim]:
            columns[value + dim.constant] = members
        else:
            for member in members:
                program.upper[member] = 0.0
    return Spread(columns, total.block)


def _sum(
    program: Program,
    terms: Sequence[tuple[str, int]],
    homes: Mapping[str, str | None],
    joints: dict[frozenset[tuple[str, int]], Spread],
) -> Spread:
    """Spread of a weighted sum of groups, from the largest part already built plus one group at a time."""
    whole = frozenset(terms)
    if whole in joints:
        return joints[whole]
    if len(whole) == 1:
        ((group, coefficient),) = whole
        spread = Spread({coefficient * w: [c] for w, c in program.x[group].items()}, homes.get(group))
        joints[whole] = spread
        return spread
    known = [part for part in joints if part < whole]
    base = max(known, key=lambda part: (len(part), sorted(part)), default=frozenset(terms[:1]))
    if len(base) <= 1:
        base = frozenset(terms[:-1])
    rest = [term for term in terms if term not in base]
    spread = _sum(program, [term for term in terms if term in base], homes, joints)
    part = base
    for term in rest:
        spread = _joint(program, spread, _sum(program, [term], homes, joints))
        part = part | {term}
        joints[part] = spread
    return spread


def _joint(program: Program, first: Spread, second: Spread) -> Spread:
    """Spread of the sum of two: one column a pair, tied to both marginals."""
    block = first.block or second.block
    columns: Columns = {}
    of_first: Columns = {value: [] for value in first.columns}
    of_second: Columns = {value: [] for value in second.columns}
    for a, b in itertools.product(first.columns, second.columns):
        column = program.column()
        columns.setdefault(a + b, []).append(column)
        of_first[a].append(column)
        of_second[b].append(column)
    for spread, parts in ((first, of_first), (second, of_second)):
        for value, members in parts.items():
            _marginal(program, members, spread.columns[value], exact=spread.block == block)
    return Spread(dict(sorted(columns.items())), block)


def _marginal(program: Program, parts: Sequence[int], whole: Sequence[int], *, exact: bool) -> None:
    """sum(parts) = sum(whole), or at most that where the parts vanish with a block and the whole does not."""
    terms = [(column, 1.0) for column in parts] + [(column, -1.0) for column in whole]
    program.row(terms, 0.0 if exact else -np.inf, 0.0)


def _site(program: Program, cost: SiteCost, spreads: Mapping[Dim, Spread]) -> None:
    """Latency of one site: straight onto the columns of its only varying dim, else joint columns z and y."""
    parts = [spreads[dim] for dim in cost.site.dims]
    free = [i for i, spread in enumerate(parts) if _varies(spread)]
    ms = _project(cost.ms, parts, free)
    if not ms:
        raise DeployError(f"site '{cost.site.id}' has no row at any width that its groups can take.", "deploy gc")
    block = cost.site.block if cost.site.block in program.d else None
    gone = _project(cost.dropped_ms, parts, [i for i in free if parts[i].block != block]) if block else {}
    if block is None and not free:
        program.constant_ms += ms[()]
    elif len(free) == 1 and parts[free[0]].block == block and len(set(gone.values())) <= 1:
        for value, columns in parts[free[0]].columns.items():
            for column in columns:
                program.latency[column] += ms.get((value,), 0.0)
                program.upper[column] *= float((value,) in ms)
        if block and gone:
            program.latency[program.d[block]] += next(iter(gone.values()))
    else:
        _transport(program, ms, gone, parts, free, block)


def _varies(spread: Spread) -> bool:
    return len(spread.columns) > 1


def _project(
    ms: Mapping[tuple[int, ...], float], parts: Sequence[Spread], axes: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """Costs over some axes only, at the widths that can be taken; the others are fixed or do not matter."""
    out: dict[tuple[int, ...], float] = {}
    for key, value in ms.items():
        if all(size in spread.columns for size, spread in zip(key, parts, strict=True)):
            short = tuple(key[i] for i in axes)
            out[short] = min(value, out.get(short, np.inf))
    return out


def _transport(
    program: Program,
    ms: Mapping[tuple[int, ...], float],
    gone: Mapping[tuple[int, ...], float],
    parts: Sequence[Spread],
    free: Sequence[int],
    block: str | None,
) -> None:
    """Joint columns of a site. z has the mass of the branch that stays, y that of the branch that is gone."""
    z = {key: program.column(ms=value) for key, value in ms.items()}
    outer = [i for i in free if block is None or parts[i].block != block]
    flat = len(set(gone.values())) <= 1
    y = {} if flat else {key: program.column(ms=value) for key, value in gone.items()}
    if block and gone and flat:
        program.latency[program.d[block]] += next(iter(gone.values()))
    for position, axis in enumerate(free):
        members: Columns = {value: [] for value in parts[axis].columns}
        for key, column in z.items():
            members[key[position]].append(column)
        if axis in outer:
            for key, column in y.items():
                members[key[outer.index(axis)]].append(column)
        exact = block is None or axis not in outer or bool(y)
        for value, columns in members.items():
            _marginal(program, columns, parts[axis].columns[value], exact=exact)
    present = [(program.d[block], 1.0)] if block else []
    program.row([(column, 1.0) for column in z.values()] + present, 1.0, 1.0)
    if y and block:
        program.row([(column, 1.0) for column in y.values()] + [(program.d[block], -1.0)], 0.0, 0.0)


def narrowest(
    table: LatencyTable, topology: Topology, spec: PruneSpec, sensitivity: Sensitivity | None = None
) -> Solution:
    """The allowed choice with the least predicted latency. Its loss is not asked for and is given as 0."""
    program = formulate(table, topology, spec, sensitivity)
    objective = np.array(program.latency)
    answer = program.minimise(objective / max(objective.max(), 1e-12), seconds=spec.solver_seconds)
    if answer.point is None:
        raise _lost(table)
    widths, dropped = program.decode(answer.point, topology)
    return Solution(widths, dropped, table.predict(widths, dropped).ms, 0.0)


def last_resort(
    table: LatencyTable, topology: Topology, spec: PruneSpec, sensitivity: Sensitivity, budget_ms: float
) -> Solution:
    """The narrowest network, with its loss, for a search that found nothing. Raises MissedError where it is over."""
    least = narrowest(table, topology, spec, sensitivity)
    if least.predicted_ms > budget_ms * FIT:
        raise infeasible(budget_ms, least.predicted_ms)
    return replace(least, loss=added_loss(sensitivity, topology, least.widths, least.dropped))


def nearest(
    table: LatencyTable,
    topology: Topology,
    spec: PruneSpec,
    sensitivity: Sensitivity | None,
    wanted: Mapping[str, int],
) -> dict[str, int]:
    """The widths on the grid that are nearest to the wanted ones, by the sum of relative differences; no block goes."""
    program = formulate(table, topology, spec.model_copy(update={"drop_blocks": False}), sensitivity)
    objective = np.zeros(len(program.latency))
    for group in topology.groups:
        for width, column in program.x[group.id].items():
            objective[column] = abs(width - wanted[group.id]) / group.size
    answer = program.minimise(objective, seconds=spec.solver_seconds)
    if answer.point is None:
        raise _lost(table)
    return program.decode(answer.point, topology)[0]


def _lost(table: LatencyTable) -> DeployError:
    message = f"the solver found no network on the grid of {table.grid} in its time."
    return DeployError(message, "raise prune.solver_seconds.")
