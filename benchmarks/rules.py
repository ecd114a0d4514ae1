"""How others decide that a model became slower, on the same samples: an alarm by what is stored and by tonight's run.

Each rule takes the nanoseconds of one run that was kept, and those of tonight's, and says whether it would raise the
alarm. All compare two runs from different moments, without a control; read from the sources of the named versions.
benchmarks/verdicts.py runs them beside the check of this project.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Nanoseconds = NDArray[np.int64]
Rule = Callable[[Nanoseconds, Nanoseconds], bool]

EDGEGATE_SHARE, EDGEGATE_FLOOR_MS = 0.10, 0.5
EDGELENS_SHARE = 0.05
ALPHA = 0.01


def edgegate(stored_ns: Nanoseconds, tonight_ns: Nanoseconds) -> bool:
    """p99 above the stored one by more than 10 % and by more than 0.5 ms.

    edgegate 0.2.0, compare.py, `evaluate`: change > latency_p99_regression_pct and value - base > FLOORS, the floor
    0.5 ms unless configured; 10 is its README's percentage. Percentiles are rounded to microseconds, as it does.
    """
    return edgegate_share(stored_ns, tonight_ns) and _p99_ms(tonight_ns) - _p99_ms(stored_ns) > EDGEGATE_FLOOR_MS


def edgegate_share(stored_ns: Nanoseconds, tonight_ns: Nanoseconds) -> bool:
    """p99 above the stored one by more than 10 %: edgegate with its floor set to 0, as a model below 5 ms needs it.

    With the floor a model of 0.8 ms may take 60 % longer before anything is said.
    """
    before = _p99_ms(stored_ns)
    return (_p99_ms(tonight_ns) - before) / before > EDGEGATE_SHARE


def edgelens(stored_ns: Nanoseconds, tonight_ns: Nanoseconds) -> bool:
    """p95 above the stored one by 5 % or more.

    edgelens 0.1.0, compare/engine.py, `_verdict`: p95 change >= REGRESSION_LATENCY_RISE_PCT = 5. Its other reasons,
    frames per second down by 5 % and deadline misses up by 0.1 points, are left out: they only add alarms.
    """
    before, now = (float(np.percentile(ns, 95)) for ns in (stored_ns, tonight_ns))
    return (now - before) / before >= EDGELENS_SHARE


def mann_whitney(stored_ns: Nanoseconds, tonight_ns: Nanoseconds) -> bool:
    """Tonight's raw samples are larger by the Mann-Whitney U test, one-sided, p < 0.01.

    The test that Google benchmark's compare.py runs on repetitions, and that Laaber et al. (Software microbenchmarking
    in the cloud, EMSE 2019) found to raise very many false alarms on raw samples: it takes them for independent, and a
    run's are not. One-sided at 0.01 is milder than their two-sided 0.05.
    """
    return bool(stats.mannwhitneyu(tonight_ns, stored_ns, alternative="greater").pvalue < ALPHA)


RULES: dict[str, Rule] = {
    "stored p99 + 10 % (edgegate without floor)": edgegate_share,
    "stored p99 + 10 % and + 0.5 ms (edgegate)": edgegate,
    "stored p95 + 5 % (edgelens)": edgelens,
    "Mann-Whitney U on raw samples": mann_whitney,
}


def _p99_ms(ns: Nanoseconds) -> float:
    return round(float(np.percentile(ns, 99)) * 1e-6, 3)
