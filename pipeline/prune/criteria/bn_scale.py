"""BN scale: |γ| of the norms that a unit passes, as in Network Slimming.

    s_i = sqrt(mean over the norms of γ²)

γ is the standard deviation of what a batch norm gives (Liu et al., Learning Efficient Convolutional Networks through
Network Slimming, ICCV 2017). Coupled channels pass several norms, one for each branch of a residual stream or step of a
depthwise chain: the root mean square is taken, so that long and short groups compare. Norms of every kind count.

A unit without a norm, or with one that has no γ, takes the L2 norm of the filters that produce it (root mean square
over its layers): the standard deviation of its output for white inputs of unit variance, which is what |γ| stands for.
The two are of one kind but not of one scale, so compare such groups across a network with care.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipeline.nouns import Ranking, Units
from pipeline.prune.criteria._filters import NORMS, Floats, outputs
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ()


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the scale of their norms."""
    size = evidence.units + 1
    scales, norms, filters, layers = (np.zeros(size) for _ in range(4))
    modules, named = dict(evidence.network.graph.named_modules()), dict(evidence.network.graph.named_parameters())
    along = outputs(evidence.topology)
    for name, axes in evidence.topology.params.items():
        owner, _, role = name.rpartition(".")
        norm = role == "weight" and isinstance(modules[owner], NORMS)
        if name not in named or not (norm or name in along):
            continue
        for axis, units in axes.items():
            squares = named[name].detach().double().square().movedim(axis, 0).reshape(len(units), -1)
            if norm:
                _add(scales, norms, squares.mean(1), units)
            elif axis == along[name]:
                _add(filters, layers, squares.sum(1), units)
    means = np.where(norms > 0, scales / np.maximum(norms, 1), filters / np.maximum(layers, 1))
    return by_score(evidence.topology, np.sqrt(means[:-1]))


def _add(total: Floats, count: Floats, values: Tensor, units: Units) -> None:
    """Add the value of every position to its unit, to the last entry for a position of no unit."""
    np.add.at(total, units, values.numpy())
    np.add.at(count, units, 1)
