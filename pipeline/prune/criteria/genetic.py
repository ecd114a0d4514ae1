"""Genetic: channels chosen by a genetic algorithm on the quadratic form of the layers' output errors.

    E(m) = (1 − m)ᵀ G (1 − m),      G_ij = Σ_readers tr(W_i A_ij W_jᵀ) / tr(W A Wᵀ),      m ∈ {0, 1}^C the kept units

After Hu et al., A Novel Channel Pruning Method for Deep Neural Network Compression, 2018, whose tables are not public:
the second-order error of a layer's output restricted to whole channels, so that the fitness of thousands of choices
needs C × C numbers. Chromosomes have a fixed number of removed units; roulette selection on what each is better than
the worst, one-point crossover repaired to that number at random, mutation by swapping a removed unit for a kept one,
the best survives. Ours: the readers of a group are summed, relative to their output's variance; the start holds the
greedy choice, so the result is never worse; units are laid out by their own error, so that the order of channels does
not matter and one point of crossover separates cheap units from dear ones.

An order comes from nested quotas: an eighth of the units, then an eighth more around those, and so on; inside a step
the unit that adds least goes first. marginal_loss is the increase of the largest E so far: what is removed together
may cancel, so E itself can fall. Cost: QUOTAS · GENERATIONS products of a population with G.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.nouns import Ranking
from pipeline.prune.criteria._quadratic import quadratic, readings
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs",)

QUOTAS = 8
POPULATION = 64
GENERATIONS = 60
MUTATED = 0.5

Floats = NDArray[np.float64]
Units = NDArray[np.int64]


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by evolving the set of those to remove."""
    rankings = []
    for group in evidence.topology.offered:
        table = quadratic(readings(evidence, group)).numpy()
        laid = np.argsort(table.diagonal(), kind="stable")
        chosen = laid[nested(table[np.ix_(laid, laid)], np.random.default_rng(evidence.seed))]
        inside = np.cumsum(np.cumsum(table[np.ix_(chosen, chosen)], 0), 1).diagonal()
        dearest = np.maximum.accumulate(np.maximum(inside, 0))
        added = np.diff(dearest, prepend=0.0)
        rankings.append(Ranking(group.id, tuple(int(i) for i in chosen), tuple(float(v) for v in added)))
    return rankings


def nested(table: Floats, source: np.random.Generator) -> Units:
    """An order of removal from growing quotas, each evolved around the last. table: (units, units)."""
    units = len(table)
    order = np.zeros(0, dtype=np.int64)
    for step in range(1, QUOTAS + 1):
        quota = units * step // QUOTAS
        if quota > len(order):
            grown = evolve(table, order, quota, source) if quota < units else np.arange(units)
            order = _greedy(table, order, quota, grown)
    return order


def evolve(table: Floats, fixed: Units, quota: int, source: np.random.Generator) -> Units:
    """The best set found of `quota` units to remove that holds the fixed ones."""
    free = np.setdiff1d(np.arange(len(table)), fixed)
    more = quota - len(fixed)
    own, across = table[np.ix_(free, free)], 2 * table[np.ix_(free, fixed)].sum(1)

    def errors(crowd: NDArray[np.bool_]) -> Floats:
        taken = crowd.astype(np.float64)
        found: Floats = ((taken @ own) * taken).sum(1) + taken @ across
        return found

    crowd = _exactly(source.random((POPULATION, len(free))), more)
    crowd[0] = np.isin(free, _greedy(table, fixed, quota, free))
    best, least = crowd[0], errors(crowd[:1])[0]
    for _ in range(GENERATIONS):
        cost = errors(crowd)
        if cost.min() < least:
            best, least = crowd[cost.argmin()].copy(), cost.min()
        gain = cost.max() - cost + 1e-12
        mothers, fathers = source.choice(POPULATION, (2, POPULATION), p=gain / gain.sum())
        before = np.arange(len(free)) < source.integers(1, max(2, len(free)), (POPULATION, 1))
        children = np.where(before, crowd[mothers], crowd[fathers])
        swapped = _swapped(_exactly(children + source.random(children.shape), more), source)
        crowd = np.concatenate([best[None], swapped[1:]])
    final = errors(crowd)
    return np.union1d(fixed, free[crowd[final.argmin()]])


def _exactly(keys: Floats, count: int) -> NDArray[np.bool_]:
    """The `count` largest keys of every row."""
    rows = np.zeros(keys.shape, dtype=bool)
    np.put_along_axis(rows, np.argpartition(-keys, count - 1, axis=1)[:, :count], True, axis=1)
    return rows


def _swapped(crowd: NDArray[np.bool_], source: np.random.Generator) -> NDArray[np.bool_]:
    """In some rows one removed unit changes places with one that is kept."""
    chance = source.random(crowd.shape)
    rows = np.flatnonzero((source.random(len(crowd)) < MUTATED) & ~crowd.all(1))
    out, into = np.where(crowd, chance, -1.0).argmax(1), np.where(crowd, -1.0, chance).argmax(1)
    crowd[rows, out[rows]], crowd[rows, into[rows]] = False, True
    return crowd


def _greedy(table: Floats, order: Units, quota: int, among: Units) -> Units:
    """The order grown to `quota` units, each time by the one of these that adds least to E."""
    grown = list(order)
    adds = table.diagonal() + 2 * table[:, grown].sum(1)
    adds[np.setdiff1d(np.arange(len(table)), among)] = np.inf
    adds[grown] = np.inf
    while len(grown) < quota:
        unit = int(adds.argmin())
        grown.append(unit)
        adds = adds + 2 * table[:, unit]
        adds[unit] = np.inf
    return np.asarray(grown, dtype=np.int64)
