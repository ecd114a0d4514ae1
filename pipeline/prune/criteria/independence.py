"""Channel independence: how much of the nuclear norm of the feature maps goes with a channel.

    CI_c = ‖F‖_* − ‖F with row c zeroed‖_*,      s_c = mean over readers of (mean over images CI_c) / Σ_c (the same)

F holds the maps of one image as a layer reads them, one unit a row, all its positions in the row (Sui et al., CHIP,
NeurIPS 2021; Wang et al., Enhanced Linear Representation Redundancy, 2023, whose ratio rule compares shares of Σ CI).
A channel that the others make up linearly scores low; being correlated is what the hook `ccm` rewards in training.

Zeroing row c takes f_c f_cᵀ from the Gram matrix FᵀF = V diag(d) Vᵀ. The nuclear norm is the trace of its square root,
and for a change of rank one

    CI_c = −1/π ∫_0^∞ ln(1 − q_c(x²)) dx,      q_c(t) = f_cᵀ (FᵀF + t)⁻¹ f_c = Σ_j (f_c · v_j)² / (d_j + t)

(from √a = 1/π ∫ a / (a + t) dt / √t and tr (B + t)⁻¹ − tr (A + t)⁻¹ = d/dt ln(1 − q), in parts). With x = e^u the
trapezoid rule converges geometrically: 98 nodes give CI to about 1e-7 of the largest singular value. So all channels of
an image cost one eigenvalue problem of r = min(C, H W) rows and two products C × r × 98, where removing them one at a
time would cost C singular value decompositions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.nouns import Ranking
from pipeline.prune.criteria.base import ordered
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs",)

STEP = 0.4
SPAN = (-21.0, 18.0)
"""Nodes of the trapezoid rule: ln x beside the largest singular value's logarithm."""
EMPTY = 1e-14
"""Eigenvalues below this share of the largest are none."""


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by their share of the nuclear norm."""
    rankings = []
    for group in evidence.topology.offered:
        seen = evidence.maps[group.id]
        shares = torch.zeros(group.size, dtype=torch.double)
        for maps in seen:
            own = torch.stack([independence(image) for image in maps.flatten(2).double()]).mean(0)
            shares += own / own.sum().clamp_min(torch.finfo(own.dtype).tiny) / len(seen)
        rankings.append(ordered(group, shares.numpy()))
    return rankings


def independence(rows: Tensor) -> Tensor:
    """What each row of a matrix (C, n) adds to its nuclear norm, shape (C,)."""
    if len(rows) <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        shares, beside = vectors.square(), torch.zeros(len(rows), 1, dtype=rows.dtype)
    else:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        live = values > EMPTY * values[-1]
        shares = (rows @ vectors).square() / torch.where(live, values, 1.0) * live
        beside = (1 - shares.sum(1, keepdim=True)).clamp_min(0)
    values = values.clamp_min(0)
    if values[-1] <= 0:
        return torch.zeros(len(rows), dtype=rows.dtype)
    u = torch.arange(*SPAN, STEP, dtype=rows.dtype) + 0.5 * values[-1].log()
    t = (2 * u).exp()
    taken = shares @ (values[:, None] / (values[:, None] + t))
    rest = beside + shares @ (t / (values[:, None] + t))
    drop = torch.where(taken < 0.5, torch.log1p(-taken.clamp_max(0.5)), rest.clamp_min(1e-300).log())
    found: Tensor = -STEP / math.pi * drop @ u.exp()
    return found
