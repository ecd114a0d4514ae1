"""Build the latency table of a network on a target: a few corners of every site measured, the rest fitted.

    row of a site  =  (t(many copies) - t(few copies)) / (many - few)          a slope, free of what surrounds it
    table          =  empty graph + sum of factor x row                        factors: `pipeline.latency.calibrate`

All times are ratios to one reference model (`pipeline.latency.timing`); the scale in milliseconds is the reference's
own time on the device. Sites whose small models are equal share their measurements, and rows measured before come from
the store, so that the same rows give the same table.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.latency import fit
from pipeline.latency.calibrate import Narrowed, Sample, Scale, adjust, draw, how_many
from pipeline.latency.choices import Choices, Rule, find_choices
from pipeline.latency.grid import Grid, find_grid
from pipeline.latency.reference import empty
from pipeline.latency.store import Store
from pipeline.latency.timing import ROUNDS, SESSIONS, Clock, Progress, Tally, key
from pipeline.nouns import Dim, LatencyTable, RowBuilder, Site, SiteCost, Topology
from profiles.errors import DeployError
from profiles.schema import Precision, PruneSpec
from targets.base import Target

DENSE_COPIES = 6
"""Times that the dense network stands among the rows: a single one can be off by several per cent."""

FLOOR = 0.003
"""Least spread that a table claims."""

log = logging.getLogger(__name__)
Key = tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """What is measured of a site. axes: values of each dim; few, many: models of the two numbers of copies, by key."""

    site: Site
    dropped: bool
    axes: tuple[tuple[int, ...], ...]
    few: dict[Key, bytes]
    many: dict[Key, bytes]
    span: int

    def clamp(self, widths: Key) -> Key:
        """The same widths, with those that do not matter here at their only value."""
        return tuple(axis[0] if len(axis) == 1 else w for w, axis in zip(widths, self.axes, strict=True))


def tabulate(
    target: Target,
    builder: RowBuilder,
    topology: Topology,
    dense_onnx: Path,
    spec: PruneSpec,
    store: Store,
    progress: Progress | None = None,
    tally: Tally | None = None,
    narrowed: Narrowed | None = None,
    precision: Precision = "fp32",
) -> LatencyTable:
    """Measure what the store lacks and fit the rest. dense_onnx: the dense network as it runs, after the graph passes.

    tally: counts the rows reused and measured, if given. narrowed: makes whole candidates; without it the table is
    scaled to the dense network alone. precision: of dense_onnx and the rows, in which the grid is found too.
    Raises DeployError for what the target cannot run.
    """
    clock = Clock(target, store, progress)
    clock.tally = tally or clock.tally
    grid = find_grid(clock, precision) if spec.grid is None else Grid(spec.grid, {})
    choices = _choices(builder, topology, grid, spec)
    parts = [part for site in builder.sites for part in _wanted(builder, topology, site, choices, grid.step)]
    nets = _networks(builder, topology, choices, dense_onnx.read_bytes(), narrowed, spec.seed)
    models = {key(empty()): empty()} | {name: net.model for name, net in nets.items()}
    for part in parts:
        models.update({key(model): model for model in (*part.few.values(), *part.many.values())})
    ratios = clock.ratios(models)
    fitted = [_fit(builder, part, grid.step, ratios) for part in parts]
    fixed = ratios[key(empty())]
    times = [ratios[name] for name in nets]
    scale = _scale(parts, fitted, list(nets.values()), times, fixed)
    costs = _costs(parts, fitted, scale.factors * clock.reference_ms())
    return LatencyTable(
        sites=costs,
        choices=choices.widths,
        grid=grid.step,
        dense_ms=float(np.median(times[:DENSE_COPIES])) * clock.reference_ms(),
        fixed_ms=fixed * clock.reference_ms(),
        spread=max(FLOOR, scale.error or _spread(parts, fitted)),
    )


@dataclass(frozen=True)
class Network:
    """A whole network that is measured among the rows."""

    sample: Sample
    model: bytes


def _networks(
    builder: RowBuilder,
    topology: Topology,
    choices: Choices,
    dense: bytes,
    narrowed: Narrowed | None,
    seed: int,
) -> dict[str, Network]:
    """The dense network, several sessions of it, then random narrowed ones; by the key of their times."""
    sizes = {group.id: group.size for group in topology.groups}
    whole = Sample(sizes, frozenset())
    nets = {_copy(dense, index): Network(whole, dense) for index in range(DENSE_COPIES)}
    if narrowed is not None:
        work = [builder.terms(site, tuple(dim.size(sizes) for dim in site.dims)) for site in builder.sites]
        macs = sum(value for terms in work for name, value in terms.items() if name != "elements")
        for sample in draw(topology, builder.sites, choices, how_many(macs, SESSIONS * ROUNDS), seed):
            model = narrowed(sample.widths, sample.dropped)
            nets.setdefault(key(model), Network(sample, model))
    return nets


def _copy(model: bytes, index: int) -> str:
    """Key of one more session of the same model."""
    return hashlib.sha256(hashlib.sha256(model).digest() + bytes([index])).hexdigest()


# --- what to measure -----------------------------------------------------------------------------------------------


def _choices(builder: RowBuilder, topology: Topology, grid: Grid, spec: PruneSpec) -> Choices:
    sizes = {group.id: group.size for group in topology.groups}
    narrow: dict[Dim, set[int]] = {}
    for site in builder.sites:
        kinds = {_kind(name) for name in builder.terms(site, tuple(dim.size(sizes) for dim in site.dims))}
        fast = {width for kind in kinds if kind for width in grid.below.get(kind, ()) if width >= spec.min_width}
        for dim in site.dims:
            if dim.terms:
                narrow.setdefault(dim, set()).update(fast)
    rule = Rule(grid.step, spec.min_width, {dim: tuple(sorted(widths)) for dim, widths in narrow.items()})
    return find_choices(topology, (dim for site in builder.sites for dim in site.dims), rule)


def _kind(term: str) -> str | None:
    """Which of the grid's kinds of kernel a regressor of the rows stands for."""
    if term.startswith("depthwise"):
        return "depthwise"
    if term.startswith("conv1x1"):
        return "1x1"
    return "3x3" if term.startswith("conv") else None


def _wanted(builder: RowBuilder, topology: Topology, site: Site, choices: Choices, step: int) -> list[Wanted]:
    """The corners of a site, and of what is left of it when its block is removed."""
    axes = tuple(choices.values[dim] for dim in site.dims)
    parts = [_models(builder, site, axes, step, dropped=False)]
    if site.block is not None:
        inner = {group.id for group in topology.groups if group.block == site.block}
        outer = tuple(
            axis[-1:] if dim.terms and all(group in inner for group, _ in dim.terms) else axis
            for dim, axis in zip(site.dims, axes, strict=True)
        )
        parts.append(_models(builder, site, outer, step, dropped=True))
    return parts


def _models(builder: RowBuilder, site: Site, axes: tuple[tuple[int, ...], ...], step: int, *, dropped: bool) -> Wanted:
    few, many = builder.copies(site, dropped=dropped)
    keys = fit.plan(axes, step)
    less = {key: builder.row(site, key, copies=few, dropped=dropped) for key in keys}
    more = {key: builder.row(site, key, copies=many, dropped=dropped) for key in keys}
    return Wanted(site, dropped, axes, less, more, many - few)


# --- the table -----------------------------------------------------------------------------------------------------


def _fit(builder: RowBuilder, part: Wanted, step: int, ratios: Mapping[str, float]) -> fit.Fitted:
    measured = {}
    for widths, model in part.many.items():
        measured[widths] = max(ratios[key(model)] - ratios[key(part.few[widths])], 0.0) / part.span
    return fit.fit(part.axes, step, lambda w: builder.terms(part.site, w, dropped=part.dropped), measured)


def _scale(
    parts: Sequence[Wanted], fitted: Sequence[fit.Fitted], nets: Sequence[Network], times: Sequence[float], fixed: float
) -> Scale:
    """Factors from rows to networks, shape (parts,); the sessions of the dense network come first and count as one."""
    names = [_name(part) for part in parts]
    column = {name: index for index, name in enumerate(dict.fromkeys(names))}
    rows = np.zeros((1 + len(nets) - DENSE_COPIES, len(column)))
    for row, net in zip(rows, (nets[0], *nets[DENSE_COPIES:]), strict=True):
        for part, name, found in zip(parts, names, fitted, strict=True):
            if part.dropped == (part.site.block in net.sample.dropped):
                widths = part.clamp(tuple(dim.size(net.sample.widths) for dim in part.site.dims))
                row[column[name]] += found.times[widths]
    if rows[0].sum() <= 0:
        raise DeployError("every site of the network was measured as taking no time.", "deploy doctor --target T")
    dense = float(np.median(times[:DENSE_COPIES]))
    scale = adjust(rows, [dense, *times[DENSE_COPIES:]], fixed)
    low, high = float(scale.factors.min()), float(scale.factors.max())
    log.info("rows x %.3f to %.3f are %.3f of the dense network", low, high, rows[0] @ scale.factors / (dense - fixed))
    return Scale(scale.factors[[column[name] for name in names]], scale.error)


def _name(part: Wanted) -> tuple[str, ...]:
    """Equal for sites of equal models, which err together."""
    return tuple(sorted(key(model) for model in part.many.values()))


def _costs(parts: Sequence[Wanted], fitted: Sequence[fit.Fitted], ms: NDArray[np.float64]) -> tuple[SiteCost, ...]:
    """Every site in milliseconds; ms: of one unit of each part's rows, shape (parts,)."""
    costs: list[SiteCost] = []
    for part, found, unit in zip(parts, fitted, ms.tolist(), strict=True):
        times = {widths: time * unit for widths, time in found.times.items()}
        if part.dropped:
            last = costs.pop()
            costs.append(SiteCost(last.site, last.ms, _over_all(part, times, last.ms), last.measured))
        else:
            costs.append(SiteCost(part.site, times, {}, frozenset(part.many)))
    return tuple(costs)


def _over_all(part: Wanted, times: Mapping[Key, float], keys: Mapping[Key, float]) -> dict[Key, float]:
    """Times of the outer widths at all combinations, whatever the inner ones are. Empty where nothing is left."""
    return {widths: times[part.clamp(widths)] for widths in keys} if any(times.values()) else {}


def _spread(parts: Sequence[Wanted], fitted: Sequence[fit.Fitted]) -> float:
    """Relative standard error from the fits: sites of equal models err together, others on their own."""
    errors: dict[tuple[str, ...], float] = {}
    total = 0.0
    for part, found in zip(parts, fitted, strict=True):
        if not part.dropped:
            name = _name(part)
            time = found.times[tuple(axis[-1] for axis in part.axes)]
            errors[name] = errors.get(name, 0.0) + found.misfit * time
            total += time
    return float(np.sqrt(sum(error**2 for error in errors.values()))) / max(total, 1e-12)
