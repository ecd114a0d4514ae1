"""Change points of a nightly series: where its level moved, advisory only.

E-divisive in sliding windows, weak points then pruned by a t test and a least magnitude: the method of Hunter (Fleming
et al., ICPE 2023, doi.org/10.1145/3578244.3583719), which lives on as Apache Otava; E-divisive itself is of Matteson
and James (arxiv.org/abs/1306.4933). It is written out here, on scipy, because no library offers it to a program of
today: Otava 0.8.0 pins numpy to 2.2 and scipy below 1.17 and brings clients of BigQuery, PostgreSQL and Slack;
MongoDB's signal-processing-algorithms 2.1.6 wants Python 3.11 exactly and numpy below 2; ruptures has penalties where
p-values are asked for. The tests hold what Otava finds in the same series.

Three things differ from Otava. Segments have at least `LEAST` nights, since with shorter ones a single disturbed night
is two change points; mean and median must both have moved, so that two disturbed nights are none either; and times are
compared as logarithms, because what disturbs a night multiplies its time. In 500 series of 120 equal nights with 5 % of
scatter 12 had a change point (Otava: 44), with 11.6 % of scatter 17 (57); a step of 10 % under 2 % was found in 200 of
200. Nights that resemble their neighbours, a week of a busy host, are a level to it: hence advisory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.nouns import Change

LEAST = 5
"""Nights on each side of a change point, so that a spike or a busy weekend is none."""
WEAK = 10.0
"""A first pass keeps points up to this many times the p-value asked for; the second sees them with their neighbours."""

Levels = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One number a night, oldest first. name: for people; at: UTC of each night, ISO 8601; ms: milliseconds, positive.

    devices: digest of each night's fingerprint, where one series crosses several.
    """

    name: str
    at: tuple[str, ...]
    ms: tuple[float, ...]
    devices: tuple[str, ...] = ()


def changes(series: Series, *, window: int = 30, p_value: float = 1e-3, magnitude: float = 0.05) -> tuple[Change, ...]:
    """Change points of a series, oldest first.

    window: nights that are looked at together; p_value: largest of a t test between the segments on both sides;
    magnitude: least change of mean and median, as a share of the lower one.
    """
    levels = np.log(np.array(series.ms, dtype=np.float64))
    points = _prune(levels, _split(levels, window, WEAK * p_value), p_value, magnitude)
    edges = [0, *points, len(levels)]
    found = []
    for start, point, end in zip(edges, points, edges[2:], strict=False):
        before, after = (float(np.mean(series.ms[part])) for part in (slice(start, point), slice(point, end)))
        found.append(Change(series.at[point], series.name, before, after, _p(levels, start, point, end)))
    return tuple(found)


def _split(levels: Levels, window: int, p_value: float) -> list[int]:
    """Weak change points: those of every window, which move on by half their length or to the last point found."""
    found: set[int] = set()
    start = 0
    while start < len(levels):
        inside = _divide(levels, start, min(start + window, len(levels)), p_value)
        found |= set(inside)
        start = max([start + window // 2, *inside[-1:]])
    return sorted(found)


def _divide(levels: Levels, start: int, end: int, p_value: float) -> list[int]:
    """Change points of levels[start:end], halved where it differs most for as long as that is significant."""
    points: list[int] = []
    while True:
        edges = [start, *points, end]
        candidates = [(*_best(levels, a, b), a, b) for a, b in pairwise(edges)]
        _, point, a, b = max(candidates)
        if _p(levels, a, point, b) > p_value:
            return points
        points = sorted([*points, point])


def _best(levels: Levels, start: int, end: int) -> tuple[float, int]:
    """The largest energy statistic of X = levels[start:point] and Y = levels[point:stop] over both, and its point.

    Q = 2 / (n + m) (S(X, Y) - m / (n - 1) S(X) - n / (m - 1) S(Y)) for n and m nights, where S sums the distances
    |x - y| of all pairs, between both or within one. (-inf, start) where the segment is too short to be divided.
    """
    size = end - start
    if size < 2 * LEAST:
        return -math.inf, start
    part = levels[start:end]
    sums = np.zeros((size + 1, size + 1))
    sums[1:, 1:] = np.abs(part[:, None] - part[None, :]).cumsum(axis=0).cumsum(axis=1)
    within = np.diag(sums) / 2
    point, stop = np.arange(LEAST, size - LEAST + 1)[:, None], np.arange(2 * LEAST, size + 1)[None, :]
    n, m = point, np.maximum(stop - point, 2)
    between = sums[point, stop] - sums[point, point]
    after = within[stop] - within[point] - between
    q = 2 / (n + m) * (between - m / (n - 1) * within[point] - n / (m - 1) * after)
    q[stop - point < LEAST] = -math.inf
    row, column = np.unravel_index(int(np.argmax(q)), q.shape)
    return float(q[row, column]), start + LEAST + int(row)


def _p(levels: Levels, start: int, point: int, end: int) -> float:
    """Two-sided p-value of Student's t test between the segments on both sides; 1 where one is too short."""
    before, after = levels[start:point], levels[point:end]
    if min(before.size, after.size) < LEAST:
        return 1.0
    shift, scatter = abs(after.mean() - before.mean()), math.hypot(before.std(), after.std())
    if scatter <= 1e-9 * shift:
        return 0.0 if shift > 0 else 1.0
    sides = (before.mean(), before.std(ddof=1), before.size, after.mean(), after.std(ddof=1), after.size)
    return float(stats.ttest_ind_from_stats(*sides).pvalue)


def _size(levels: Levels, start: int, point: int, end: int) -> float:
    """By how much the level moved, as a share of the lower one: what geometric mean and median both show."""
    before, after = levels[start:point], levels[point:end]
    mean, median = float(after.mean() - before.mean()), float(np.median(after) - np.median(before))
    return math.expm1(min(abs(mean), abs(median))) if mean * median > 0 else 0.0


def _prune(levels: Levels, points: list[int], p_value: float, magnitude: float) -> list[int]:
    """Take out the weakest point, and judge its neighbours anew, until every one is significant and large."""
    kept = list(points)
    while kept:
        edges = [0, *kept, len(levels)]
        places = list(zip(edges, kept, edges[2:], strict=False))
        doubt, weakest = max((_p(levels, *place), place[1]) for place in places)
        if doubt <= p_value:
            size, weakest = min((_size(levels, *place), place[1]) for place in places)
            if size >= magnitude:
                break
        kept.remove(weakest)
    return kept
