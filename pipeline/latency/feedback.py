"""Correcting the table with what whole candidates took: one factor, near the latencies that matter.

A good table needs no correction, and a factor from one candidate adds that candidate's noise; a biased table is mended
by the geometric mean of measured / predicted over the candidates nearest in predicted latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.nouns import LatencyTable

NEAREST = 3


def recalibrate(
    table: LatencyTable, measured: Sequence[tuple[Mapping[str, int], Iterable[str], float]]
) -> LatencyTable:
    """The table with its correction set from measured candidates: (widths, removed blocks, milliseconds).

    The factor is against the uncorrected table, so that it does not matter how often it has been corrected before.
    Raises KeyError for widths off the grid.
    """
    plain = replace(table, correction=1.0)
    pairs = [(plain.predict(widths, dropped).ms, ms) for widths, dropped, ms in measured]
    if not pairs:
        return table
    least = min(predicted for predicted, _ in pairs)
    near = sorted(pairs, key=lambda pair: abs(math.log(pair[0] / least)))[:NEAREST]
    logs = [math.log(ms / predicted) for predicted, ms in near]
    return replace(table, correction=math.exp(sum(logs) / len(logs)))
