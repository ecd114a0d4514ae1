"""How far accuracies scatter: test images of traffic signs are frames of few signs, and not independent.

The 12,630 test images are 421 signs in 30 frames each, in an order that does not tell which. So the design effect, how
much larger the variance of a mean is than that of as many independent images, is estimated on the held-out tracks,
whose signs are known; where it is not, all frames of a sign are taken to be alike (30).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks import data
from benchmarks.lines import Row

FRAMES = 30
CONFIDENCE = 0.95


def mistakes(net: str, test: NDArray[Any], held: NDArray[Any]) -> Row:
    """Numbers of the test images that are taken for another class, and the design effect; nothing of unknown data.

    test, held: classes of the test images and of those held out, in their order.
    """
    signs = net.endswith("_gtsrb")
    if not signs and not net.endswith("_cifar10_jpeg"):
        return {}
    _, labels = data.gtsrb("test") if signs else data.cifar10_jpeg_half(1)
    found: Row = {"wrong": np.flatnonzero(test != labels).tolist()}
    if signs:
        found["design"] = effect(held == data.gtsrb("validate")[1], data.tracks())
    return found


def effect(right: NDArray[np.bool_], tracks: NDArray[Any]) -> float:
    """Variance of the mean with whole tracks drawn, over that with images drawn; from 1 to FRAMES."""
    errors = right - right.mean()
    alone = float(np.square(errors).sum())
    if alone == 0:
        return float(FRAMES)
    _, numbers = np.unique(tracks, return_inverse=True)
    return min(max(float(np.square(np.bincount(numbers, errors)).sum()) / alone, 1.0), float(FRAMES))


def design(row: Row) -> float:
    """The design effect of a result."""
    return float(row.get("design", FRAMES if row["net"].endswith("_gtsrb") else 1))


def wilson(share: float, images: int, effect: float) -> tuple[float, float]:
    """Interval of a share of images that are worth `images / effect` independent ones (Wilson 1927)."""
    total, z = images / effect, float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return centre - half, centre + half


def half(weighed: Sequence[tuple[float, Row]]) -> float:
    """Half of the interval of a weighted sum of test accuracies, image by image where all say which are wrong."""
    images = weighed[0][1]["images"]
    if all("wrong" in row for _, row in weighed):
        sums = np.zeros(images)
        for weight, row in weighed:
            sums[row["wrong"]] -= weight
        variance = float(sums.var())
    else:
        variance = sum(weight**2 * row["accuracy"] * (1 - row["accuracy"]) for weight, row in weighed)
    return scatter(variance, images, max(design(row) for _, row in weighed))


def scatter(variance: float, images: int, effect: float) -> float:
    """Half of the interval of a mean over images."""
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance * effect / images)
