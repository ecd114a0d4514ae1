"""What a probe takes over from the plan before: never another loss than that of a probe that has seen no plan."""

from __future__ import annotations

from functools import partial

import numpy as np
import prune_nets
import pytest
import torch
from prune_nets import NETS, example, lived_in
from torch import Tensor, nn

from pipeline.nouns import DropBlock, KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.origins import worth_keeping
from pipeline.prune.repair import SequentialFit
from pipeline.prune.sensitivity import LossProbe
from pipeline.prune.taps import is_relu


class Twice(nn.Module):
    """A layer, and a norm, that are called at two places; what is refitted at the first shows at the second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        if kind == "layer":
            self.b = self.a
        elif kind == "norm":
            self.other = self.norm
        elif kind == "weight":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.norm(self.a(x)).relu()
        x = self.back(self.inner(x).relu()).relu()
        x = self.other(self.b(x)).relu()
        return self.last(x.mean((2, 3)))


class Blocks(nn.Module):
    """Residual blocks in a row: the layer before a removed one is refitted to what that one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = prune_nets.conv(3, 8), nn.Linear(8, 5)
        self.inner = nn.ModuleList([prune_nets.conv(8, 10) for _ in range(3)])
        self.outer = nn.ModuleList([nn.Conv2d(10, 8, 3, padding=1, bias=False) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner, outer, norm in zip(self.inner, self.outer, self.norms, strict=True):
            x = (x + norm(outer(inner(x)))).relu()
        return self.last(x.mean((2, 3)))


AGAIN = {f"{kind} twice": partial(Twice, kind) for kind in ("layer", "norm", "weight")}
EVERY = {**NETS, **AGAIN, "blocks": Blocks}


def walk(network: Network, count: int) -> list[PruningPlan]:
    """Plans of which each differs from the one before in one group or block, wherever that lies."""
    source, topology = np.random.default_rng(0), network.topology
    widths = {g.id: max(1, g.size - g.size // 3) for g in topology.offered}
    kept = {g.id: source.permutation(g.size) for g in topology.offered}
    dropped: set[str] = set()
    plans = []
    for _ in range(count):
        if topology.removable and source.random() < 0.3:
            dropped ^= {source.choice([block.id for block in topology.removable])}
        else:
            group = topology.offered[source.integers(len(topology.offered))]
            widths[group.id] = int(source.integers(1, group.size + 1))
        edits: list[KeepUnits | DropBlock] = [DropBlock(b.id) for b in topology.blocks if b.id in dropped]
        for group in topology.offered:
            if widths[group.id] < group.size and group.block not in dropped:
                chosen = sorted(kept[group.id][: widths[group.id]].tolist())
                edits.append(KeepUnits(group.id, tuple(chosen)))
        plans.append(PruningPlan(tuple(edits)))
    return plans


@pytest.mark.parametrize("room_mib", [64, 1, 0])
@pytest.mark.parametrize("name", EVERY)
def test_losses_are_those_of_a_probe_that_has_seen_no_plan(name: str, room_mib: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(3)
    network = find_groups(capture(lived_in(EVERY[name]()), example()))
    samples = Samples([(torch.randn(96, *example()[0].shape[1:], generator=torch.Generator().manual_seed(5)),)])
    monkeypatch.setattr("pipeline.prune.sensitivity.KEEP_MIB", room_mib)
    probe = LossProbe(network, samples)
    for plan in walk(network, 20):
        got = probe.loss(plan)
        assert got == pytest.approx(LossProbe(network, samples).loss(plan), rel=1e-5, abs=1e-9)


def test_no_later_plan_begins_at_what_only_a_relu_reads():
    graph = find_groups(capture(lived_in(EVERY["residual pad"]()), example())).graph
    relus = [node for node in graph.graph.nodes if is_relu(graph, node)]
    alone = [node.args[0] for node in relus if len(node.args[0].users) == 1]
    assert alone and not any(worth_keeping(graph, node) for node in alone)
    assert all(worth_keeping(graph, node) for node in relus)


def test_a_layer_before_the_first_difference_is_not_refitted_again(monkeypatch: pytest.MonkeyPatch):
    network = find_groups(capture(lived_in(prune_nets.Chain()), example()))
    samples = Samples([(torch.randn(24, *example()[0].shape[1:]),)])
    first, *_, last = network.topology.offered
    plans = [PruningPlan((KeepUnits(first.id, (0, 1)), KeepUnits(last.id, tuple(range(k))))) for k in (2, 3, 3)]
    refitted: list[str] = []
    real = SequentialFit._refit

    def spy(self: SequentialFit, node: torch.fx.Node, x: Tensor) -> None:
        refitted.append(node.name)
        real(self, node, x)

    monkeypatch.setattr(SequentialFit, "_refit", spy)
    probe, counts = LossProbe(network, samples), []
    for plan in plans:
        refitted.clear()
        probe.loss(plan)
        counts.append(len(refitted))
    assert counts[0] > counts[1] > counts[2]


def test_the_repair_of_a_plan_that_is_asked_for_again_is_taken_over_whole():
    network = find_groups(capture(lived_in(prune_nets.Chain()), example()))
    samples = Samples([(torch.randn(24, *example()[0].shape[1:]),)])
    probe, plan = LossProbe(network, samples), walk(network, 1)[0]
    assert probe.loss(plan) == probe.loss(plan)
