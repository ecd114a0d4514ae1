"""The choices of a table as integer points, so that latency and loss of many of them are found at once.

A point has an entry for every group, the index of its width among the allowed ones (ascending), and one for every
removable block, 1 where it is gone; points are the rows of an array. With widths W (points x groups) the channel counts
of all sites are W C^T + c, each is looked up in the table's axes, and a site's time in its table. A point off the grid
takes infinite time. In a settled point the groups inside removed blocks have their full size.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.latency.program import last_resort, nearest
from pipeline.latency.solvers.base import FIT, added_loss, allowed_widths, droppable
from pipeline.nouns import Dim, LatencyTable, Sensitivity, Solution, Topology
from profiles.schema import PruneSpec

Points = NDArray[np.int64]
Values = NDArray[np.float64]

WORST = 1e9
"""Stands for an infinite loss, so that differences of losses stay numbers."""


@dataclass(frozen=True)
class Moves:
    """Points beside one point. owners: column of the group or block that moves (the first of two). ms: their latency;
    saved, added: milliseconds less and loss more than at the point that they start from."""

    points: Points
    owners: NDArray[np.int64]
    ms: Values
    saved: Values
    added: Values

    def only(self, rows: NDArray[np.int64]) -> Moves:
        """Some of them, in this order."""
        return Moves(self.points[rows], self.owners[rows], self.ms[rows], self.saved[rows], self.added[rows])

    def cheapest(self) -> Moves:
        """Those that save time: what adds no loss before the rest, then by added loss per millisecond."""
        rate = np.maximum(self.added, 0.0) / np.where(self.saved > 0, self.saved, 1.0)
        order = np.lexsort((-self.saved, rate))
        return self.only(order[self.saved[order] > 0])


class Lattice:
    """All choices that a table, the measured values and the spec allow.

    groups, blocks: ids in the network's order. counts: widths of each group. widths, losses: (groups, most widths), the
    last one repeated. homes: for each group the index of the removable block around it, or -1. dense: the full point.
    """

    def __init__(self, sensitivity: Sensitivity, table: LatencyTable, topology: Topology, spec: PruneSpec) -> None:
        self.sensitivity, self.table, self.topology, self.spec = sensitivity, table, topology, spec
        allowed = allowed_widths(table, topology, sensitivity)
        self.groups = [group.id for group in topology.groups]
        self.blocks = list(droppable(topology, spec, sensitivity))
        self.counts = np.array([len(allowed[group]) for group in self.groups], dtype=np.int64)
        most = int(self.counts.max(initial=1))
        rows = [[*allowed[group], *allowed[group][-1:] * (most - len(allowed[group]))] for group in self.groups]
        self.widths = np.array(rows, dtype=np.int64).reshape(len(rows), most)
        self.losses = np.zeros(self.widths.shape)
        for row, group in enumerate(self.groups):
            if group in sensitivity.groups:
                self.losses[row] = [sensitivity.loss(group, int(width)) for width in self.widths[row]]
        self.losses = _finite(self.losses)
        self.block_losses = _finite(np.array([sensitivity.blocks[block] for block in self.blocks], dtype=np.float64))
        column = {block: index for index, block in enumerate(self.blocks)}
        self.homes = np.array([column.get(group.block or "", -1) for group in topology.groups], dtype=np.int64)
        self.dense: Points = np.concatenate([self.counts - 1, np.zeros(len(self.blocks), dtype=np.int64)])
        self._index_sites()

    def _index_dims(self) -> dict[Dim, dict[int, int]]:
        """Rows of C and c for the dims of all sites, after a first one that is always 0. Dim -> value -> position."""
        row = {group: index for index, group in enumerate(self.groups)}
        seen: dict[Dim, set[int]] = {}
        for cost in self.table.sites:
            for place, dim in enumerate(cost.site.dims):
                seen.setdefault(dim, set()).update(key[place] for key in (*cost.ms, *cost.dropped_ms))
        axes = {dim: {value: at for at, value in enumerate(sorted(values))} for dim, values in seen.items()}
        largest = max((max(axis, default=0) for axis in axes.values()), default=0)
        self.terms, self.constants = np.zeros((len(axes) + 1, len(self.groups))), np.zeros(len(axes) + 1)
        self.positions = np.full((len(axes) + 1, largest + 2), -1, dtype=np.int64)
        self.positions[0] = 0
        self.partners: dict[int, set[int]] = defaultdict(set)
        for index, (dim, axis) in enumerate(axes.items(), 1):
            self.constants[index] = dim.constant
            self.positions[index, list(axis)] = list(axis.values())
            for group, coefficient in dim.terms:
                self.terms[index, row[group]] += coefficient
            free = {row[group] for group, _ in dim.terms if self.counts[row[group]] > 1}
            for first in free:
                self.partners[first] |= free - {first}
        return axes

    def _index_sites(self) -> None:
        """The sites' times in one flat array, of the whole site and without its block's branch, and where they lie."""
        axes, sites = self._index_dims(), self.table.sites
        rows = {dim: index for index, dim in enumerate(axes, 1)}
        depth = max((len(cost.site.dims) for cost in sites), default=0)
        self.site_dims, self.strides = np.zeros((2, depth, len(sites)), dtype=np.int64)
        self.offsets = np.zeros(len(sites), dtype=np.int64)
        self.site_blocks = np.full(len(sites), -1, dtype=np.int64)
        times, gone = [np.zeros(0)], [np.zeros(0)]
        for index, cost in enumerate(sites):
            dims = cost.site.dims
            whole = np.full([len(axes[dim]) for dim in dims], np.inf)
            without = np.full(whole.shape, np.inf if cost.dropped_ms else 0.0)
            for found, costs in ((whole, cost.ms), (without, cost.dropped_ms)):
                for key, ms in costs.items():
                    found[tuple(axes[dim][size] for dim, size in zip(dims, key, strict=True))] = ms
            self.site_dims[: len(dims), index] = [rows[dim] for dim in dims]
            self.strides[: len(dims), index] = np.array(whole.strides) // whole.itemsize
            self.offsets[index] = sum(part.size for part in times)
            if cost.site.block in self.blocks:
                self.site_blocks[index] = self.blocks.index(cost.site.block)
            times.append(whole.ravel())
            gone.append(without.ravel())
        self.times, self.gone = np.concatenate(times), np.concatenate(gone)

    def ms(self, points: Points) -> Values:
        """Predicted latency of each point, infinite off the grid. Shape (points,)."""
        groups = len(self.groups)
        widths = self.widths[np.arange(groups), points[:, :groups]].astype(np.float64)
        sizes = np.rint(widths @ self.terms.T + self.constants).astype(np.int64)
        at = self.positions[np.arange(len(self.terms)), np.minimum(sizes, self.positions.shape[1] - 1)]
        known = np.maximum(at, 0)
        places = self.offsets + sum(known[:, d] * step for d, step in zip(self.site_dims, self.strides, strict=True))
        removed = self._flags(points)[:, self.site_blocks]
        total = np.where(removed, self.gone[places], self.times[places]).sum(axis=1)
        ms = (total + self.table.fixed_ms) * self.table.correction
        return np.where((at < 0).any(axis=1), np.inf, ms)

    def loss(self, points: Points) -> Values:
        """Sum of the measured values of each point; what lives inside a removed block adds nothing. Shape (points,)."""
        return self._summed(points, self.losses, self.block_losses)

    def roots(self, points: Points) -> Values:
        """Sum of their roots, likewise: the size of the error, where errors of different cuts are alike."""
        losses, blocks = (np.sqrt(np.maximum(values, 0.0)) for values in (self.losses, self.block_losses))
        return self._summed(points, losses, blocks)

    def _summed(self, points: Points, losses: Values, block_losses: Values) -> Values:
        groups = len(self.groups)
        own = losses[np.arange(groups), points[:, :groups]]
        blocks = (points[:, groups:] == 1) @ block_losses
        values: Values = np.where(self.inside(points), 0.0, own).sum(axis=1) + blocks
        return values

    def settle(self, points: Points) -> Points:
        """The points with every group inside a removed block at its full size."""
        settled, groups = points.copy(), len(self.groups)
        settled[:, :groups] = np.where(self.inside(points), self.counts - 1, points[:, :groups])
        return settled

    def inside(self, points: Points) -> NDArray[np.bool_]:
        """Which groups lie inside a removed block. Shape (points, groups)."""
        return self._flags(points)[:, self.homes]

    def _flags(self, points: Points) -> NDArray[np.bool_]:
        """Which blocks are gone, with a last column that is always false for what has no block (index -1)."""
        gone = points[:, len(self.groups) :] == 1
        return np.concatenate([gone, np.zeros((len(points), 1), dtype=np.bool_)], axis=1)

    def moves(self, point: Points) -> Moves:
        """Every point on the grid that differs from a settled one in the width of one group or in one block.

        Where a group cannot move alone on the grid, it is narrowed together with one that it shares a sum with.
        """
        groups = len(self.groups)
        inside = self.inside(point[None])[0]
        free = [g for g in range(groups) if self.counts[g] > 1 and not inside[g]]
        steps: list[tuple[tuple[int, int], ...]] = [
            ((g, i),) for g in free for i in range(int(self.counts[g])) if i != point[g]
        ]
        steps += [((groups + b, 1 - int(point[groups + b])),) for b in range(len(self.blocks))]
        found = self._moved(point, steps)
        stuck = set(free) - set(found.owners.tolist())
        pairs = [
            ((g, i), (h, j))
            for g in sorted(stuck)
            for h in sorted(self.partners[g] & set(free))
            for i, j in itertools.product(_lower(point[g]), _lower(point[h]))
        ]
        return found if not pairs else self._moved(point, [*steps, *pairs])

    def _moved(self, point: Points, steps: Sequence[tuple[tuple[int, int], ...]]) -> Moves:
        """The point after each step, given as columns with their new entries, where that is on the grid."""
        points = np.repeat(point[None], len(steps), axis=0)
        for row, step in enumerate(steps):
            for column, entry in step:
                points[row, column] = entry
        points = self.settle(points)
        owners = np.array([step[0][0] for step in steps], dtype=np.int64)
        ms = self.ms(points)
        on = np.isfinite(ms)
        points, owners, ms = points[on], owners[on], ms[on]
        saved = self.ms(point[None])[0] - ms
        return Moves(points, owners, ms, saved, self.loss(points) - self.loss(point[None])[0])

    def descend(self, point: Points, budget_ms: float, barred: Iterable[int] = ()) -> Points | None:
        """Cut where it costs least per millisecond until the budget fits; None where no cut saves any more.

        barred: columns of groups and blocks that stay as they are.
        """
        while self.ms(point[None])[0] > budget_ms * FIT:
            moves = self.moves(point).cheapest()
            moves = moves.only(np.flatnonzero(~np.isin(moves.owners, list(barred)))) if barred else moves
            if not len(moves.points):
                return None
            point = moves.points[0]
        return point

    def refill(self, point: Points, budget_ms: float) -> Points:
        """Use what is left of the budget: again and again the move that fits and lowers the loss most."""
        while True:
            moves = self.moves(point)
            added = np.where(moves.ms <= budget_ms * FIT, moves.added, np.inf)
            if added.min(initial=np.inf) >= -1e-12:
                return point
            point = moves.points[int(added.argmin())]

    def removals(self, keys: Mapping[int, Values]) -> NDArray[np.int64]:
        """Units that each group has lost after 0, 1, … of all units went, lowest key first. Shape (units + 1, groups).

        keys: group -> ascending, one for every unit that may go. Of equal ones the unit goes whose group has then lost
        the smallest share of them, and the first in the network's order.
        """
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *(np.full(len(own), row) for row, own in keys.items())])
        shares = np.concatenate([np.zeros(0), *(np.arange(1, len(own) + 1) / len(own) for own in keys.values())])
        order = rows[np.lexsort((rows, shares, np.concatenate([np.zeros(0), *keys.values()])))]
        lost = np.zeros((len(order) + 1, len(self.groups)), dtype=np.int64)
        lost[np.arange(1, len(order) + 1), order] = 1
        return np.asarray(lost.cumsum(axis=0))

    def largest(self, points: Points, budget_ms: float) -> Points | None:
        """The first of these points, each smaller than the one before, that fits; None where none does.

        What is off the grid is moved to the nearest choice on it (a programme of its own, so found by bisection).
        """
        ms = self.ms(points)
        fits = np.flatnonzero(ms <= budget_ms * FIT)
        last = int(fits[0]) if len(fits) else len(points)
        off = np.flatnonzero(np.isinf(ms[:last]))
        snapped: dict[int, Points] = {}

        def keeps(row: int) -> bool:
            snapped[row] = self.snap(points[row])
            return bool(self.ms(snapped[row][None])[0] <= budget_ms * FIT)

        found = bisect_left(off, True, key=keeps)
        if found < len(off):
            return snapped[int(off[found])]
        return points[last] if len(fits) else None

    def snap(self, point: Points) -> Points:
        """The point on the grid whose widths are nearest, with the same blocks."""
        wanted, dropped = self.choice(point)
        widths = nearest(self.table, self.topology, self.spec, self.sensitivity, wanted)
        snapped: Points = self.settle(self.point(widths, dropped)[None])[0]
        return snapped

    def nearest_index(self, group: int, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the allowed width of a group that is nearest to each of these, the wider of two."""
        options = self.widths[group, : self.counts[group]]
        return np.asarray(np.searchsorted((options[1:] + options[:-1]) / 2, widths, side="right"), dtype=np.int64)

    def choice(self, point: Points) -> tuple[dict[str, int], frozenset[str]]:
        """Widths by group and removed blocks of a point."""
        widths = {group: int(self.widths[row, point[row]]) for row, group in enumerate(self.groups)}
        gone = point[len(self.groups) :]
        return widths, frozenset(block for block, flag in zip(self.blocks, gone, strict=True) if flag)

    def point(self, widths: Mapping[str, int], dropped: frozenset[str]) -> Points:
        """The point of a choice whose widths are allowed ones."""
        at = [int(np.searchsorted(self.widths[i, : self.counts[i]], widths[g])) for i, g in enumerate(self.groups)]
        return np.array([*at, *(int(block in dropped) for block in self.blocks)], dtype=np.int64)

    def solution(self, point: Points, start: float = 0.0) -> Solution:
        """The solution of a point, predicted by the table itself. start: of the search, by time.perf_counter."""
        widths, dropped = self.choice(point)
        loss = added_loss(self.sensitivity, self.topology, widths, dropped)
        ms = self.table.predict(widths, dropped).ms
        return Solution(widths, dropped, ms, loss, None, time.perf_counter() - start if start else 0.0)

    def last_resort(self, budget_ms: float) -> Points:
        """The narrowest network, for a search that found nothing; MissedError where even that is over the budget."""
        least = last_resort(self.table, self.topology, self.spec, self.sensitivity, budget_ms)
        return self.point(least.widths, least.dropped)


def losses_of(loss: Callable[[Solution], float], lattice: Lattice, points: Iterable[Points]) -> Values:
    """What a trial says of points, as finite losses. Shape (points,)."""
    return _finite(np.array([loss(lattice.solution(point)) for point in points], dtype=np.float64))


def _finite(losses: Values) -> Values:
    return np.nan_to_num(losses, nan=WORST, posinf=WORST)


def _lower(index: int) -> range:
    """The two next narrower widths."""
    return range(max(0, int(index) - 2), int(index))
