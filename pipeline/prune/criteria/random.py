"""Random order by seed: the control that every criterion has to beat."""

from __future__ import annotations

import numpy as np

from pipeline.nouns import Ranking
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ()


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units in a random order that depends on the seed alone."""
    return by_score(evidence.topology, np.random.default_rng(evidence.seed).random(evidence.units))
