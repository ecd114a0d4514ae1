"""From sites that run alone to sites in a network: a few whole candidates say what the sum of the rows leaves out.

A row is timed alone, with all caches to itself; inside a network every site is slower by about the same factor,

    time of a network  =  empty graph + factor x sum of its rows,

and the factor is the median over some random narrowed networks that are measured among the rows. The dense network is
left out of it where there are such: it may outgrow a cache that its candidates fit into (a ResNet-20 with 1.1 MB of
weights ran 15 % above its rows where none of its candidates did), and candidates are what the table has to predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.latency.choices import Choices
from pipeline.nouns import Site, Topology

Narrowed = Callable[[Mapping[str, int], frozenset[str]], bytes]
"""The dense ONNX model cut to these widths, with these blocks removed."""

TRIES = 200
WIDEST, NARROWEST = 0.85, 0.3
"""Range of the share of units kept in the candidates."""

SAFE_MACS = 2e10
"""Multiply-accumulates a second of a slow core: only used to keep large networks from being timed too often."""

FEW = 3
"""Fewer candidates than this say nothing."""


@dataclass(frozen=True)
class Sample:
    """A random choice on the grid."""

    widths: dict[str, int]
    dropped: frozenset[str]


@dataclass(frozen=True)
class Scale:
    """factor: network time / sum of its rows. error: standard error of the factor, relative."""

    factor: float
    error: float


def how_many(macs: float, rounds: int, seconds: float = 1.5, most: int = 16) -> int:
    """Candidates worth their time, at six inferences a round, judged by the dense network's multiply-accumulates."""
    return int(np.clip(seconds / (6 * rounds * 0.5 * max(macs, 1.0) / SAFE_MACS), 3, most))


def draw(topology: Topology, sites: Sequence[Site], choices: Choices, count: int, seed: int) -> list[Sample]:
    """Random choices on the grid, from nearly dense to narrow, the same for the same seed. May be fewer than asked."""
    rng = np.random.default_rng(seed)
    allowed = {dim: frozenset(values) for dim, values in choices.values.items()}
    dims = list(dict.fromkeys(dim for site in sites for dim in site.dims))
    found: list[Sample] = []
    for keep in np.linspace(WIDEST, NARROWEST, count):
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


def adjust(rows: Sequence[float], times: Sequence[float], fixed: float) -> Scale:
    """The factor between networks and the sums of their rows, the dense network first and used only if it is alone."""
    logs = np.log([max(time - fixed, 1e-12) / max(total, 1e-12) for time, total in zip(times, rows, strict=True)])
    used = logs[1:] if len(logs) > FEW else logs[:1]
    middle = float(np.median(used))
    scatter = 1.4826 * float(np.median(np.abs(used - middle)))
    return Scale(float(np.exp(middle)), 1.2533 * scatter / float(np.sqrt(len(used))))
