"""From sites that run alone to sites in a network: a few whole candidates say what the sum of the rows leaves out.

A row is timed with warm caches; in a network the weights of one layer have been pushed out by those of the others since
the last inference, the more so the larger the network. So the time of a site in a network is

    time = a x row + b x bytes of its weights + c,        a, b, c >= 0, the same for all sites

and the three are fitted, by non-negative least squares weighted by 1/t, to the dense network and some random narrowed
ones, measured among the rows. Without any narrowed ones only a is fitted, to the dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from pipeline.latency.choices import Choices
from pipeline.nouns import Site, Topology

Narrowed = Callable[[Mapping[str, int], frozenset[str]], bytes]
"""The dense ONNX model cut to these widths, with these blocks removed."""

TRIES = 200
SAFE_MACS = 2e10
"""Multiply-accumulates a second of a slow core: only used to keep large networks from being timed too often."""

DENSE_WEIGHT = 3.0


@dataclass(frozen=True)
class Sample:
    """A random choice on the grid."""

    widths: dict[str, int]
    dropped: frozenset[str]


@dataclass(frozen=True)
class Scale:
    """What a site costs in a network: rows x row + each_byte x bytes + each_site. misfit: relative, root mean square."""

    rows: float
    each_byte: float = 0.0
    each_site: float = 0.0
    misfit: float = 0.0


def how_many(macs: float, rounds: int, seconds: float = 1.5, most: int = 16) -> int:
    """Candidates worth their time, at six inferences a round, judged by the multiply-accumulates of the dense network."""
    return int(np.clip(seconds / (6 * rounds * 0.5 * max(macs, 1.0) / SAFE_MACS), 3, most))


def draw(topology: Topology, sites: Sequence[Site], choices: Choices, count: int, seed: int) -> list[Sample]:
    """Random choices on the grid, from nearly dense to narrow, the same for the same seed. May be fewer than asked."""
    rng = np.random.default_rng(seed)
    allowed = {dim: frozenset(values) for dim, values in choices.values.items()}
    dims = list(dict.fromkeys(dim for site in sites for dim in site.dims))
    found: list[Sample] = []
    for keep in np.linspace(0.9, 0.25, count):
        for _ in range(TRIES):
            dropped = frozenset(b.id for b in topology.removable if rng.random() < 0.5 * (1.0 - keep))
            widths = {}
            for group in topology.groups:
                wish = keep * group.size * rng.uniform(0.5, 1.5)
                nearest = min(choices.widths[group.id], key=lambda width: (abs(width - wish), width))
                widths[group.id] = group.size if group.block in dropped else nearest
            if all(dim.size(widths) in allowed[dim] for dim in dims):
                found.append(Sample(widths, dropped))
                break
    return found


def adjust(totals: Sequence[tuple[float, float, float]], times: Sequence[float], fixed: float) -> Scale:
    """Fit the scale. totals: (sum of rows, weight bytes, sites) of each network, the dense one first; times: measured."""
    wanted = np.maximum(np.array(times) - fixed, 1e-12)
    if len(times) < 4:
        return Scale(float(wanted[0]) / max(totals[0][0], 1e-12))
    sample = np.array(totals)
    unit = np.maximum(sample.max(axis=0), 1e-12)
    weight = np.ones(len(times))
    weight[0] = DENSE_WEIGHT
    weights, _ = nnls(weight[:, None] * (sample / unit) / wanted[:, None], weight)
    residual = (sample / unit) @ weights / wanted - 1.0
    rows, each_byte, each_site = (float(w) for w in weights / unit)
    return Scale(rows, each_byte, each_site, float(np.sqrt(np.mean(residual**2))))
