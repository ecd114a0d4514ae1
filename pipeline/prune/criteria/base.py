"""Contract of a criterion: `rank(evidence) -> list[Ranking]`, one for each offered group, and `NEEDS`.

NEEDS names what the project must have besides calibration inputs: "targets" or nothing. A criterion decides the order
in which units of one group go; how many go is decided by measured values (sensitivity.py) and the solver.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from pipeline.nouns import Ranking, Topology
from pipeline.prune.evidence import Evidence

PACKAGE = "pipeline.prune.criteria"


class Criterion(Protocol):
    """A module of this folder."""

    NEEDS: tuple[str, ...]

    def rank(self, evidence: Evidence) -> list[Ranking]:
        """One ranking for each offered group."""
        ...


def by_score(topology: Topology, scores: ArrayLike) -> list[Ranking]:
    """Rankings from one score a unit id: the lowest goes first, ties by position."""
    values = np.asarray(scores, dtype=np.float64)
    rankings = []
    for group in topology.offered:
        own = values[list(group.units)]
        order = np.argsort(own, kind="stable")
        rankings.append(Ranking(group.id, tuple(int(i) for i in order), tuple(float(v) for v in own[order])))
    return rankings
