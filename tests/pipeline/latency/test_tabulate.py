"""The table on the simulated device, whose truth is known: grid, choices, fit, factor, store."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow
from pipeline.graph.optimize import optimize
from pipeline.graph.rows import Rows
from pipeline.latency.store import Store
from pipeline.latency.tabulate import tabulate
from pipeline.latency.timing import Tally
from pipeline.nouns import DropBlock, KeepUnits, LatencyTable, PruningPlan, Topology
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import resolve
from profiles.schema import GraphSpec, InputSpec, PruneSpec, load_profile
from targets.base import load_target
from targets.simulated import Simulated

SHAPE = (1, 3, 16, 16)


class Small(nn.Module):
    """A stem, a residual block on 32 channels, a wider convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
        self.second, self.wide = nn.Conv2d(48, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        x = torch.relu(self.wide(x)).mean((2, 3))
        return self.head(x)


@dataclass(frozen=True)
class Case:
    topology: Topology
    model: onnx.ModelProto
    dense: Path
    rows: Rows

    def cut(self, widths, dropped) -> onnx.ModelProto:
        edits = [DropBlock(block) for block in sorted(dropped)]
        edits += [KeepUnits(g.id, tuple(range(widths[g.id]))) for g in self.topology.groups if widths[g.id] < g.size]
        return narrow(self.model, resolve(self.topology, PruningPlan(tuple(edits))))

    def narrowed(self, widths, dropped) -> bytes:
        return self.cut(widths, dropped).SerializeToString()


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    network = find_groups(capture(Small().eval(), (torch.randn(SHAPE),)))
    export(network.graph, [InputSpec(shape=SHAPE)], folder / "raw.onnx")
    optimize(folder / "raw.onnx", GraphSpec().passes, folder / "dense.onnx")
    model, topology = onnx.load(str(folder / "dense.onnx")), network.topology
    return Case(topology, model, folder / "dense.onnx", Rows(model, topology, lambda plan: resolve(topology, plan)))


@pytest.fixture
def device(tmp_path) -> Simulated:
    target = load_target(load_profile("simulated"), tmp_path)
    assert isinstance(target, Simulated)
    return target


def build(device, case, tally=None, narrowed=None, spec=None) -> LatencyTable:
    with Store(device.state / "latency.sqlite") as store:
        return tabulate(
            device, case.rows, case.topology, case.dense, spec or PruneSpec(), store, tally=tally, narrowed=narrowed
        )


def true_errors(device, case, table) -> list[float]:
    """Relative errors of predicted ratios to dense over random choices."""
    rng = np.random.default_rng(3)
    dense_ms = device.true_ms(case.dense)
    errors = []
    while len(errors) < 25:
        dropped = {b.id for b in case.topology.removable if rng.random() < 0.3}
        widths = {g.id: int(rng.choice(table.choices[g.id])) for g in case.topology.groups}
        widths = {g.id: g.size if g.block in dropped else widths[g.id] for g in case.topology.groups}
        path = device.state / "candidate.onnx"
        onnx.save(case.cut(widths, dropped), str(path))
        truth = device.true_ms(path) / dense_ms
        errors.append(table.predict(widths, dropped).ms / table.dense_ms / truth - 1.0)
    return errors


@pytest.mark.parametrize("whole", [False, True], ids=["dense only", "with narrowed networks"])
def test_predicted_ratios_come_close_to_the_truth(device, case, whole):
    table = build(device, case, narrowed=case.narrowed if whole else None)
    sizes = np.abs(true_errors(device, case, table))  # a roofline is not linear in the work, and fuses no addition
    assert np.median(sizes) < 0.05 and np.quantile(sizes, 0.9) < 0.13
    assert table.dense_ms == pytest.approx(device.true_ms(case.dense), rel=0.2)
    assert 0.0 < table.spread < 0.1


def test_the_grid_is_the_step_of_the_devices_staircase(device, case):
    table = build(device, case)
    assert table.grid == device.truth.grid == 8
    for group in case.topology.offered:
        assert all(width % 8 == 0 for width in table.choices[group.id])
        assert table.choices[group.id][-1] == group.size


def test_the_grid_of_the_profile_is_taken_without_measuring_it(device, case):
    tally = Tally()
    table = build(device, case, tally, spec=PruneSpec(grid=16))
    assert table.grid == 16
    assert {w for g in case.topology.offered for w in table.choices[g.id]} <= {16, 32, 48, 64}


def test_rows_measured_before_are_not_measured_again_and_give_the_same_table(device, case):
    cold, warm = Tally(), Tally()
    first = build(device, case, cold, case.narrowed)
    start = time.perf_counter()
    second = build(device, case, warm, case.narrowed)
    assert time.perf_counter() - start < 1.0
    assert cold.measured > 0 and warm.measured == 0
    assert second == first


def test_a_removed_block_costs_only_what_is_left_of_it(device, case):
    table = build(device, case)
    (site,) = [cost for cost in table.sites if cost.site.block is not None]
    sizes = {g.id: g.size for g in case.topology.groups}
    kept, gone = table.predict(sizes).ms, table.predict(sizes, [site.site.block]).ms
    full = tuple(dim.size(sizes) for dim in site.site.dims)
    assert kept - gone == pytest.approx(site.ms[full] - site.dropped_ms.get(full, 0.0))
    assert gone < 0.8 * kept


def test_no_channel_count_is_below_the_smallest_width_asked_for(device, case):
    table = build(device, case, spec=PruneSpec(min_width=24))
    assert min(w for g in case.topology.offered for w in table.choices[g.id]) == 24


def test_a_width_off_the_grid_has_no_prediction(device, case):
    table = build(device, case)
    widths = {g.id: g.size for g in case.topology.groups}
    widths[case.topology.offered[0].id] = 13
    with pytest.raises(KeyError):
        table.predict(widths)
