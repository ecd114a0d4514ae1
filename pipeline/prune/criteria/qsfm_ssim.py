"""QSFM-SSIM: the map goes that a straight line on another map gives back with the highest structural similarity.

    SSIM(x, y) = (2 μ_x μ_y + c1)(2 σ_xy + c2) / ((μ_x² + μ_y² + c1)(σ_x² + σ_y² + c2)),   c = (0.01 L)², (0.03 L)²

of x = F_i and y = a F_j + b, averaged over images; L is the range of the layer's maps. Wang et al., IEEE IoT Journal
2022, compare F_i with F_j as they are; the line on the twin, the weights and the victim are ours (_similarity.py). One
window the size of the map: windows of 8 x 8 chose no better on ResNet-56 (divergence after least squares 0.591 against
0.576 nats at -48 % operations) and cost as many times more as they are. marginal_loss = (1 - SSIM) times the share of
the unit in what is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.nouns import Ranking
from pipeline.prune.criteria._similarity import Lines, by_similarity
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs",)
DUPLICATES_FIRST = True
STAND_INS = True

LIVE = 1 << 23
"""Numbers that one step over some images may hold at once."""


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by how little a line on the most similar one resembles them."""
    return by_similarity(evidence, unlike)


def unlike(seen: Lines) -> Tensor:
    """1 - SSIM(F_i, a F_j + b), mean over images, (units, units)."""
    images, units, positions = seen.maps.shape
    extent = float(seen.maps.max() - seen.maps.min())
    bright, contrast = (0.01 * extent) ** 2 + 1e-12, (0.03 * extent) ** 2 + 1e-12
    total = torch.zeros(units, units)
    for maps in torch.split(seen.maps, max(1, LIVE // units**2)):
        mean = maps.mean(2)
        centred = maps - mean[:, :, None]
        both = centred @ centred.transpose(1, 2) / positions
        own = both.diagonal(dim1=1, dim2=2)[:, :, None]
        line, level = seen.gain * mean[:, None, :] + seen.offset, mean[:, :, None]
        similar = (2 * level * line + bright) / (level.square() + line.square() + bright)
        spread = seen.gain.square() * own.transpose(1, 2)
        similar *= (2 * seen.gain * both + contrast) / (own + spread + contrast)
        total += (1 - similar).sum(0)
    return (total / images).clamp_min(0)
