"""RED: units with the same hashed weights are merged, then those whose weights are relatively nearest; needs no data.

Yvinec et al., RED, NeurIPS 2021: the weights of each layer are hashed (hashing.py), neurons with near weight vectors
become their mean (batch norms folded: the repair `merge` does that), and the next layer's columns are summed. The
source merges what lies within a quantile of a layer's distances. For an order of removal the clusters are grown here
one merge at a time, each the one that adds the least squared distance of units to the mean that stands for them (Ward):

    loss(A, B) = |A| |B| / (|A| + |B|) ‖mean A - mean B‖²,     loss(A by nothing) = |A| ‖mean A‖²

relative to the mean squared norm of a group's filters, over all layers that make its channels (coupled streams,
depthwise kernels), each on its own scale (_filters.py, also on why norms are not folded for the distance): losses
compare across groups. Nothing is a cluster too, ours:
a unit that is nearer to no weights than to any other (a dead one, or the smallest left when all differ) goes without a
twin, since the mean of two filters that have nothing in common serves neither.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.nouns import ChannelGroup, Ranking
from pipeline.prune.criteria._filters import Floats, filters, parts
from pipeline.prune.evidence import Evidence
from pipeline.prune.hashing import adaptive

NEEDS: tuple[str, ...] = ()
DUPLICATES_FIRST = True
STAND_INS = True


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by what merging them adds to the distances of hashed weights from the means that replace them."""
    held = [
        part if part.norm else dataclasses.replace(part, numbers=adaptive(part.numbers).weights)
        for part in parts(evidence.network)
    ]
    return [merged(group, filters(held, group)) for group in evidence.topology.offered]


def merged(group: ChannelGroup, vectors: Floats) -> Ranking:
    """Ward's clusters of vectors (units, numbers), as removals of all but the unit that stands for a cluster.

    The larger cluster keeps its unit, of equal ones the one whose unit has the larger norm.
    """
    norms = np.square(vectors).sum(1)
    distance = np.maximum(norms[:, None] + norms - 2 * vectors @ vectors.T, 0.0)
    loss, sizes, alone = distance / 2, np.ones(group.size), norms.copy()
    np.fill_diagonal(loss, np.inf)
    order: list[int] = []
    added: list[float] = []
    twin: list[int] = []
    for _ in range(group.size):
        least = loss.min(1)
        i = int(least.argmin())
        nothing = int(alone.argmin())
        if alone[nothing] <= least[i]:
            gone, stays, cost = nothing, -1, float(alone[nothing])
        else:
            j = int(loss[i].argmin())
            gone, stays = (j, i) if (sizes[i], norms[i]) >= (sizes[j], norms[j]) else (i, j)
            cost = float(loss[i, j])
            _join(loss, sizes, alone, gone, stays)
        loss[gone], loss[:, gone], alone[gone] = np.inf, np.inf, np.inf
        order.append(gone)
        added.append(cost)
        twin.append(stays)
    return Ranking(group.id, tuple(order), tuple(added), tuple(twin), "mean")


def _join(loss: Floats, sizes: Floats, alone: Floats, gone: int, stays: int) -> None:
    """Losses of the joined cluster from those of its two parts (Lance and Williams)."""
    a, b, between = sizes[gone], sizes[stays], loss[gone, stays]
    joined = ((a + sizes) * loss[gone] + (b + sizes) * loss[stays] - sizes * between) / (a + b + sizes)
    joined[[gone, stays]] = np.inf
    loss[stays], loss[:, stays] = joined, joined
    alone[stays] = max(alone[gone] + alone[stays] - between, 0.0)
    sizes[stays] = a + b
