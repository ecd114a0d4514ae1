"""LAMP: squared group magnitude over that of all units of the group that are not smaller.

    s_i = ‖w_i‖² / Σ_{j: ‖w_j‖ ≥ ‖w_i‖} ‖w_j‖²

The score of a weight in its layer (Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021) in
the form for groups: ‖w_i‖ is the norm over all coupled layers that `magnitude` computes. Inside a group the order is
that of magnitude; what changes is how groups compare, so only solvers that compare scores see a difference. The last
unit of every group scores 1, so that none is emptied. A group without any weight scores 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.nouns import Ranking
from pipeline.prune.criteria import magnitude
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ()


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by magnitude and score them by their share of what is left at their turn."""
    return [_adapted(ranking) for ranking in magnitude.rank(evidence)]


def _adapted(ranking: Ranking) -> Ranking:
    squares = np.square(ranking.marginal_loss)
    left = np.cumsum(squares[::-1])[::-1]
    shares = np.divide(squares, left, out=np.zeros_like(squares), where=left > 0)
    return dataclasses.replace(ranking, marginal_loss=tuple(float(s) for s in shares))
