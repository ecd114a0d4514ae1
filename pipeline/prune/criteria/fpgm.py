"""FPGM: filters near the geometric median of their group go first, since the others can represent them.

    s_i = Σ_j ‖f_i - f_j‖ / n, the sum whose minimiser over all points is the geometric median

He et al., Filter pruning via geometric median, CVPR 2019. A filter here is what all coupled layers hold of a unit
(norms left out, as in the source), each layer on its own scale (_filters.py): filters at right angles score 1.4 (√2),
and scores compare across groups. All sums are taken once, over the whole group, as in the source.
"""

from __future__ import annotations

import numpy as np

from pipeline.nouns import Ranking
from pipeline.prune.criteria._filters import filters, parts
from pipeline.prune.criteria.base import ordered
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ()


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the mean distance of their filters from all the others of the group."""
    layers = [part for part in parts(evidence.network) if not part.norm]
    found = []
    for group in evidence.topology.offered:
        vectors = filters(layers, group)
        norms = np.square(vectors).sum(1)
        distance = np.sqrt(np.maximum(norms[:, None] + norms - 2 * vectors @ vectors.T, 0.0))
        found.append(ordered(group, distance.mean(1)))
    return found
