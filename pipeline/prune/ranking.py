"""Ranking: one criterion, found by name, applied to every offered group."""

from __future__ import annotations

from typing import cast

from pipeline.nouns import Ranking
from pipeline.prune.criteria.base import PACKAGE, Criterion
from pipeline.prune.evidence import Evidence, Samples
from profiles import plugins
from profiles.errors import UsageError

RANK_SAMPLES = 512
"""Calibration samples that a criterion looks at, the first ones."""


def rank(evidence: Evidence, criterion: str) -> dict[str, Ranking]:
    """Group id -> ranking. Raises UsageError for an unknown criterion or one that needs what the project lacks."""
    chosen = cast(Criterion, plugins.load(PACKAGE, criterion))
    if chosen.NEEDS and not evidence.samples.count:
        raise UsageError(
            f"the criterion '{criterion}' needs calibration inputs, and the project has no [data].",
            "add [data] with calibration to deploy.toml, or --criterion red, magnitude or lamp.",
        )
    require_labels(criterion, evidence.samples)
    return {ranking.group: ranking for ranking in chosen.rank(evidence)}


def require_labels(criterion: str, samples: Samples) -> None:
    """Raise UsageError for a criterion that needs labels which the samples have not."""
    if samples.targets is None and "targets" in plugins.load(PACKAGE, criterion).NEEDS:
        raise UsageError(
            f"the criterion '{criterion}' needs labels, and data.calibration gives none.",
            "yield (inputs, targets), or --criterion fisher.",
        )
