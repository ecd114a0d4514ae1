"""A genetic search over the widths of all groups and the blocks that go, the best few judged by trying them.

Channel pruning by a genetic algorithm (Hu et al., 2018) searches masks of one layer with a fitness cheap enough for
thousands of chromosomes: the second-order estimate (1 - m)^T G (1 - m) of the layer's output error. Its form for a
latency budget is a search over ratio vectors: a chromosome holds the index of every group's width and a flag for every
removable block. Which units stay at a width is the ranking's part. The fitness is a quadratic form again, in the sizes
of the errors that the cuts j of a chromosome make alone:

    E = sum_ij R_ij e_i e_j,      e_j = sqrt(value of cut j),      R_jj = 1,      R_ij = rho for i != j

A value is the network's loss of a whole cut after repair (Sensitivity), so that what units of one group do together is
in it. rho is what cuts of different groups do to each other: 0 where their errors are independent and the values add
up, 1 where they point the same way, above 1 where a cut makes another one worse. One number stands for all pairs, since
a table of pairs would take a measurement for each. It begins at 0; after each of TURNS evolutions the best few are
tried as whole networks, and rho becomes what explains all of their losses best (least squares), for the next one.

    start      even ratios from the dense to the narrowest network, `uniform`'s answer, the rest random
    selection  roulette by rank: a chance in proportion to the place from the bottom
    crossover  at one point, in the network's order, a block beside the groups inside it
    mutation   MUTATED genes in a chromosome on average: half of them a step, half any value
    repair     over the budget: roulette over single steps down, in proportion to milliseconds saved / loss added in the
               dense network, until it fits; a child that is or stays off the grid is given up for its first
               parent
    survival   the ELITE best, and the children

The constraint is the table's latency. Single moves, by the sum of the values, use what is left of the budget in those
that are tried, and the trial's loss after repair decides between all of them; without a trial the sum of the values
does, after one evolution. Seeded by `prune.seed`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np

from pipeline.latency.solvers import uniform
from pipeline.latency.solvers._lattice import WORST, Lattice, Points, Values, losses_of
from pipeline.latency.solvers.base import FIT
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.errors import MissedError
from profiles.schema import PruneSpec

TRIES = True
VALUES = True
POPULATION = 96
GENERATIONS = 150
PATIENCE = 40
"""Generations without a better one after which the search ends."""
MUTATED = 2.0
"""Genes that change in a chromosome, on average."""
ELITE = 6
TURNS, JUDGED = 3, 8
"""Evolutions, and how many of the best are tried after each."""
MISSES = 8
"""Steps off the grid, one after the other, after which a child that is over the budget is given up."""


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """The best of the last generation. Raises MissedError where not even the narrowest network fits."""
    start = time.perf_counter()
    lattice = Lattice(sensitivity, table, topology, spec)
    fit = [lattice.last_resort(budget_ms)]
    with contextlib.suppress(MissedError):
        even = uniform.solve(rankings, sensitivity, table, topology, budget_ms, spec)
        fit.append(lattice.point(even.widths, even.dropped))
    search = Search(lattice, budget_ms, np.random.default_rng(spec.seed))
    points, tried, losses = np.stack(fit), np.zeros((0, len(lattice.dense)), dtype=np.int64), np.zeros(0)
    for _ in range(1 if trial is None else TURNS):
        points = search.run(points)
        filled = np.unique(np.stack([lattice.refill(point, budget_ms) for point in points[:JUDGED]]), axis=0)
        new = filled[~(filled[:, None] == tried).all(axis=2).any(axis=1)]
        found = lattice.loss(new) if trial is None else losses_of(trial.loss, lattice, new)
        tried, losses = np.concatenate([tried, new]), np.concatenate([losses, found])
        search.rho = alikeness(lattice, tried, losses)
    return lattice.solution(tried[int(np.lexsort((lattice.ms(tried), losses))[0])], start)


def alikeness(lattice: Lattice, points: Points, losses: Values) -> float:
    """The rho that explains the losses of these points best, at least 0; infinite losses say nothing."""
    alone = lattice.loss(points)
    known = (losses < WORST) & (alone < WORST)
    crossed, more = (lattice.roots(points) ** 2 - alone)[known], (losses - alone)[known]
    return max(0.0, float(crossed @ more) / max(float(crossed @ crossed), 1e-30))


class Search:
    """Generations of points. order: columns as they lie in the network, a block before what is inside it.

    rho: how alike the errors of different cuts are.
    """

    def __init__(self, lattice: Lattice, budget_ms: float, rng: np.random.Generator) -> None:
        self.lattice, self.limit, self.rng, self.rho = lattice, budget_ms * FIT, rng, 0.0
        groups = len(lattice.groups)
        columns: dict[int, None] = {}
        for group, home in enumerate(lattice.homes.tolist()):
            columns |= dict.fromkeys([groups + home, group] if home >= 0 else [group])
        self.order = np.array(list(columns | dict.fromkeys(range(len(lattice.dense)))), dtype=np.int64)
        self.most = np.concatenate([lattice.counts - 1, np.ones(len(lattice.blocks), dtype=np.int64)])
        self.odds = self._odds()

    def run(self, fit: Points) -> Points:
        """The last generation, each point once, the least loss first. fit: points that keep the budget."""
        points = self._ranked(np.concatenate([fit, self._repaired(self._first(), fit[:1])]))
        best, since = np.inf, 0
        for _ in range(GENERATIONS):
            places = np.arange(len(points), 0, -1, dtype=np.float64)
            first, second = self.rng.choice(len(points), (2, POPULATION), p=places / places.sum())
            children = self._mutated(self._crossed(points[first], points[second]))
            points = self._ranked(np.concatenate([points[:ELITE], self._repaired(children, points[first])]))
            least = float(self.fitness(points[:1])[0])
            best, since = (least, 0) if least < best else (best, since + 1)
            if since == PATIENCE:
                break
        return points

    def _ranked(self, points: Points) -> Points:
        points = np.unique(points, axis=0)
        ranked: Points = points[np.lexsort((self.lattice.ms(points), self.fitness(points)))]
        return ranked

    def fitness(self, points: Points) -> Values:
        """The quadratic form of each point, low where it is fit. Shape (points,)."""
        return (1 - self.rho) * self.lattice.loss(points) + self.rho * self.lattice.roots(points) ** 2

    def _first(self) -> Points:
        """Even ratios and random points, not repaired yet."""
        lattice, groups = self.lattice, len(self.lattice.groups)
        points = self.rng.integers(0, self.most + 1, (POPULATION, len(self.most)))
        points[:, groups:] *= self.rng.random((POPULATION, 1)) < 0.5
        for row, keep in enumerate(np.linspace(1.0, 0.0, POPULATION // 4)):
            points[row, groups:] = 0
            for group in range(groups):
                size = lattice.widths[group, lattice.counts[group] - 1]
                points[row, group] = lattice.nearest_index(group, np.array(keep * size))
        return lattice.settle(points)

    def _crossed(self, first: Points, second: Points) -> Points:
        """Children that have the first parent's genes up to a point in the network and the second's from there."""
        places = np.empty(len(self.order), dtype=np.int64)
        places[self.order] = np.arange(len(self.order))
        return np.where(places < self.rng.integers(0, len(places) + 1, (len(first), 1)), first, second)

    def _mutated(self, points: Points) -> Points:
        """Points with some genes moved by one or set to anything."""
        chosen = self.rng.random(points.shape) * len(self.most) < MUTATED
        step = points + self.rng.choice((-1, 1), points.shape)
        anything = self.rng.integers(0, self.most + 1, points.shape)
        moved = np.where(self.rng.random(points.shape) < 0.5, np.clip(step, 0, self.most), anything)
        return self.lattice.settle(np.where(chosen, moved, points))

    def _repaired(self, points: Points, parents: Points) -> Points:
        """The points brought within the budget, a parent in place of what cannot be."""
        points, parents, lattice = points.copy(), np.broadcast_to(parents, points.shape), self.lattice
        failed = np.zeros(len(points), dtype=np.int64)
        while True:
            ms = lattice.ms(points)
            over = np.flatnonzero(np.isfinite(ms) & (ms > self.limit))
            if not len(over):
                return np.where((ms <= self.limit)[:, None], points, parents)
            cut = self._cut(points[over])
            on = np.isfinite(lattice.ms(cut)) & (cut != points[over]).any(axis=1)
            failed[over] = np.where(on, 0, failed[over] + 1)
            points[over[on]] = cut[on]
            lost = np.flatnonzero(failed > MISSES)
            points[lost], failed[lost] = parents[lost], 0

    def _cut(self, points: Points) -> Points:
        """Each point with one step down, a narrower group or one more block gone, drawn by the odds."""
        groups, rows = len(self.lattice.groups), np.arange(len(points))
        odds = self.odds[np.arange(len(self.most)), points]
        odds[:, :groups][self.lattice.inside(points)] = 0.0
        wheel = np.cumsum(odds, axis=1)
        drawn = (wheel <= self.rng.random((len(points), 1)) * wheel[:, -1:]).sum(axis=1) % len(self.most)
        cut = points.copy()
        cut[rows, drawn] += np.where(odds[rows, drawn] > 0, np.where(drawn < groups, -1, 1), 0)
        return self.lattice.settle(cut)

    def _odds(self) -> Values:
        """Milliseconds saved / loss added by a step down from each entry of each column, 0 where there is none."""
        lattice, groups = self.lattice, len(self.lattice.groups)
        odds = np.zeros((len(self.most), int(self.most.max(initial=0)) + 1))
        least_ms, least = 1e-3 * lattice.ms(lattice.dense[None])[0], 1e-3 * max(lattice.losses.mean(), 1e-9)
        for column, most in enumerate(self.most.tolist()):
            points = np.repeat(lattice.dense[None], most + 1, axis=0)
            points[:, column] = np.arange(most + 1) if column < groups else (1, 0)
            points = lattice.settle(points)
            ms, loss = lattice.ms(points), lattice.loss(points)
            saved = np.diff(np.where(np.isfinite(ms), ms, np.nan))
            steps = np.fmax(saved, least_ms) / (np.maximum(-np.diff(loss), 0.0) + least)
            low = 1 if column < groups else 0
            odds[column, low : low + most] = steps
        return odds
