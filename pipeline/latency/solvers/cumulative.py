"""One global share of the scores: each group keeps the fewest top units that hold more than tau of its scores.

The ratio rule of CCM-LRR (Wang et al., 2023): in each group the units are taken from the last to go until their scores
sum to more than tau x the sum over the group, with one tau for all groups, here the largest whose network fits the
budget. Found by going down through all values at which any group changes; where many units go at one value, only as
many of them go as the budget needs, first from the group that has then lost the smallest share, of those in the
network's order. Groups of evenly spread scores keep about tau of their units, groups with few strong ones less. Only
shares count, so `prune.normalise` and the weight of a ranking change nothing. A group whose scores are all zero is
shared out by count.

Every width is the allowed one nearest to what tau leaves (off the grid of a sum: the nearest choice on it). The rule
knows no blocks: none is removed, except where even tau = 0 does not fit and the narrowest network is taken. Groups
without a ranking keep their size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pipeline.latency.solvers._lattice import Lattice, Points, Values
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.schema import PruneSpec

TRIES = False
VALUES = False


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """The network of the largest tau that fits. Raises MissedError where not even the narrowest one does."""
    start = time.perf_counter()
    lattice = Lattice(sensitivity, table, topology, spec)
    known = {ranking.group: ranking for ranking in rankings}
    shares = {
        row: _shares(known[group])
        for row, group in enumerate(lattice.groups)
        if group in known and lattice.counts[row] > 1
    }
    found = lattice.largest(_points(lattice, shares), budget_ms)
    return lattice.solution(lattice.last_resort(budget_ms) if found is None else found, start)


def _shares(ranking: Ranking) -> Values:
    """Part of the group's scores that the units above each unit hold, from the top. Shape (size,)."""
    scores = np.array(ranking.marginal_loss[::-1], dtype=np.float64)
    held = np.concatenate([[0.0], np.cumsum(scores if scores.any() else np.ones(len(scores)))])
    shares: Values = held[:-1] / held[-1]
    return shares


def _points(lattice: Lattice, shares: dict[int, Values]) -> Points:
    """The networks of all tau, the largest first. shares: group -> as `_shares` gives them."""
    removed = lattice.removals({group: -above[:0:-1] for group, above in shares.items()})
    points = np.repeat(lattice.dense[None], len(removed), axis=0)
    for group, above in shares.items():
        points[:, group] = lattice.nearest_index(group, len(above) - removed[:, group])
    changed = np.append(True, (points[1:] != points[:-1]).any(axis=1))
    nested: Points = points[changed]
    return nested
