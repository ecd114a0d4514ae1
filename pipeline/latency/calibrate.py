"""From sites that run alone to sites in a network: a few whole candidates say what the rows leave out.

A row is timed alone, with all caches to itself, and carries the error of its own few sessions; inside a network

    time of a network  =  empty graph + sum over sites of factor(site) x row(site),

where sites of equal models share a factor. The factors are a ridge regression on random narrowed networks that are
measured among the rows: all near one common value, each as far from it as the networks ask for,

    minimise  sum_n ((sum_s x_s r_ns) / t_n - 1)^2 / NOISE^2  +  sum_s (x_s / c - 1)^2 / SCATTER^2      over x, c

The dense network is left out of it where there are such: it may outgrow a cache that its candidates fit into (a
ResNet-20 with 1.1 MB of weights ran 15 % above its rows where none of its candidates did), and candidates are what the
table has to predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.latency.choices import Choices
from pipeline.nouns import Site, Topology

Narrowed = Callable[[Mapping[str, int], frozenset[str]], bytes]
"""The dense ONNX model cut to these widths, with these blocks removed."""

TRIES = 200
WIDEST, NARROWEST = 0.7, 0.05
"""Least share of its units that a group of a candidate keeps, in the first and in the last candidate."""

SAFE_MACS = 2e10
"""Multiply-accumulates a second of a slow core: only used to keep large networks from being timed too often."""

FEW = 3
"""Networks, the dense one among them, that are too few to say anything."""

NOISE = 0.01
"""Scatter of one session of a network: where its memory lies moves it by 0.5 to 1 per cent."""

SCATTER = 0.03
"""How far the factors of sites lie apart."""

OUTLIER, TURNS = 2.5, 3
"""Networks missed by more than this many times the noise count for less; turns of finding them."""


@dataclass(frozen=True)
class Sample:
    """A random choice on the grid."""

    widths: dict[str, int]
    dropped: frozenset[str]


@dataclass(frozen=True)
class Scale:
    """factors: time in a network / time of its row, shape (sites,). error: what a prediction misses by, relative."""

    factors: NDArray[np.float64]
    error: float


def how_many(macs: float, rounds: int, seconds: float = 1.5, most: int = 24) -> int:
    """Candidates worth their time, at six inferences a round, judged by the dense network's multiply-accumulates."""
    return int(np.clip(seconds / (6 * rounds * 0.5 * max(macs, 1.0) / SAFE_MACS), 3, most))


def draw(topology: Topology, sites: Sequence[Site], choices: Choices, count: int, seed: int) -> list[Sample]:
    """Random choices on the grid, the same for the same seed; may be fewer than asked.

    Every group's width is drawn on its own, so that the candidates tell the sites apart.
    """
    rng = np.random.default_rng(seed)
    allowed = {dim: frozenset(values) for dim, values in choices.values.items()}
    dims = list(dict.fromkeys(dim for site in sites for dim in site.dims))
    found: list[Sample] = []
    for least in np.linspace(WIDEST, NARROWEST, count):
        for _ in range(TRIES):
            dropped = frozenset(b.id for b in topology.removable if rng.random() < 0.4 * (1.0 - least))
            widths = {}
            for group in topology.groups:
                wish = group.size * rng.uniform(least, 1.0)
                nearest = min(choices.widths[group.id], key=lambda width: (abs(width - wish), width))
                widths[group.id] = group.size if group.block in dropped else nearest
            if all(dim.size(widths) in allowed[dim] for dim in dims):
                found.append(Sample(widths, dropped))
                break
    return found


def adjust(rows: NDArray[np.float64], times: Sequence[float], fixed: float) -> Scale:
    """Factors of the sites from whole networks, the dense one first and used only if it is alone.

    rows: time of each site's row in each network, 0 where it is not part of it, shape (networks, sites); times: of the
    networks; fixed: of the empty graph. The error is the root mean square of what each network is missed by when it is
    left out; 0 for the dense one alone.
    """
    net = np.maximum(np.asarray(times) - fixed, 1e-12)
    shares = rows / net[:, None]
    if len(net) <= FEW:
        return Scale(np.full(rows.shape[1], 1.0 / max(float(shares[0].sum()), 1e-12)), 0.0)
    shares = shares[1:]
    shared = 1.0 / float(np.median(shares.sum(axis=1)))
    weights = np.ones(len(shares))
    for _ in range(TURNS):
        factors, missed = _ridge(shares, shared, weights)
        weights = np.minimum(1.0, OUTLIER * NOISE / np.maximum(np.abs(missed), 1e-12))
    return Scale(factors, float(np.sqrt(np.average(missed**2, weights=weights))))


def _ridge(
    shares: NDArray[np.float64], shared: float, weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors, and what each network is missed by when it is left out (e / (1 - leverage))."""
    count = shares.shape[1]
    scale = np.sqrt(weights) / NOISE
    data = np.hstack([shares * shared, np.zeros((len(shares), 1))]) * scale[:, None]
    prior = np.hstack([np.eye(count), -np.ones((count, 1))]) / SCATTER
    system = np.vstack([data, prior])
    inverse = np.linalg.pinv(system.T @ system)
    found = inverse @ (data.T @ scale)
    leverage = np.einsum("ij,jk,ik->i", data, inverse, data)
    missed = (shares @ found[:count] * shared - 1.0) / np.maximum(1.0 - leverage, 1e-3)
    return found[:count] * shared, missed
