"""Magnitude: the L2 norm of every weight that a unit owns, over all coupled layers.

s_i = sqrt(Σ_{w in unit i} w²) over the output slices of its producers and the input slices of its readers, as group
norms of coupled parameters (Fang et al., DepGraph, CVPR 2023). Norm scales count as weights, statistics do not.
"""

from __future__ import annotations

import numpy as np

from pipeline.nouns import Ranking
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ()


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the norm of their weights."""
    squares = np.zeros(evidence.units + 1)
    named = dict(evidence.network.graph.named_parameters())
    for name, axes in evidence.topology.params.items():
        if name not in named or name.endswith("bias"):
            continue
        value = named[name].detach().double().numpy() ** 2
        for axis, units in axes.items():
            others = tuple(a for a in range(value.ndim) if a != axis)
            np.add.at(squares, units, value.sum(axis=others))
    return by_score(evidence.topology, np.sqrt(squares[:-1]))
