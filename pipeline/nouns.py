"""The shared nouns of the pipeline: what its subfolders hand to each other. Frozen, free of torch and onnx.

A *unit* is the smallest set of channels that have to go together: one number per unit, the same number on every
axis position that belongs to it. -1 marks a position that is never cut. Units with the same members form a
`ChannelGroup`. *Width* is units kept; *ratio* is units removed / total. Times are milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from profiles.schema import CheckSpec
from targets.harness.compare import Verdict

BUILT = "built, not measured"
"""The verdict on a network that was built for a device on which nothing could be measured: never `met`."""
Units = NDArray[np.int32]
"""Unit id of every position along one axis, or -1. Shape (length of the axis,)."""


# --- the network, seen without torch -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelGroup:
    """Interchangeable units: every unit of a group touches the same axes of the same tensors.

    id: hash of the sorted members, stable between runs. name: the first layer that produces the channels.
    units: unit ids in channel order; a `PruningPlan` indexes into this. members: `parameter[axis]` slots, for people.
    frozen: why it is not offered for pruning, or None. block: the removable block that it lives and dies with.
    """

    id: str
    name: str
    units: tuple[int, ...]
    members: tuple[str, ...]
    frozen: str | None = None
    block: str | None = None

    @property
    def size(self) -> int:
        """Units in the dense network."""
        return len(self.units)


@dataclass(frozen=True)
class Block:
    """A residual branch that can be removed whole: what is added to the skip goes, the skip stays.

    add: name of the adding module in the captured graph, which is also the scope of its ONNX node.
    skip: which operand of the addition (0 or 1) stays. nodes: captured graph nodes of the branch.
    params: parameters and buffers that leave with it.
    """

    id: str
    add: str
    skip: int
    nodes: tuple[str, ...]
    params: tuple[str, ...]
    frozen: str | None = None


@dataclass(frozen=True)
class Constant:
    """A number in the graph that counts or indexes channels, so that it has to be rewritten when channels go.

    node: module name in the captured graph, which is the scope of its ONNX node (`/node/Op`). `units` by kind:

    pad      (units added before, units added after) along `axis`; value: the two counts that stay
    split    one entry a piece along `axis`; value: the size of each piece
    reshape  one entry a target axis, None where the size never changes (`sizes` holds it, -1 = the batch);
             value: the target shape
    gather   (units of the input axis,), `indices` = positions in the dense input; value: positions in the cut input
    slice    (units before, inside, after) along `axis`; value: start and stop
    """

    node: str
    kind: Literal["pad", "split", "reshape", "gather", "slice"]
    axis: int
    units: tuple[Units | None, ...]
    sizes: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies. weight: name of its weight. shape: of the weight, dense.

    positions: where the weight is applied, per sample. axis: of the weight, on which its outputs lie. written: elements
    that it writes per sample for each entry of that axis.
    """

    weight: str
    shape: tuple[int, ...]
    positions: int
    axis: int
    written: int


@dataclass(frozen=True)
class Topology:
    """All that pruning, narrowing and the latency table need to know of a network.

    params: parameter or buffer name -> axis -> units, for every axis that can be cut.
    leaves: captured modules whose channels stay, with the reason. layers: convolutions and linear layers, in order.
    made: (parameter, axis) on which a layer or a product makes its channels; depthwise layers only pass theirs.
    count: of all units, with those that are in no group (of a constant alone); their ids run from 0 to count - 1.
    """

    groups: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    params: Mapping[str, Mapping[int, Units]]
    constants: tuple[Constant, ...]
    leaves: tuple[tuple[str, str], ...] = ()
    layers: tuple[Layer, ...] = ()
    count: int = 0
    made: frozenset[tuple[str, int]] = frozenset()

    @property
    def offered(self) -> tuple[ChannelGroup, ...]:
        """Groups that may be pruned."""
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def removable(self) -> tuple[Block, ...]:
        """Blocks that may be removed."""
        return tuple(block for block in self.blocks if block.frozen is None)

    def group(self, id: str) -> ChannelGroup:
        """The group with this id. Raises KeyError."""
        return {group.id: group for group in self.groups}[id]

    def block(self, id: str) -> Block:
        """The block with this id. Raises KeyError."""
        return {block.id: block for block in self.blocks}[id]


# --- what is decided ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepUnits:
    """Keep these units of a group; kept: ascending indices into `ChannelGroup.units` of the dense network."""

    group: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class DropBlock:
    """Remove a residual branch."""

    block: str


@dataclass(frozen=True)
class Widen:
    """Give a group of the network as it is so far this many units, at least those that it has."""

    group: str
    width: int


@dataclass(frozen=True)
class AddBranch:
    """Join an Inception branch of so many channels at a place of the graph."""

    where: str
    channels: int


Growth = Widen | AddBranch
Edit = KeepUnits | DropBlock | Growth


@dataclass(frozen=True)
class PruningPlan:
    """A versioned, ordered list of edits of the dense network. Plans are equal when they make the same network.

    What a network grew by stands before the cuts, which speak of the grown network.
    """

    edits: tuple[Edit, ...] = ()

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Group id -> kept indices, for the groups that are cut."""
        return {edit.group: edit.kept for edit in self.edits if isinstance(edit, KeepUnits)}

    @property
    def dropped(self) -> frozenset[str]:
        """Ids of removed blocks."""
        return frozenset(edit.block for edit in self.edits if isinstance(edit, DropBlock))

    @property
    def growth(self) -> tuple[Growth, ...]:
        """What the network grew by before it was cut, in order."""
        return tuple(edit for edit in self.edits if isinstance(edit, Widen | AddBranch))

    def widths(self, groups: Iterable[ChannelGroup]) -> dict[str, int]:
        """Group id -> units kept, for every group given (a group that is not cut keeps all)."""
        kept = self.kept
        return {group.id: len(kept[group.id]) if group.id in kept else group.size for group in groups}

    def to_json(self) -> str:
        """Canonical text form, the same for equal plans."""
        edits: list[dict[str, Any]] = []
        for edit in self.edits:
            if isinstance(edit, KeepUnits):
                edits.append({"edit": "keep_units", "group": edit.group, "kept": list(edit.kept)})
            elif isinstance(edit, Widen):
                edits.append({"edit": "widen", "group": edit.group, "width": edit.width})
            elif isinstance(edit, AddBranch):
                edits.append({"edit": "add_branch", "where": edit.where, "channels": edit.channels})
            else:
                edits.append({"edit": "drop_block", "block": edit.block})
        return json.dumps({"version": 1, "edits": edits}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Inverse of `to_json`. Raises ValueError for what is not a plan of version 1."""
        table = json.loads(text)
        if not isinstance(table, dict) or table.get("version") != 1 or not isinstance(table.get("edits"), list):
            raise ValueError("not a pruning plan of version 1")
        edits: list[Edit] = []
        for edit in table["edits"]:
            if edit.get("edit") == "keep_units":
                kept = tuple(int(i) for i in edit["kept"])
                if list(kept) != sorted(set(kept)) or (kept and kept[0] < 0):
                    raise ValueError(f"kept units of group {edit['group']} are not ascending indices")
                edits.append(KeepUnits(str(edit["group"]), kept))
            elif edit.get("edit") == "drop_block":
                edits.append(DropBlock(str(edit["block"])))
            elif edit.get("edit") == "widen":
                edits.append(Widen(str(edit["group"]), int(edit["width"])))
            elif edit.get("edit") == "add_branch":
                edits.append(AddBranch(str(edit["where"]), int(edit["channels"])))
            else:
                raise ValueError(f"unknown edit {edit.get('edit')!r}")
        return cls(tuple(edits))


ConstantValue = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A plan resolved against a topology: what to slice and what to rewrite, by name. For torch surgery and ONNX alike.

    params: name -> axis -> kept positions (ascending). constants: node -> (kind, axis, new value).
    dropped: the removed blocks. A convolution's `groups` follows from its weight: a depthwise one (weight axis 1 of
    size 1) keeps its outputs-per-group, every other one keeps its number of groups.
    """

    params: Mapping[str, Mapping[int, NDArray[np.int64]]]
    constants: Mapping[str, tuple[str, int, ConstantValue]]
    dropped: tuple[Block, ...] = ()


# --- how units are ranked, and what a cut costs in accuracy --------------------------------------------------------


Merged = Literal["absorb", "mean"]


@dataclass(frozen=True)
class Ranking:
    """The order in which the units of one group should go.

    removal_order: indices into the group's units, first to go first. marginal_loss: the criterion's own estimate of
    what each removal in that order adds, non-negative, same length; scores of one criterion compare across groups.
    twin: for each removal the unit that can stand in for it (it may go later itself), -1 for none. merged: what becomes
    of the pair, "absorb": the twin stays as it is and takes over what the next layers read, "mean": both become their
    mean. weight: what a loss in this group counts, against other groups, for solvers that compare scores.
    """

    group: str
    removal_order: tuple[int, ...]
    marginal_loss: tuple[float, ...]
    twin: tuple[int, ...] | None = None
    merged: Merged = "absorb"
    weight: float = 1.0

    def keep(self, width: int) -> tuple[int, ...]:
        """Ascending indices of the units that stay when `width` of them stay."""
        return tuple(sorted(self.removal_order[len(self.removal_order) - width :]))

    def stand_ins(self, kept: Iterable[int]) -> dict[int, int]:
        """Each unit that is not kept -> the kept one that stands in for it, where the chain of twins leads to one."""
        stays, found = frozenset(kept), {}
        twins = dict(zip(self.removal_order, self.twin or (), strict=False))
        for unit in self.removal_order:
            at, seen = unit, {-1}
            while at not in stays and at not in seen:
                seen.add(at)
                at = twins.get(at, -1)
            if at in stays and at != unit:
                found[unit] = at
        return found

    def to_table(self) -> list[Any]:
        """Plain data from which `from_table` makes an equal one."""
        return [self.group, self.removal_order, self.marginal_loss, self.twin, self.merged, self.weight]

    @classmethod
    def from_table(cls, table: Sequence[Any]) -> Ranking:
        """Inverse of `to_table`."""
        group, order, loss, twin, merged, weight = table
        return cls(group, tuple(order), tuple(loss), None if twin is None else tuple(twin), merged, weight)


@dataclass(frozen=True)
class Sensitivity:
    """Calibration loss added by single cuts after local repair, measured.

    groups: group id -> {width: added loss}; the full width (loss 0) is in it. blocks: block id -> added loss of
    removing the whole branch. Widths between the measured ones are interpolated by the solver's caller. A loss is
    infinite where the network overflows after the cut.
    """

    groups: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]

    def loss(self, group: str, width: int) -> float:
        """Added loss of a group at a width, linear between measured widths, flat outside them.

        Infinite between an infinite loss and a finite one.
        """
        curve = sorted(self.groups[group].items())
        return float(np.interp(width, [w for w, _ in curve], [v for _, v in curve]))

    def finite(self, choices: Mapping[str, Iterable[int]]) -> Sensitivity:
        """The same with every infinite loss worth more than all finite ones together, at these widths of groups too."""
        widths = {id: {*curve, *choices.get(id, ())} for id, curve in self.groups.items()}
        curves = {id: {width: self.loss(id, width) for width in known} for id, known in widths.items()}
        known = [v for curve in curves.values() for v in curve.values()] + list(self.blocks.values())
        worst = 10 * (1.0 + sum(abs(v) for v in known if math.isfinite(v)))

        def least(value: float) -> float:
            return value if math.isfinite(value) else worst

        groups = {id: {width: least(v) for width, v in curve.items()} for id, curve in curves.items()}
        return Sensitivity(groups, {id: least(v) for id, v in self.blocks.items()})

    def to_table(self) -> dict[str, Any]:
        """Plain data from which `from_table` makes an equal one; JSON has no infinity, so that such a loss is None."""

        def writable(loss: float) -> float | None:
            return loss if math.isfinite(loss) else None

        groups = {id: [(w, writable(loss)) for w, loss in sorted(curve.items())] for id, curve in self.groups.items()}
        return {"groups": groups, "blocks": {id: writable(loss) for id, loss in self.blocks.items()}}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Sensitivity:
        """Inverse of `to_table`."""

        def read(loss: float | None) -> float:
            return math.inf if loss is None else float(loss)

        groups = {id: {int(width): read(loss) for width, loss in curve} for id, curve in table["groups"].items()}
        return cls(groups, {id: read(loss) for id, loss in table["blocks"].items()})


# --- latency -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dim:
    """A channel count that a site sees: constant + sum of coefficient x width over groups."""

    terms: tuple[tuple[str, int], ...]
    constant: int = 0

    def size(self, widths: Mapping[str, int]) -> int:
        """Channels for the given group widths."""
        return self.constant + sum(coefficient * widths[group] for group, coefficient in self.terms)


@dataclass(frozen=True)
class Site:
    """A piece of the network that is one row of the table: a residual block, or one layer with what follows it.

    dims: its distinct channel counts, inputs first. block: the removable block whose branch it holds.
    nodes: names of its ONNX nodes. chainable: copies can be strung together and a slope measured
    (`RowBuilder.copies` says how many, also when dropped).
    """

    id: str
    kind: str
    dims: tuple[Dim, ...]
    nodes: tuple[str, ...]
    block: str | None = None
    chainable: bool = False


class RowBuilder(Protocol):
    """What the table needs of the graph: its sites, and for any widths a small ONNX model of one of them."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the dense graph, in execution order; together they hold each node once."""
        ...

    def copies(self, site: Site, *, dropped: bool = False) -> tuple[int, int]:
        """Two numbers of copies (few, many) that measure the site: ms = (t(many) - t(few)) / (many - few).

        (1, 3) or (2, 6) where copies can be strung together; else (0, 1): the site and what surrounds it, minus that.
        """
        ...

    def row(self, site: Site, widths: tuple[int, ...], *, copies: int = 1, dropped: bool = False) -> bytes:
        """A runnable ONNX model with `copies` of the site at these channel counts (one a dim); 0: what surrounds them.

        dropped: with the removable block's branch gone. Equal bytes for equal rows, so that t(many) = t(few) = nothing
        to measure where the models are the same.
        """
        ...

    def terms(self, site: Site, widths: tuple[int, ...], *, dropped: bool = False) -> dict[str, float]:
        """Work of the site by kind (MACs per kernel kind, elements written), the regressors of the fit."""
        ...


@dataclass(frozen=True)
class SiteCost:
    """Milliseconds of a site at every combination of its dims that the grid allows.

    ms: widths (one a dim) -> time. dropped_ms: the same with the block's branch removed (empty where it has none).
    measured: the combinations that were measured rather than fitted.
    """

    site: Site
    ms: Mapping[tuple[int, ...], float]
    dropped_ms: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    measured: frozenset[tuple[int, ...]] = frozenset()


@dataclass(frozen=True)
class Prediction:
    """A predicted latency and the standard error of the table that made it, both in milliseconds."""

    ms: float
    spread_ms: float


@dataclass(frozen=True)
class LatencyTable:
    """What each width costs on one device: the sum of its sites, times a correction that feedback rounds set.

    dense_ms: the dense network as it was measured beside the rows, the unit of predicted ratios. The sum over sites at
    full widths plus `fixed_ms` can be less where the dense network alone outgrows a cache.
    choices: group id -> widths that the device's grid allows, ascending, full size last. grid: the step found.
    """

    sites: tuple[SiteCost, ...]
    choices: Mapping[str, tuple[int, ...]]
    grid: int
    dense_ms: float
    fixed_ms: float = 0.0
    correction: float = 1.0
    spread: float = 0.0

    def predict(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> Prediction:
        """Latency at these group widths with these blocks removed. Raises KeyError for widths off the grid."""
        gone = frozenset(dropped)
        total = self.fixed_ms
        for cost in self.sites:
            key = tuple(dim.size(widths) for dim in cost.site.dims)
            off = cost.site.block is not None and cost.site.block in gone
            total += cost.dropped_ms.get(key, 0.0) if off else cost.ms[key]
        ms = total * self.correction
        return Prediction(ms, ms * self.spread)

    def to_table(self) -> dict[str, Any]:
        """Plain data from which `from_table` makes an equal table."""

        def costs(ms: Mapping[tuple[int, ...], float]) -> list[list[Any]]:
            return [[list(key), value] for key, value in sorted(ms.items())]

        sites = [
            {
                "id": c.site.id, "kind": c.site.kind, "block": c.site.block, "chainable": c.site.chainable,
                "nodes": list(c.site.nodes),
                "dims": [[[list(term) for term in dim.terms], dim.constant] for dim in c.site.dims],
                "ms": costs(c.ms), "dropped_ms": costs(c.dropped_ms),
                "measured": sorted(list(key) for key in c.measured),
            }
            for c in self.sites
        ]  # fmt: skip
        own = {
            "grid": self.grid,
            "dense_ms": self.dense_ms,
            "fixed_ms": self.fixed_ms,
            "correction": self.correction,
            "spread": self.spread,
        }
        return {"sites": sites, "choices": {id: list(widths) for id, widths in self.choices.items()}, **own}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> LatencyTable:
        """Inverse of `to_table`."""

        def costs(rows: list[list[Any]]) -> dict[tuple[int, ...], float]:
            return {tuple(key): float(value) for key, value in rows}

        sites = []
        for row in table["sites"]:
            dims = tuple(
                Dim(tuple((str(g), int(c)) for g, c in terms), int(constant)) for terms, constant in row["dims"]
            )
            site = Site(row["id"], row["kind"], dims, tuple(row["nodes"]), row["block"], row["chainable"])
            measured = frozenset(tuple(key) for key in row["measured"])
            sites.append(SiteCost(site, costs(row["ms"]), costs(row["dropped_ms"]), measured))
        choices = {id: tuple(widths) for id, widths in table["choices"].items()}
        numbers = {name: table[name] for name in ("grid", "dense_ms", "fixed_ms", "correction", "spread")}
        return cls(tuple(sites), choices, **numbers)


@dataclass(frozen=True)
class Solution:
    """What a solver returns: widths and removed blocks, what it predicts, and how far from proven optimal it is.

    gap: relative optimality gap of an exact solver, None where it has none.
    """

    widths: Mapping[str, int]
    dropped: frozenset[str]
    predicted_ms: float
    loss: float
    gap: float | None = None
    seconds: float = 0.0


class Trial(Protocol):
    """What a solver that searches by trying may ask of a choice. Every answer is kept: asking again costs nothing."""

    def loss(self, choice: Solution) -> float:
        """Calibration loss after local repair. May be infinite."""
        ...

    def recovered(self, choice: Solution) -> float:
        """Calibration loss after repair and a short recovery; after repair alone where there is nothing to train on."""
        ...

    def measure(self, choices: Sequence[Solution]) -> list[float]:
        """Latency in ms on the target, in the table's unit (its dense_ms is the dense network's)."""
        ...


# --- the nightly check ---------------------------------------------------------------------------------------------


Ports = tuple[tuple[str, tuple[int | str, ...]], ...]
"""Inputs or outputs of a network in order: name and shape, batch axis first; a size that varies is its name or "?"."""


@dataclass(frozen=True)
class Pin:
    """An artifact that a check compares, by content. name: for people; source: the run, bundle or file it came from.

    budget: what it was built for, as in a profile ("0.5x", "8ms@p99"), or None. accepted: UTC, ISO 8601, when it was
    made the baseline, or None. fingerprint: plain table of the device it was accepted on, empty for a candidate.
    inputs, outputs: what the network takes and gives, empty where not known; project: folder of the project that it was
    built from, "" where not known; profile: the TOML file it was accepted with, "" for a profile that ships.
    """

    name: str
    sha256: str
    source: str
    budget: str | None = None
    accepted: str | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    inputs: Ports = ()
    outputs: Ports = ()
    project: str = ""
    profile: str = ""


@dataclass(frozen=True)
class LayerMove:
    """A layer's time in the baseline and in the candidate; 0 where it is not part of one. ms: per inference."""

    name: str
    op: str
    baseline_ms: float
    candidate_ms: float


@dataclass(frozen=True)
class Ledger:
    """What equal networks were said of: every control arm judged as if it were a candidate.

    alarms: how many would have been called warn, fail or improved; widened: factor by which the tolerances were widened
    for it, 1 for none.
    """

    controls: int
    alarms: int
    widened: float

    @property
    def rate(self) -> float:
        """Share of false alarms; 0 before the first control."""
        return self.alarms / self.controls if self.controls else 0.0


@dataclass(frozen=True)
class Change:
    """A change point of a nightly series. at: UTC of the first night after it; before, after: means in ms."""

    at: str
    series: str
    before_ms: float
    after_ms: float
    p_value: float


@dataclass(frozen=True)
class DeviceChange:
    """A check before which a device came to tell something else of itself than in the one before: a new level.

    number, at, profile: of the check, at in UTC; fields: name -> (then, now); before_ms, after_ms: medians of the
    baseline's p50 over the nights of the level on each side, before_ms None where the same baseline was not measured in
    the same way before; nights: how many these are.
    """

    number: int
    at: str
    profile: str
    fields: Mapping[str, tuple[Any, Any]]
    before_ms: float | None
    after_ms: float
    nights: tuple[int, int]


@dataclass(frozen=True)
class CheckRecord:
    """One finished check, whole: what a report shows and the store keeps. started: UTC, ISO 8601.

    device: digest of the fingerprint; changed: field -> (when the baseline was accepted, now); absolute: arm ->
    statistic -> ms, None with too few samples; conditions: what was not in order, as sentences; spec: the tolerances
    used, after widening; changes: change points of the series up to this night, advisory. machine: digest of what makes
    the device the same one whatever software it runs; simulated: whether the numbers are a simulated device's; moved:
    what the device told of itself otherwise than in the check before, None where nothing.

    A check that broke off is a record too: inconclusive, its reason is the error, with the stages measured before it.
    """

    started: str
    profile: str
    device: str
    baseline: Pin
    candidate: Pin
    verdict: Verdict
    absolute: Mapping[str, Mapping[str, float | None]]
    changed: Mapping[str, tuple[Any, Any]]
    conditions: tuple[str, ...]
    layers: tuple[LayerMove, ...]
    ledger: Ledger
    changes: tuple[Change, ...]
    spec: CheckSpec
    protocol: str
    seconds: float
    machine: str = ""
    simulated: bool = False
    moved: DeviceChange | None = None

    @property
    def same(self) -> bool:
        """Whether both are the same artifact, which makes it a check of the environment."""
        return self.baseline.sha256 == self.candidate.sha256


# --- a picture of the network --------------------------------------------------------------------------------------


Gives = tuple[tuple[str, int], ...]
"""Channels in order: id of the group that each run of them is of ("" for none), and how many."""


@dataclass(frozen=True)
class Line:
    """A tensor that a box reads. source: id of the box that made it."""

    source: str
    gives: Gives


@dataclass(frozen=True)
class Box:
    """What a picture shows as one thing: a layer with the norms and activations after it, or where tensors meet.

    title: path of the layer, or what it does. kind, detail: of its first operator. also: what else is in it, by name.
    gives: the channels that come out of it. whole: why capture left a module whole, "" elsewhere.
    """

    id: str
    title: str
    kind: str
    detail: str
    also: tuple[str, ...]
    lines: tuple[Line, ...]
    gives: Gives
    whole: str = ""
