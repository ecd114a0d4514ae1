"""QSFM-PSNR: the map goes that a straight line on another map gives back with the highest peak signal-to-noise ratio.

PSNR(i by j) = 10 log10(peak² / MSE(F_i, a F_j + b)), Wang et al., IEEE IoT Journal 2022. The source compares F_i with
F_j as they are; the line on the twin, the weights and the victim are ours (_similarity.py). The peak is the root mean
square of what the layer reads of a unit, which unlike a layer's greatest value compares across layers. So marginal_loss
= 10^(-PSNR / 10), and one threshold on it is one PSNR for the whole network.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.nouns import Ranking
from pipeline.prune.criteria._similarity import Lines, by_similarity
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs",)
DUPLICATES_FIRST = True
STAND_INS = True


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the error that remains when the most similar one stands in."""
    return by_similarity(evidence, unexplained)


def unexplained(seen: Lines) -> Tensor:
    """MSE(F_i, a F_j + b) as a share of the variance of F_i, (units, units)."""
    return 1 - seen.explained
