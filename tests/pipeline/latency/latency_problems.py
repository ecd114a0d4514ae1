"""Small made-up tables with a known best answer, for the solver tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pipeline.latency.solvers.base import added_loss
from pipeline.nouns import (
    Block,
    ChannelGroup,
    Dim,
    LatencyTable,
    Ranking,
    Sensitivity,
    Site,
    SiteCost,
    Solution,
    Topology,
)


def group(name: str, size: int, block: str | None = None, frozen: str | None = None) -> ChannelGroup:
    return ChannelGroup(name, name, tuple(range(size)), (f"{name}.weight[0]",), frozen, block)


def block(name: str) -> Block:
    return Block(name, f"{name}.add", 0, (), ())


def topology(groups: Sequence[ChannelGroup], blocks: Sequence[Block] = ()) -> Topology:
    return Topology(tuple(groups), tuple(blocks), {}, ())


def values(dim: Dim, choices: dict[str, tuple[int, ...]], grid: int) -> list[int]:
    """On-grid sums of a dim: multiples of the grid, its full size, or a single small group."""
    sums = {
        dim.constant + sum(c * w for (_, c), w in zip(dim.terms, widths, strict=True))
        for widths in itertools.product(*(choices[g] for g, _ in dim.terms))
    }
    full = dim.constant + sum(c * max(choices[g]) for g, c in dim.terms)
    return sorted(v for v in sums if v > 0 and (v % grid == 0 or v == full or len(dim.terms) == 1))


def site(
    rng: np.random.Generator,
    name: str,
    dims: Sequence[Dim],
    choices: dict[str, tuple[int, ...]],
    grid: int,
    block: str | None = None,
    inner: int | None = None,
) -> SiteCost:
    """A site whose times grow with the product of its widths, with noise that makes them non-monotone."""
    ms, gone = {}, {}
    for key in itertools.product(*(values(dim, choices, grid) for dim in dims)):
        ms[key] = float((0.2 + np.prod(np.array(key) / 16.0)) * rng.uniform(0.7, 1.3))
        if block is not None and inner is not None:
            outer = tuple(v for i, v in enumerate(key) if i != inner)
            gone[key] = 0.05 * sum(outer) / 16.0
    return SiteCost(Site(name, "test", tuple(dims), (name,), block), ms, gone)


def table(sites: Sequence[SiteCost], choices: dict[str, tuple[int, ...]], grid: int = 16) -> LatencyTable:
    bare = LatencyTable(tuple(sites), choices, grid, 0.0, fixed_ms=0.1)
    dense = bare.predict({name: max(widths) for name, widths in choices.items()}).ms
    return LatencyTable(tuple(sites), choices, grid, dense, fixed_ms=0.1)


def random_problem(seed: int) -> tuple[LatencyTable, Topology, Sensitivity]:
    """A stem, a stream with two removable blocks, a wider stage whose stream is a sum, a concatenation."""
    rng = np.random.default_rng(seed)
    sizes = {"stem": 32, "mid1": 48, "mid2": 32, "wide": 32, "mid3": 48, "cat": 16}
    choices = {name: tuple(range(16, size + 1, 16)) for name, size in sizes.items()}
    choices["stem"] = (8, 16, 24, 32)
    choices["wide"] = (0, 8, 16, 32)
    homes = {"mid1": "b1", "mid3": "b3"}
    groups = [group(name, size, homes.get(name)) for name, size in sizes.items()]
    stem, padded = Dim((("stem", 1),)), Dim((("stem", 1), ("wide", 1)))
    joined = Dim((("stem", 1), ("wide", 1), ("cat", 1)))
    mids = {name: Dim(((name, 1),)) for name in ("mid1", "mid2", "mid3", "cat")}
    sites = [
        site(rng, "first", [Dim((), 3), stem], choices, 16),
        site(rng, "b1", [stem, mids["mid1"]], choices, 16, "b1", 1 if seed % 2 else None),
        site(rng, "b2", [stem, mids["mid2"], padded], choices, 16),
        site(rng, "b3", [padded, mids["mid3"]], choices, 16, "b3", 1),
        site(rng, "branch", [padded, mids["cat"]], choices, 16),
        site(rng, "last", [joined, Dim((), 10)], choices, 16),
    ]
    curves = {
        name: {w: float((1 - w / sizes[name]) ** 2 * rng.uniform(0.1, 2.0)) for w in widths}
        for name, widths in choices.items()
    }
    losses = {name: float(rng.uniform(0.2, 2.0)) for name in ("b1", "b3")}
    return table(sites, choices), topology(groups, [block("b1"), block("b3")]), Sensitivity(curves, losses)


def rankings(net: Topology, sensitivity: Sensitivity, seed: int = 0) -> list[Ranking]:
    """Scores a unit that add up to about the group's values, with noise, ascending; the units in any order."""
    rng, found = np.random.default_rng(seed), []
    for member in net.offered:
        if member.id in sensitivity.groups:
            curve = np.array([sensitivity.loss(member.id, width) for width in range(member.size, -1, -1)])
            scores = np.sort(np.maximum(np.diff(curve), 0.0) * rng.lognormal(0.0, 0.3, member.size))
            order = tuple(int(unit) for unit in rng.permutation(member.size))
            found.append(Ranking(member.id, order, tuple(float(score) for score in scores)))
    return found


class Device:
    """A trial that answers from a truth that the values and the table do not know, and counts what it is asked.

    The true loss of each cut is its value times a factor of its own, and cuts together cost more than their sum; a
    short recovery takes away 40 %. The true latency is the table's times `off`, and another factor for every choice,
    which is within `wobble` of 1.
    """

    def __init__(
        self,
        costs: LatencyTable,
        net: Topology,
        sensitivity: Sensitivity,
        seed: int = 0,
        off: float = 1.0,
        wobble: float = 0.02,
    ) -> None:
        rng = np.random.default_rng(seed)
        factors = {name: float(rng.lognormal(0.0, 0.7)) for name in (*sensitivity.groups, *sensitivity.blocks)}
        self.true = Sensitivity(
            {name: {w: v * factors[name] for w, v in curve.items()} for name, curve in sensitivity.groups.items()},
            {name: value * factors[name] for name, value in sensitivity.blocks.items()},
        )
        self.costs, self.net, self.off, self.wobble = costs, net, off, wobble
        self.losses: dict[str, float] = {}
        self.recoveries: dict[str, float] = {}
        self.measured: dict[str, float] = {}

    def loss(self, choice: Solution) -> float:
        total = added_loss(self.true, self.net, choice.widths, choice.dropped)
        return self.losses.setdefault(self._key(choice), total + 0.2 * total**2)

    def recovered(self, choice: Solution) -> float:
        total = added_loss(self.true, self.net, choice.widths, choice.dropped)
        return self.recoveries.setdefault(self._key(choice), 0.6 * (total + 0.2 * total**2))

    def measure(self, choices: Sequence[Solution]) -> list[float]:
        found = []
        for choice in choices:
            key = self._key(choice)
            factor = self.off * float(1.0 + self.wobble * np.sin(sum(map(ord, key))))
            ms = self.costs.predict(choice.widths, choice.dropped).ms * factor
            found.append(self.measured.setdefault(key, ms))
        return found

    @staticmethod
    def _key(choice: Solution) -> str:
        return f"{sorted(choice.widths.items())} {sorted(choice.dropped)}"


def brute_force(
    problem: tuple[LatencyTable, Topology, Sensitivity], budget_ms: float, blocks: bool = True
) -> Solution | None:
    """The least loss that fits, then the least latency, by trying everything."""
    costs, net, sensitivity = problem
    best: Solution | None = None
    names = [g.id for g in net.groups]
    removable = [b.id for b in net.removable] if blocks else []
    for chosen in itertools.product((False, True), repeat=len(removable)):
        dropped = frozenset(b for b, gone in zip(removable, chosen, strict=True) if gone)
        options = [(g.size,) if g.block in dropped else costs.choices[g.id] for g in net.groups]
        for combination in itertools.product(*options):
            widths = dict(zip(names, combination, strict=True))
            try:
                ms = costs.predict(widths, dropped).ms
            except KeyError:
                continue
            if ms <= budget_ms:
                loss = added_loss(sensitivity, net, widths, dropped)
                if best is None or (loss, ms) < (best.loss, best.predicted_ms):
                    best = Solution(widths, dropped, ms, loss)
    return best
