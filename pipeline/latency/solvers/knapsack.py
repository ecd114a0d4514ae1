"""A knapsack of bundles of units, solved by dynamic programming under a budget that shrinks in steps.

HALP's idea (Shen et al., NeurIPS 2022): the units of a group, in ranking order, are bundled between the widths of the
grid; a bundle has a value and weighs the latency that the table gives it at the current other widths; a bundle may be
taken only with all that rank above it. Per group that leaves one width to choose, so the programme is, with whole
units of latency c,

    best[c] = min over widths w of  best_before[c - ms(w)] + loss(w)

over groups in turn, exact for the prices of the moment. Where HALP sums first-order Taylor scores, the value here is
the loss that was measured after repair at a few widths of every group (Sensitivity): summed scores of single units know
nothing of what repair takes over, and do not compare with blocks. A removable block is one more choice: everything
inside it, or its loss and what its removal saves. HALP has none.

Prices freeze the other widths, so two cuts at one site are charged wrongly by their product. Hence STEPS budgets on a
geometric schedule from the dense latency (HALP: exponential over 30 steps of training), each with prices of its own and
all widths open again: what is gone may return, as in SMCP (ECCV 2022). With HALP's rule that nothing returns the loss
was up to 1.5 times as large on made-up tables of ResNet-50's size. The last budget is solved for AGAIN more times. Each
of these ends is held to the budget by single cuts, the least loss per millisecond first; what is left of it is used by
single moves, and the end of least loss is taken. Where single cuts do not reach the budget, the narrowest network is
taken. A group that can only move together with another is moved by these cuts alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.latency.solvers._lattice import Lattice, Points, Values
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.schema import PruneSpec

TRIES = False
VALUES = True
STEPS = 12
AGAIN = 3
"""How often the last budget is solved for once more, at the prices of its own answer."""

UNITS = 4000
"""Whole units into which a step's latency is divided."""


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """Widths and blocks of the last knapsack, repaired. Raises MissedError where not even the narrowest one fits."""
    start = time.perf_counter()
    lattice = Lattice(sensitivity, table, topology, spec)
    point, dense_ms = lattice.dense, float(lattice.ms(lattice.dense[None])[0])
    packed = []
    for step in range(STEPS + AGAIN):
        share = min(1.0, (step + 1) / STEPS)
        point = _packed(lattice, point, dense_ms ** (1 - share) * budget_ms**share)
        packed.append(point)
    ends = [end for end in (lattice.descend(point, budget_ms) for point in packed[STEPS - 1 :]) if end is not None]
    ends = [lattice.refill(end, budget_ms) for end in ends or [lattice.last_resort(budget_ms)]]
    return lattice.solution(ends[int(lattice.loss(np.stack(ends)).argmin())], start)


@dataclass(frozen=True)
class Item:
    """What may become of one group, or of a block and all inside it: by rising latency and falling loss.

    ms, loss: change against the point that prices are taken at. entries: for each option the columns that it changes,
    with their new entries.
    """

    ms: Values
    loss: Values
    entries: tuple[tuple[tuple[int, int], ...], ...]

    def also(self, ms: Values, loss: Values, entries: Sequence[tuple[tuple[int, int], ...]]) -> Item:
        """With more options; those that another one beats in both are left out."""
        times, losses = np.concatenate([self.ms, ms]), np.concatenate([self.loss, loss])
        order = np.lexsort((losses, times))
        floor = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
        kept = order[losses[order] < floor]
        every = (*self.entries, *entries)
        return Item(times[kept], losses[kept], tuple(every[i] for i in kept))

    def joined(self, other: Item) -> Item:
        """Every option of this one with every option of the other."""
        entries = [first + second for first in self.entries for second in other.entries]
        ms, loss = np.add.outer(self.ms, other.ms).ravel(), np.add.outer(self.loss, other.loss).ravel()
        return Item(np.zeros(0), np.zeros(0), ()).also(ms, loss, entries)


STAY = Item(np.zeros(1), np.zeros(1), ((),))


def _items(lattice: Lattice, point: Points) -> list[Item]:
    """The choices from a point, priced there: groups that can move alone, and blocks."""
    moves, groups = lattice.moves(point), len(lattice.groups)
    alone = (moves.owners >= groups) | ((moves.points != point).sum(axis=1) == 1)

    def item(owner: int, start: Item) -> Item:
        rows = np.flatnonzero((moves.owners == owner) & alone)
        entries = [((owner, int(entry)),) for entry in moves.points[rows, owner]]
        return start.also(-moves.saved[rows], moves.added[rows], entries)

    items = [item(group, STAY) for group in np.flatnonzero(lattice.homes < 0).tolist()]
    for block in range(len(lattice.blocks)):
        inner = STAY
        for group in np.flatnonzero(lattice.homes == block).tolist():
            inner = inner.joined(item(group, STAY))
        items.append(item(groups + block, inner))
    return items


def _packed(lattice: Lattice, point: Points, budget_ms: float) -> Points:
    """The point after the best choice of one option an item, at prices taken at the point."""
    items = _items(lattice, point)
    room = budget_ms - lattice.ms(point[None])[0] - sum(float(item.ms[0]) for item in items)
    unit = max(room, 0.0) / UNITS
    if unit <= 0:  # not even the fastest options together reach it
        return _taken(lattice, point, items, [0] * len(items))
    best, picked, weights = np.zeros(UNITS + 1), [], []
    for item in items:
        weight = np.minimum(np.rint((item.ms - item.ms[0]) / unit), UNITS + 1).astype(np.int64)
        tried = np.full((len(weight), UNITS + 1), np.inf)
        for row, (heavy, loss) in enumerate(zip(weight, item.loss, strict=True)):
            tried[row, heavy:] = best[: max(0, UNITS + 1 - heavy)] + loss
        picked.append(tried.argmin(axis=0))
        weights.append(weight)
        best = tried.min(axis=0)
    left, options = UNITS, []
    for weight, pick in zip(reversed(weights), reversed(picked), strict=True):
        options.append(int(pick[left]))
        left -= int(weight[options[-1]])
    return _taken(lattice, point, items, options[::-1])


def _taken(lattice: Lattice, point: Points, items: Sequence[Item], options: Sequence[int]) -> Points:
    """The point with these options taken, on the grid."""
    after = point.copy()
    for item, option in zip(items, options, strict=True):
        for column, entry in item.entries[option]:
            after[column] = entry
    after = lattice.settle(after[None])[0]
    return after if np.isfinite(lattice.ms(after[None])[0]) else lattice.snap(after)
