"""SInGE: the loss gradient integrated along a path on which a group's units shrink away.

    I_i = Σ_s (m_s − m_{s+1}) · mean_n |∂L_n/∂m_i at m_s|,    m_s = μ^s, s = 0 … S − 1

A gate m on a unit scales its weights, W(s) = μ^s W, so that ⟨∇_{W(s)} L, W(s)⟩ = m ∂L/∂m and, since
m_s − m_{s+1} = (1 − μ) m_s, the published sum over the path (Yvinec et al., SInGE, NeurIPS 2022) is this integral up to
the factor 1 − μ, which makes scores losses and comparable between groups. It sees what first order at m = 1 misses,
where a trained network's gradient vanishes. The paper's details are not public; chosen here: all units of one group
shrink at once, the other groups stay whole (S runs a group instead of S runs a unit); absolute values are taken for
each sample before the mean, so that samples do not cancel; every point of the path sees other samples. The paper's
fine-tuning between removals is not this file's: the solver `netadapt` trains between its steps, with any criterion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.nouns import Ranking
from pipeline.prune.criteria._damage import Shelf, damage, macs
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs", "gradients")
SHRINK, STEPS = 0.6, 5
WORK = 4e11
"""Multiplications of all forward passes together, as far as LEAST samples a point allow."""
LEAST, MOST = 4, 64


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the absolute gate gradient integrated from the whole group to almost nothing of it."""
    shelf, offered = Shelf(evidence), evidence.topology.offered
    each = int(WORK / max(1, macs(evidence.topology) * len(offered) * STEPS))
    each = min(max(LEAST, min(MOST, each)), len(shelf))
    order = torch.randperm(len(shelf), generator=torch.Generator().manual_seed(evidence.seed))
    scores = torch.zeros(evidence.units)
    for step in range(STEPS):
        size = SHRINK**step
        chosen = order[torch.arange(step * each, (step + 1) * each) % len(shelf)]
        for group in offered if step else offered[:1]:  # at full size one run serves all groups
            shrunk = torch.tensor(group.units)
            gates = torch.ones(each, evidence.units)
            gates[:, shrunk] = size
            slope = _slope(evidence, shelf, chosen, gates)
            own = shrunk if step else torch.arange(evidence.units)
            scores[own] += (1 - SHRINK) * size * slope[own]
    return by_score(evidence.topology, scores)


def _slope(evidence: Evidence, shelf: Shelf, chosen: Tensor, gates: Tensor) -> Tensor:
    """Mean over samples of |∂L_n/∂m_i|, shape (units,)."""
    inputs, targets, dense = shelf.take(chosen)
    gates.requires_grad_()
    loss = damage(evidence, evidence.gated(inputs, gates), targets, dense)
    (gradient,) = torch.autograd.grad(loss, gates)
    return gradient.abs().sum(0)
