"""The networks, and every step on one of them with its seconds and its memory."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks import nets
from benchmarks.builds import TARGET, machine
from benchmarks.coupling import networks
from benchmarks.solver_scaling import drawn
from pipeline.graph.export import export
from pipeline.graph.narrow import narrow_file
from pipeline.graph.optimize import optimize
from pipeline.graph.rows import Rows
from pipeline.latency.solvers import exact
from pipeline.latency.store import Store
from pipeline.latency.tabulate import tabulate
from pipeline.losses import EFFORT_MACS, FEWEST_SAMPLES, VALUE_SAMPLES
from pipeline.nouns import KeepUnits, LatencyTable, PruningPlan, Ranking, Sensitivity, Topology
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.neutral import layers
from pipeline.prune.plan import make_plan, resolve
from pipeline.prune.sensitivity import LossProbe
from pipeline.search import EVALUATIONS
from pipeline.stage import tool_versions
from profiles.errors import MissedError
from profiles.schema import GraphSpec, InputSpec, PruneSpec, load_profile
from targets.base import Progress, RowTimes, Target, load_target
from targets.simulated import Truth, roofline_ms

Made = tuple[nn.Module, tuple[Tensor, ...]]


def _detector(name: str) -> Callable[[], Made]:
    return lambda: networks.build("detection", name, 320)


REAL: Mapping[str, Callable[[], Made]] = {
    "resnet50": lambda: (nets.resnet50(), (torch.randn(1, 3, 224, 224),)),
    "ssdlite": _detector("ssdlite320_mobilenet_v3_large"),
    "retinanet": _detector("retinanet_resnet50_fpn"),
}
BUDGETS = (0.5, 0.55, 0.45)
"""Shares of the dense latency that are solved for: the first is timed, all are measured in the round."""


def cifar(n: int) -> Made:
    """The ResNet of 6 n + 2 layers."""
    return nets.resnet20(10, blocks=(n, n, n)).eval(), (torch.randn(1, 3, 32, 32),)


def worker(name: str, most: int, plans: int) -> dict[str, Any]:
    """One network in this process: `cifar-N` without a device, others on the target."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grows = name.startswith("cifar-")
    made = cifar(int(name.removeprefix("cifar-"))) if grows else REAL[name]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        target = load_target(load_profile("simulated" if grows else TARGET), folder)
        before = os.getloadavg()[0]
        row = judged(made, target, most, 0 if grows else plans, folder)
    load = [round(before, 2), round(os.getloadavg()[0], 2)]
    state = {"load": load, "when": datetime.now(UTC).isoformat(timespec="minutes")}
    versions = tool_versions("torch", "onnx", "onnxruntime", "scipy")
    return row | {"target": target.profile.name, "machine": machine(), "versions": versions, **state}


# --- one network ---------------------------------------------------------------------------------------------------


class Steps:
    """Seconds, seconds of this process, and the peak of its memory after each step."""

    def __init__(self) -> None:
        self.row: dict[str, dict[str, float]] = {"seconds": {}, "cpu_s": {}, "peak_mib": {}}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = (time.perf_counter() - wall, time.process_time() - cpu, peak)
        for column, value in zip(self.row.values(), found, strict=True):
            column[name] = round(value, 3)


class Sampled:
    """A target that measures some of the rows it is asked for; the others take a roofline's times, scaled to those.

    most: rows of one session. asked, measured: how many there were.
    """

    def __init__(self, target: Target, most: int) -> None:
        self.target, self.most = target, most
        self.asked = self.measured = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def rows(self, models: Sequence[Path], reference: Path, rounds: int, progress: Progress | None = None) -> RowTimes:
        """As the target's, shape (models, rounds)."""
        each = list(dict.fromkeys(models))
        chosen = [each[i] for i in np.linspace(0, len(each) - 1, min(self.most, len(each))).astype(int)]
        self.asked, self.measured = self.asked + len(each), self.measured + len(chosen)
        repeats = len(models) // len(each)
        taken = self.target.rows(chosen * repeats, reference, rounds, progress)
        if len(chosen) == len(each):
            return taken
        first = taken.reference_ms[:1]
        ms = taken.ms / taken.reference_ms[taken.group] * first  # as if all were measured in one group
        known = dict(zip(chosen, ms.reshape(repeats, len(chosen), rounds).swapaxes(0, 1), strict=True))
        believed = {path: roofline_ms(path, Truth()) for path in each}
        scale = float(np.median([np.median(ms) / believed[path] for path, ms in known.items()]))
        filled = [known.get(path, np.full((repeats, rounds), believed[path] * scale)) for path in each]
        return RowTimes(
            np.stack(filled, axis=1).reshape(len(models), rounds), first, np.zeros(len(models), dtype=np.int64)
        )


def judged(made: Made, target: Target, most: int, plans: int, folder: Path) -> dict[str, Any]:
    """Every step on one network. most: rows measured in a session; plans: whose losses are measured, 0 for no round."""
    model, example = made
    steps, spec = Steps(), PruneSpec()
    with steps.step("capture"):
        network = capture(model, example)
    with steps.step("groups"):
        find_groups(network, prove=False)
    with steps.step("proofs"):
        network = find_groups(network)
    with steps.step("onnx"):
        dense = _written(network, folder)
    sampled = Sampled(target, most)
    with steps.step("table"), Store(folder / "latency.sqlite") as store:
        table = _table(network, dense, sampled, store, spec)
    topology = network.topology
    values = drawn(topology.offered, topology.removable, table.choices, np.random.default_rng(0))
    with steps.step("solve"):
        solution = exact.solve([], values, table, topology, BUDGETS[0] * table.dense_ms, spec)
    row = {
        "layers": len(layers(network)), "nodes": len(list(network.graph.graph.nodes)),
        "groups": len(topology.offered), "blocks": len(topology.removable), "sites": len(table.sites),
        "rows": sampled.asked, "rows_measured": sampled.measured,
        "combinations": sum(len(cost.ms) for cost in table.sites), "gap": solution.gap,
    }  # fmt: skip
    if plans:
        row |= _round(network, table, values, dense, target, plans, folder, steps)
    return row | steps.row


def _written(network: Network, folder: Path) -> Path:
    inputs = tuple(InputSpec(name=f"input_{i}", shape=tuple(x.shape)) for i, x in enumerate(network.example))
    raw = export(network.graph, inputs, folder / "raw.onnx", GraphSpec().opset)
    optimize(raw, GraphSpec().passes, folder / "dense.onnx")
    return folder / "dense.onnx"


def _table(network: Network, dense: Path, target: Any, store: Store, spec: PruneSpec) -> LatencyTable:
    """As a build makes it, with the random networks that adjust it."""
    model, topology = onnx.load_model(str(dense)), network.topology
    rankings = _rankings(topology)

    def narrowed(widths: Mapping[str, int], dropped: frozenset[str]) -> bytes:
        cut = resolve(topology, make_plan(topology, rankings, widths, dropped))
        return narrow_file(dense, cut, dense.with_name("narrowed.onnx")).read_bytes()

    rows = Rows(model, topology, lambda plan: resolve(topology, plan))
    return tabulate(target, rows, topology, dense, spec, store, narrowed=narrowed)


def _rankings(topology: Topology) -> dict[str, Ranking]:
    """Units go in their own order: which they are costs nothing."""
    return {g.id: Ranking(g.id, tuple(range(g.size)), (0.0,) * g.size) for g in topology.offered}


def _round(
    network: Network,
    table: LatencyTable,
    values: Sensitivity,
    dense: Path,
    target: Target,
    plans: int,
    folder: Path,
    steps: Steps,
) -> dict[str, Any]:
    """What a round of a build does: losses of plans, then the best measured beside the dense network."""
    topology, spec = network.topology, PruneSpec()
    macs = sum(int(np.prod(layer.shape)) * layer.positions for layer in topology.layers)
    samples = min(VALUE_SAMPLES, max(FEWEST_SAMPLES, round(4 * EFFORT_MACS / macs)))
    effort = min(1.0, max(0.25, EFFORT_MACS / (macs * samples)))
    edits = sum(min(3, len(table.choices[g.id])) for g in topology.offered) + len(topology.removable)
    noise = tuple(torch.randn(samples, *x.shape[1:]) for x in network.example)
    with steps.step("probe"):
        probe = LossProbe(network, Samples([noise]))
    halves = [KeepUnits(g.id, tuple(range((g.size + 1) // 2))) for g in topology.offered]
    tried = [halves[i] for i in np.linspace(0, len(halves) - 1, plans).astype(int)]
    with steps.step("losses"):
        for edit in tried:
            probe.loss(PruningPlan((edit,)))
    chosen = [_solved(table, topology, values, share, spec) for share in BUDGETS]
    with steps.step("round"):
        files = {"dense": dense, "dense-again": dense}
        for index, plan in enumerate(plan for plan in chosen if plan is not None):
            files[f"plan-{index}"] = narrow_file(dense, resolve(topology, plan), folder / f"plan-{index}.onnx")
        built = {name: target.build(path, folder / f"{name}.artifact") for name, path in files.items()}
        session = target.measure(built, target.profile.measure, "rank")
    ratios = {name: round(session.ratio(name, "dense").center, 4) for name in files if name.startswith("plan")}
    turns = max(1, round(EVALUATIONS[0] * effort) // edits)
    return {"samples": samples, "losses_measured": len(tried), "plans": turns * edits, "ratios": ratios}


def _solved(
    table: LatencyTable, topology: Topology, values: Sensitivity, share: float, spec: PruneSpec
) -> PruningPlan | None:
    try:
        found = exact.solve([], values, table, topology, share * table.dense_ms, spec)
    except MissedError:
        return None
    return make_plan(topology, _rankings(topology), found.widths, found.dropped)
