"""The device's channel grid: the step of the staircase on which a convolution's time lies, found by measuring.

Convolutions of one width in and out are timed over narrow widths. The step is the largest g for which no width off the
grid is worth having: t(w) >= t(w rounded up to g), within NOISE, on average over the widths above g, for every kind of
kernel. (With ONNX Runtime on AVX-512 that is 16: flat between multiples of 16, slow where not a multiple of 4.) Widths
below the step are other kernels, cheaper or dearer: `below` lists those that are cheaper than a full step, by kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from pipeline.latency.reference import chain
from pipeline.latency.timing import PROTOCOL, Clock, key
from profiles.schema import Precision

STEPS = (1, 2, 4, 8, 16, 32)
WIDTHS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64)
KINDS = {"3x3": 14, "1x1": 16, "depthwise": 16}
"""Kind of kernel -> height and width of the map it is timed on."""

ELEMENTS: Mapping[Precision, int] = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
"""Precision -> ONNX's number of the type that the convolutions are timed in: the staircase is another in each."""

COPIES = 6
NOISE = 0.03
CHEAPER = 0.05


@dataclass(frozen=True)
class Grid:
    """step: widths are multiples of it. below: kind of kernel -> narrower widths that are cheaper than one step."""

    step: int
    below: Mapping[str, tuple[int, ...]]


def find_grid(clock: Clock, precision: Precision = "fp32") -> Grid:
    """The grid of a device in a precision, from the store where it was found before."""
    name = "grid" if precision == "fp32" else f"grid {precision}"
    known = clock.store.fact(clock.device, PROTOCOL, name)
    if known is None:
        grid = judge(_curves(clock, ELEMENTS[precision]))
        known = clock.store.learn(
            clock.device, PROTOCOL, name, {"step": grid.step, "below": {k: list(v) for k, v in grid.below.items()}}
        )
    return Grid(int(known["step"]), {kind: tuple(widths) for kind, widths in known["below"].items()})


def judge(curves: Mapping[str, Mapping[int, float]]) -> Grid:
    """The grid that the times show. curves: kind of kernel -> width -> time in any unit, at all of WIDTHS."""
    step = max(g for g in STEPS if all(_holds(curve, g) for curve in curves.values()))
    below = {
        kind: tuple(w for w in (step // 4, step // 2) if w in curve and curve[w] < (1 - CHEAPER) * curve[step])
        for kind, curve in curves.items()
        if step in curve
    }
    return Grid(step, below)


def _holds(curve: Mapping[int, float], step: int) -> bool:
    """Whether rounding a width up to this step costs next to nothing, averaged over the widths off the grid."""
    losses = []
    for width, time in curve.items():
        above = -(-width // step) * step
        if width > step and width != above and above in curve:
            losses.append(max(0.0, 1.0 - time / curve[above]))
    return not losses or float(np.mean(losses)) < NOISE


def _curves(clock: Clock, element: int) -> dict[str, dict[int, float]]:
    models = {
        (kind, width): chain(kind, width, size, COPIES, element) for kind, size in KINDS.items() for width in WIDTHS
    }
    times = clock.ratios({key(model): model for model in models.values()})
    curves: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for (kind, width), model in models.items():
        curves[kind][width] = times[key(model)]
    return curves
