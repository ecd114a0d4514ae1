"""Taylor: first-order change of the loss when a unit is masked, |∂L/∂m_i| averaged over samples.

L(m − e_i) − L(m) ≈ −∂L/∂m_i, with the gradient summed over all coupled readers (Molchanov et al., CVPR 2019, on
gates). Weak on a network trained to near zero loss, whose gradients vanish.
"""

from __future__ import annotations

from pipeline.nouns import Ranking
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs", "gradients")


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the mean absolute first-order effect."""
    return by_score(evidence.topology, evidence.gate_gradients.abs().mean(0))
