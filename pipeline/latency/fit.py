"""From a few measured corners of a site to its time at every combination of widths.

On the grid the time of a site is close to linear in its work,  t = a0 + sum_k a_k work_k(widths),  a >= 0, so a handful
of corners and a non-negative least-squares fit, weighted by 1/t, give the rest. Channel counts off the grid (narrow
ones, and odd dense sizes) run other kernels: each combination of them is a slice of its own, which is the fit at the
widths rounded up. What the fit is off by at the corners of a slice is interpolated between them (radial basis
functions, linear kernel), since times bend a little where a kernel or a cache changes over.
Work is polynomial in the widths, at most of degree two in each, so it is sampled on a 3^n lattice and interpolated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.optimize import nnls

Key = tuple[int, ...]
Terms = Callable[[Key], Mapping[str, float]]
MOST_CORNERS = 5
SLICE_CORNERS = 2
SMOOTHING = 0.05
"""Of the interpolation between corners, in widths scaled to 0..1: the corners carry noise of 2 per cent."""


@dataclass(frozen=True)
class Fitted:
    """Times over all combinations. misfit: root mean square of the relative residuals at the measured corners."""

    times: dict[Key, float]
    misfit: float


def slices(axes: Sequence[Sequence[int]], step: int) -> dict[Key, list[Key]]:
    """All combinations, apart by which channel counts are off the grid (0 where a count is on it or never varies)."""
    found: dict[Key, list[Key]] = {}
    for combination in itertools.product(*axes):
        name = tuple(
            value if len(axis) > 1 and value % step else 0 for value, axis in zip(combination, axes, strict=True)
        )
        found.setdefault(name, []).append(combination)
    return found


def corners(combinations: Sequence[Key], most: int) -> list[Key]:
    """The combinations to measure: all if they are few, else the ends, then those farthest from what is taken."""
    if len(combinations) <= most:
        return list(combinations)
    points = np.array(combinations, dtype=float)
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    taken = [int(np.argmin(scaled.sum(axis=1))), int(np.argmax(scaled.sum(axis=1)))]
    while len(taken) < most:
        distance = np.min([np.abs(scaled - scaled[index]).max(axis=1) for index in taken], axis=0)
        edge = np.isin(scaled, (0.0, 1.0)).sum(axis=1)
        spread = np.sum([np.abs(scaled - scaled[index]).sum(axis=1) for index in taken], axis=0)
        order = np.lexsort((np.arange(len(scaled)), -scaled.sum(axis=1), -spread, -edge, -np.round(distance, 6)))
        taken.append(int(order[0]))
    return [combinations[index] for index in sorted(set(taken))]


def plan(axes: Sequence[Sequence[int]], step: int) -> list[Key]:
    """Every combination that a site needs measured: slices with several counts off the grid get one corner."""
    wanted: list[Key] = []
    parts = slices(axes, step)
    for name, combinations in parts.items():
        odd = sum(value > 0 for value in name)
        most = MOST_CORNERS if odd == 0 else SLICE_CORNERS if odd == 1 else 1
        wanted += corners(combinations, most if any(parts) else MOST_CORNERS)
    return wanted


def fit(axes: Sequence[Sequence[int]], step: int, terms: Terms, measured: Mapping[Key, float]) -> Fitted:
    """Times of a site at all combinations of its channel counts, from the measured ones (any unit)."""
    parts = slices(axes, step)
    names = sorted(parts, key=lambda name: sum(value > 0 for value in name))
    model = Model(Work(terms, axes, step), [key for key in parts[names[0]] if key in measured], measured)
    times: dict[Key, float] = {}
    for name in names:
        known = [key for key in parts[name] if key in measured]
        open_ones = [key for key in parts[name] if key not in measured]
        times.update({key: max(measured[key], 0.0) for key in known})
        if open_ones:
            off = np.array([measured[key] for key in known]) / np.maximum(model(known), 1e-12)
            guess = model(open_ones) * _between(known, off, open_ones)
            times.update(zip(open_ones, guess.tolist(), strict=True))
    return Fitted({key: times[key] for part in parts.values() for key in part}, model.misfit)


def _between(known: Sequence[Key], off: NDArray[np.float64], wanted: Sequence[Key]) -> NDArray[np.float64]:
    """What the fit is off by at `wanted`, from what it is off by at the measured corners, shape (wanted,)."""
    points = np.array([*known, *wanted], dtype=float)
    points = (points - points.min(axis=0)) / np.maximum(np.ptp(points, axis=0), 1.0)
    if len(known) < 2:
        return np.full(len(wanted), float(off[0]))
    logs = np.log(np.maximum(off, 1e-3))
    surface = RBFInterpolator(points[: len(known)], logs, kernel="linear", degree=0, smoothing=SMOOTHING)
    return np.asarray(np.exp(surface(points[len(known) :])))


class Model:
    """The fit on the grid. misfit: root mean square of its relative residuals, for the corners that are not used up."""

    def __init__(self, work: Work, known: Sequence[Key], measured: Mapping[Key, float]) -> None:
        self.work = work
        sample = work.matrix(known)
        target = np.maximum([measured[key] for key in known], 1e-12)
        scale = np.maximum(sample.max(axis=0), 1e-12)
        weights, _ = nnls((sample / scale) / target[:, None], np.ones(len(target)))
        self.weights = weights / scale
        residual = sample @ self.weights / target - 1.0
        free = max(1, len(target) - int(np.count_nonzero(weights)))
        self.misfit = float(np.sqrt(np.sum(residual**2) / free))

    def __call__(self, keys: Sequence[Key]) -> NDArray[np.float64]:
        """Fitted times, shape (keys,)."""
        return np.asarray(self.work.matrix(keys) @ self.weights)


class Work:
    """The regressors of a site as a matrix, a constant column first; sampled where there are many combinations."""

    def __init__(self, terms: Terms, axes: Sequence[Sequence[int]], step: int) -> None:
        self.terms = terms
        self.step = step
        self.loose = [len(axis) > 1 for axis in axes]
        pairs = zip(axes, self.loose, strict=True)
        self.axes = [sorted({self._up(value, loose) for value in axis}) for axis, loose in pairs]
        self.names = sorted(terms(tuple(axis[-1] for axis in self.axes)))
        self.known: dict[Key, list[float]] = {}
        self.nodes = [_nodes(axis) for axis in self.axes]
        lattice = int(np.prod([len(nodes) for nodes in self.nodes]))
        self.sampled = int(np.prod([len(axis) for axis in self.axes])) > 2 * lattice and self._exact()

    def matrix(self, keys: Sequence[Key]) -> NDArray[np.float64]:
        """Work at the widths rounded up to the grid, shape (keys, 1 + terms)."""
        keys = [tuple(self._up(v, loose) for v, loose in zip(key, self.loose, strict=True)) for key in keys]
        if not self.sampled:
            return np.array([[1.0, *self._row(key)] for key in keys])
        return np.hstack([np.ones((len(keys), 1)), self._interpolate(np.array(keys, dtype=float))])

    def _up(self, value: int, loose: bool) -> int:
        return -(-value // self.step) * self.step if loose else value

    def _row(self, key: Key) -> list[float]:
        if key not in self.known:
            found = self.terms(key)
            self.known[key] = [float(found.get(name, 0.0)) for name in self.names]
        return self.known[key]

    def _interpolate(self, keys: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lagrange interpolation over the lattice, shape (keys, terms)."""
        bases = [_lagrange(keys[:, axis], nodes) for axis, nodes in enumerate(self.nodes)]
        total = np.zeros((len(keys), len(self.names)))
        for index in itertools.product(*(range(len(nodes)) for nodes in self.nodes)):
            row = self._row(tuple(nodes[i] for nodes, i in zip(self.nodes, index, strict=True)))
            weight = np.prod([basis[:, i] for basis, i in zip(bases, index, strict=True)], axis=0)
            total += weight[:, None] * np.array(row)[None, :]
        return total

    def _exact(self) -> bool:
        """Whether the interpolation gives the true work at combinations beside the lattice."""
        middle = tuple(axis[len(axis) // 3] for axis in self.axes)
        other = tuple(axis[-(len(axis) // 4) - 1] for axis in self.axes)
        for key in (middle, other):
            guess = self._interpolate(np.array([key], dtype=float))[0]
            if not np.allclose(guess, self._row(key), rtol=1e-6, atol=1e-3):
                return False
        return True


def _nodes(axis: Sequence[int]) -> list[int]:
    return list(axis) if len(axis) <= 3 else [axis[0], axis[len(axis) // 2], axis[-1]]


def _lagrange(values: NDArray[np.float64], nodes: Sequence[int]) -> NDArray[np.float64]:
    """Values of the Lagrange basis polynomials, shape (values, nodes)."""
    columns = []
    for node in nodes:
        column = np.ones_like(values)
        for other in nodes:
            if other != node:
                column *= (values - other) / (node - other)
        columns.append(column)
    return np.stack(columns, axis=1)
