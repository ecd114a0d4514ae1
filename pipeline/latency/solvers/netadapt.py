"""Rounds of small cuts, each the best of one proposal a group after a short recovery (NetAdapt).

NetAdapt (Yang et al., ECCV 2018): every round asks for a latency that is lower by delta. For every group, and for
every removable block (NetAdapt has none), the proposal is the widest choice whose latency by the table is at most
current - delta; each is judged after a short recovery and the best is kept. Delta decays by DECAY a round. Here the
first delta is such that ROUNDS rounds reach the budget; as coarse grids save more than asked, fewer do. What cannot
save delta proposes nothing; when nothing can, what saves most is proposed.

The proposals of one round save different amounts, a block much more than asked. So the best is that of the least added
loss per millisecond saved, and what adds none goes first; NetAdapt, whose proposals all save about delta, takes the
least loss. At most JUDGED proposals a round are judged, those that are best by the measured values (NetAdapt judges
all). Without a trial the measured values judge all of them.

The end is measured on the target. While it does not keep the budget, the goal is lowered by as much as the table was
off and FURTHER rounds follow, CHECKS times at most; the first network that is measured to keep the budget is taken,
else the last one. Where the rounds do not arrive, the values cut the rest, the least loss per millisecond first. That
makes (ROUNDS + CHECKS x FURTHER) x JUDGED + CHECKS + 1 short recoveries and CHECKS + 1 measurements at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pipeline.latency.solvers._lattice import Lattice, Moves, Points, losses_of
from pipeline.latency.solvers.base import FIT
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.schema import PruneSpec

TRIES = True
VALUES = True
RECOVERS = True
ROUNDS = 24
DECAY = 0.96
JUDGED = 5
CHECKS = 3
FURTHER = 2


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """Where the rounds end. Raises MissedError where not even the narrowest network fits."""
    start = time.perf_counter()
    lattice = Lattice(sensitivity, table, topology, spec)
    last, goal_ms = lattice.dense, budget_ms
    for check in range(CHECKS + 1):
        point = _adapted(lattice, last, goal_ms, FURTHER if check else ROUNDS, trial)
        if point is None:
            break
        last = point
        if trial is None:
            break
        (measured,) = trial.measure([lattice.solution(last)])
        if measured <= budget_ms * FIT:
            break
        goal_ms = float(lattice.ms(last[None])[0]) * budget_ms / measured
    fits = lattice.ms(last[None])[0] <= budget_ms * FIT
    return lattice.solution(last if fits else lattice.last_resort(budget_ms), start)


def _adapted(lattice: Lattice, point: Points, goal_ms: float, rounds: int, trial: Trial | None) -> Points | None:
    """The point after rounds towards a latency; None where no cut saves any more."""
    current = float(lattice.ms(point[None])[0])
    delta = (current - goal_ms) * (1 - DECAY) / (1 - DECAY**rounds)
    for _ in range(rounds):
        if current <= goal_ms * FIT:
            break
        proposals = _proposals(lattice, point, min(delta, current - goal_ms))
        if not len(proposals.points):
            return None
        best = _best(lattice, point, proposals, trial)
        point, current = proposals.points[best], float(proposals.ms[best])
        delta *= DECAY
    return lattice.descend(point, goal_ms)


def _proposals(lattice: Lattice, point: Points, delta_ms: float) -> Moves:
    """The widest choice of each group and block that saves this much, the best by the values first."""
    moves = lattice.moves(point).cheapest()
    reach = min(delta_ms, float(moves.saved.max(initial=0.0)))
    moves = moves.only(np.flatnonzero(moves.saved >= reach * (1 - 1e-9)))
    entries = moves.points[np.arange(len(moves.points)), moves.owners]
    widest = {int(moves.owners[row]): row for row in np.lexsort((-moves.saved, entries))}
    return moves.only(np.sort(np.array(list(widest.values()), dtype=np.int64)))


def _best(lattice: Lattice, point: Points, proposals: Moves, trial: Trial | None) -> int:
    """Row of the proposal with the least added loss per millisecond saved."""
    if trial is None:
        return 0
    judged = losses_of(trial.recovered, lattice, np.concatenate([point[None], proposals.points[:JUDGED]]))
    added, saved = judged[1:] - judged[0], proposals.saved[:JUDGED]
    return int(np.lexsort((-saved, np.maximum(added, 0.0) / saved))[0])
