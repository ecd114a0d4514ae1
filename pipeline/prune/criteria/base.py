"""Contract of a criterion: `rank(evidence) -> list[Ranking]`, one for each offered group, and `NEEDS`.

NEEDS names what the project must give: "inputs" for calibration inputs, "targets" for their labels too, "gradients" for
a loss that can be derived on them, or nothing at all for a criterion that looks at weights alone. A criterion decides
the order in which units of one group go; how many go is decided by measured values (sensitivity.py) and the solver.
Scores are non-negative and finite, and do not depend on the order of channels: permuted units give permuted rankings.
The same evidence and seed give the same ranking.
A criterion of redundancy may promise DUPLICATES_FIRST = True (False where it says nothing): of units with the same
weights and maps all but one go first, at no loss, and where it names twins, each to one of the same kind. One that
names twins says so: STAND_INS = True. One that cannot work with every network or label may offer `check(evidence)`,
which raises UsageError for what `rank` could not work with, by a forward pass at most: it is asked before any work.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from pipeline.nouns import ChannelGroup, Ranking, Topology
from pipeline.prune.evidence import Evidence
from profiles.errors import DeployError

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
    return [ordered(group, values[list(group.units)]) for group in topology.offered]


def ordered(group: ChannelGroup, scores: ArrayLike, weight: float = 1.0) -> Ranking:
    """The ranking of one group from a score a unit, in the group's order: the lowest goes first, ties by position."""
    own = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(own).all():
        count = int((~np.isfinite(own)).sum())
        raise DeployError(
            f"the scores of {count} of the {group.size} units of '{group.name}' are not finite.",
            "look for infinite or NaN values in the calibration data or the weights, or take another --criterion.",
        )
    order = np.argsort(own, kind="stable")
    return Ranking(group.id, tuple(int(i) for i in order), tuple(float(v) for v in own[order]), weight=weight)
