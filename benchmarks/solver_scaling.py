"""How long the exact solver takes on made-up problems of real sizes, and how far from proven it ends.

    resnet50      16 bottlenecks, 36 groups, 47 convolutions as rows of (in, out), 10 widths each: required below 1 s
    resnet56      zero-padded streams: stage 2 and 3 are sums of groups, 27 removable blocks as rows
    densenet121   58 layers whose inputs are running concatenations of all groups before them

Costs are bilinear with a tenth of seeded noise, losses convex in the removed share with a random weight a group; the
budget is half of the dense latency. Usage: python -m benchmarks.solver_scaling [--problems a,b] [--seeds N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy

from pipeline.latency.solvers import exact, greedy, uniform
from pipeline.nouns import Block, ChannelGroup, Dim, LatencyTable, Sensitivity, Site, SiteCost, Topology
from profiles.schema import PruneSpec

Problem = tuple[LatencyTable, Topology, Sensitivity]


class Net:
    """Collects groups, blocks and sites of a made-up network."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.groups: list[ChannelGroup] = []
        self.blocks: list[Block] = []
        self.sites: list[SiteCost] = []
        self.choices: dict[str, tuple[int, ...]] = {}

    def group(self, name: str, widths: Sequence[int], block: str | None = None) -> Dim:
        """A group with these widths, as a dim of its own."""
        self.groups.append(ChannelGroup(name, name, tuple(range(max(widths))), (), None, block))
        self.choices[name] = tuple(widths)
        return Dim(((name, 1),))

    def site(self, dims: Sequence[Dim], area: float, block: str | None = None) -> None:
        """A row whose time is bilinear in its widths, with a tenth of noise."""
        axes = [self._values(dim) for dim in dims]
        scale = area * self.rng.uniform(0.8, 1.2)
        ms, gone = {}, {}
        for key in itertools.product(*axes):
            work = sum(a * b for a, b in itertools.pairwise(key)) if len(key) > 1 else key[0] * 16
            ms[key] = float((0.02 + scale * work * 1e-5) * self.rng.uniform(0.9, 1.1))
            gone[key] = 0.002
        name = f"site{len(self.sites)}"
        self.sites.append(SiteCost(Site(name, "made-up", tuple(dims), (name,), block), ms, gone if block else {}))

    def _values(self, dim: Dim) -> list[int]:
        sums = {dim.constant}
        for group, coefficient in dim.terms:
            sums = {total + coefficient * width for total in sums for width in self.choices[group]}
        return sorted(value for value in sums if value > 0)

    def problem(self) -> Problem:
        """The table, the topology and convex random losses."""
        values = drawn(self.groups, self.blocks, self.choices, self.rng)
        bare = LatencyTable(tuple(self.sites), self.choices, 16, 0.0)
        dense = bare.predict({group.id: group.size for group in self.groups}).ms
        table = LatencyTable(tuple(self.sites), self.choices, 16, dense)
        return table, Topology(tuple(self.groups), tuple(self.blocks), {}, ()), values


def drawn(
    groups: Sequence[ChannelGroup],
    blocks: Sequence[Block],
    choices: Mapping[str, Sequence[int]],
    rng: np.random.Generator,
) -> Sensitivity:
    """Losses that nobody measured: convex in the removed share with a random weight a group, one a block."""
    curves = {}
    for group in groups:
        weight = rng.lognormal(0.0, 0.8)
        steps = rng.uniform(0.5, 1.5, len(choices[group.id]))
        raw = [weight * s * (1 - w / group.size) ** 1.7 for w, s in zip(choices[group.id], steps, strict=True)]
        falling = np.maximum.accumulate(raw[::-1])[::-1]
        curves[group.id] = {w: float(v) for w, v in zip(choices[group.id], falling, strict=True)}
    return Sensitivity(curves, {block.id: float(rng.lognormal(0.5, 0.6)) for block in blocks})


def tenths(size: int) -> tuple[int, ...]:
    """Ten widths, evenly spread up to the full size."""
    return tuple(size * i // 10 for i in range(1, 11))


def resnet50(seed: int) -> Problem:
    """Stages of 3, 4, 6, 3 bottlenecks; four streams and two inner groups a block: 36 groups; 47 rows of (in, out)."""
    net = Net(seed)
    previous: Dim | None = None
    for stage, (blocks, size) in enumerate(zip((3, 4, 6, 3), (80, 160, 320, 640), strict=True)):
        stream = net.group(f"stream{stage}", tenths(4 * size))
        for index in range(blocks):
            name = f"{stage}.{index}"
            removable = index > 0
            if removable:
                net.blocks.append(Block(name, name, 0, (), ()))
            home = name if removable else None
            first = net.group(f"{name}.a", tenths(size), home)
            second = net.group(f"{name}.b", tenths(size), home)
            area = 4.0 / 2**stage
            source = stream if removable or previous is None else previous
            rows = [(source, first, 1.0), (first, second, 3.0), (second, stream, 1.0)]
            for into, out, weight in rows[: 2 if name == "3.2" else 3]:
                net.site((into, out), area * weight, home)
        previous = stream
    return net.problem()


def resnet56(seed: int) -> Problem:
    """Three stages of nine blocks, 16-32-64 channels, grid 4 so that there are choices; padded shortcuts are sums."""
    net = Net(seed)
    own: list[str] = []
    for stage, (size, added) in enumerate(((16, 16), (32, 16), (64, 32))):
        net.group(f"stream{stage}", range(4 if stage == 0 else 0, added + 1, 4))
        before = Dim(tuple((name, 1) for name in own))
        own.append(f"stream{stage}")
        stream = Dim(tuple((name, 1) for name in own))
        for index in range(9):
            name = f"{stage}.{index}"
            net.blocks.append(Block(name, name, 0, (), ()))
            inner = net.group(f"{name}.mid", range(4, size + 1, 4), name)
            dims = (before, inner, stream) if index == 0 and stage else (stream, inner)
            net.site(dims, 4.0 / 2**stage, name)
    return net.problem()


def densenet121(seed: int) -> Problem:
    """Blocks of 6, 12, 24, 16 layers: each reads the concatenation of everything before it and adds 32 channels."""
    net = Net(seed)
    for stage, layers in enumerate((6, 12, 24, 16)):
        net.group(f"{stage}.in", range(16, 64 * 2**stage + 1, 16 * 2**stage))
        joined = [f"{stage}.in"]
        for index in range(layers):
            inner = net.group(f"{stage}.{index}.mid", range(16, 129, 16))
            grown = net.group(f"{stage}.{index}.out", (0, 16, 32))
            net.site((Dim(tuple((name, 1) for name in joined)), inner), 1.0 / 2**stage)
            net.site((inner,), 2.0 / 2**stage)
            net.site((Dim((*((name, 1) for name in joined), (grown.terms[0][0], 1))),), 0.1)
            joined.append(grown.terms[0][0])
        if stage < 3:
            net.site((Dim(tuple((name, 1) for name in joined)),), 1.0)
    return net.problem()


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "resnet50": resnet50,
    "resnet56": resnet56,
    "densenet121": densenet121,
}


def main() -> None:
    """Run every problem with every seed and write benchmarks/results/solver_scaling.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "solver_scaling.json")
    asked = parser.parse_args()
    print(f"{platform.machine()} {platform.processor()} python {platform.python_version()} scipy {scipy.__version__}")
    print(f"{'problem':12s} seed groups sites  columns      s     gap    loss  greedy  uniform")
    rows = []
    for name, seed in itertools.product(asked.problems.split(","), range(asked.seeds)):
        table, net, sensitivity = PROBLEMS[name](seed)
        budget = asked.budget * table.dense_ms
        start = time.perf_counter()
        best = exact.solve([], sensitivity, table, net, budget, PruneSpec())
        seconds = time.perf_counter() - start
        others = [m.solve([], sensitivity, table, net, budget, PruneSpec()).loss for m in (greedy, uniform)]
        columns = sum(len(cost.ms) for cost in table.sites)
        print(
            f"{name:12s} {seed:4d} {len(net.groups):6d} {len(table.sites):5d} {columns:8d} {seconds:6.2f} "
            f"{best.gap:7.1e} {best.loss:7.3f} {others[0]:7.3f} {others[1]:8.3f}",
            flush=True,
        )
        rows.append(
            {
                "problem": name,
                "seed": seed,
                "groups": len(net.groups),
                "sites": len(table.sites),
                "rows": columns,
                "seconds": seconds,
                "gap": best.gap,
                "loss": best.loss,
                "greedy": others[0],
                "uniform": others[1],
            }
        )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(
        json.dumps(
            {
                "python": platform.python_version(),
                "scipy": scipy.__version__,
                "machine": platform.machine(),
                "problems": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
