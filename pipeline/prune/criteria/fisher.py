"""Group Fisher: s_i = Σ_n (Σ_{x in X} ∂L_n/∂m_i^x)², coupled channels summed inside the square.

At a minimum the second-order effect of masking a unit is ½ of the diagonal of the Fisher information (Liu et al.,
Group Fisher Pruning, ICML 2021). Raw loss, not divided by cost: the exact solver's constraint prices the cost. Without
labels the samples are the network's own predictions.
"""

from __future__ import annotations

from pipeline.nouns import Ranking
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs", "gradients")


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by half the mean squared gate gradient."""
    return by_score(evidence.topology, 0.5 * evidence.gate_gradients.square().mean(0))
