"""Entropic: channel weights on the simplex, found together with the layer's least squares; the lightest go first.

    min_{Λ, w ∈ Δ}  Σ_readers [ ‖Y − X D(w) Λ‖² / ‖Y‖² + ε₂ ā ‖Λ‖² / ‖Y‖² ] + ε_E Σ_c w_c ln w_c

After Barisin and Horenko, Entropic sparsification of convolutional networks (Neural Computation, 2025): a layer recast
as sparse entropic regression, one weight a channel. X are its patches and Y = X Wᵀ its outputs, both without their
means; D(w) multiplies the columns of channel c by C w_c; ā is the mean variance of a column. Details are not public,
ours are: Λ by ridge least squares and w by a convex step in turns (descent in the mirror of the entropy with a step
found by backtracking, so that the objective never rises), one w for all layers that read a group, the convex sign of
the entropy, as in SPARTAn. What makes w sparse is the simplex with the ridge: for a given product of w_c and Λ_c a
channel costs ‖Λ_c‖² = ‖product‖² / (C w_c)², so the channels compete for a fixed sum; the entropy keeps w off the
boundary, so that light channels too are in an order.

Of the regression the order alone is used. Its weights D(w) Λ are shrunk by a large ridge (RIDGE) and spread over all
channels, so no network gets them: the weights of a kept set are solved afresh. marginal_loss is the reconstruction
error that each removal then adds, relative to the output's variance; the repair `layerwise` (merge.py) gives the
network such weights, with a ridge of its own. Needs no labels and no gradients; cost: ROUNDS factorisations of each
layer's Gram matrix, and one elimination in the order found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.nouns import Ranking
from pipeline.prune.criteria._quadratic import Reading, by_unit, eliminate, readings
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs",)

ENTROPY = 0.02
RIDGE = 2.0
ROUNDS = 10
STEPS = 60


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by their weight."""
    rankings = []
    for group in evidence.topology.offered:
        found = readings(evidence, group)
        order = regress(found).argsort(stable=True).tolist()
        rankings.append(Ranking(group.id, tuple(order), tuple(eliminate(found, order)[1])))
    return rankings


def regress(found: Sequence[Reading]) -> Tensor:
    """ln w of every unit, shape (units,), after ROUNDS turns."""
    units = len(found[0].at)
    log = torch.full((units,), -math.log(units), dtype=torch.double)
    for _ in range(ROUNDS):
        forms = [form(reading, units * log.exp()) for reading in found]
        tables, lines = zip(*forms, strict=True)
        log = lighten(torch.stack(tables).sum(0), torch.stack(lines).sum(0), log)
    return log


def form(reading: Reading, scale: Tensor) -> tuple[Tensor, Tensor]:
    """H and h of ‖Y − X D(v) Λ‖² / ‖Y‖² = vᵀ H v − 2 hᵀ v + constant, for the best Λ at v = scale."""
    own, (_, times) = reading.own, reading.at.shape
    covariance, columns = reading.covariance[own][:, own], scale.repeat_interleave(times)
    across = covariance @ reading.weight[:, own].T
    ridged = columns[:, None] * covariance * columns
    ridged.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-8)
    solved = torch.cholesky_solve(columns[:, None] * across, torch.linalg.cholesky(ridged))
    line = (solved * across).sum(1).reshape(-1, times).sum(1)
    return by_unit(covariance * (solved @ solved.T), reading), line


def lighten(table: Tensor, line: Tensor, log: Tensor) -> Tensor:
    """Lower vᵀ H v − 2 hᵀ v + ε_E Σ w ln w, v = C w, over the simplex, from ln w on."""
    units, step = len(log), 1.0
    for _ in range(STEPS):
        w = log.exp()
        pull = 2 * units * (units * (table @ w) - line)
        while True:
            moved = (log - step * pull) / (1 + step * ENTROPY)
            moved = moved - moved.logsumexp(0)
            way = moved.exp() - w
            if step * units**2 * (way @ table @ way) <= (moved.exp() * (moved - log)).sum() + 1e-14:
                break
            step /= 2
        log, step = moved, 2 * step
    return log
