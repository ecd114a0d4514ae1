"""Checks as a simulated device measures them: networks, three-armed sessions, judged records, met and missed runs."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from pipeline.nightly.baseline import machine_of
from pipeline.nouns import Change, CheckRecord, KeepUnits, LayerMove, Ledger, Pin, PruningPlan
from pipeline.release.bundle import Contents, write_bundle
from pipeline.release.manifest import Accuracy, TensorSpec, latency_of
from pipeline.run import BuildRequest, Run
from profiles.schema import Budget, CheckSpec, MeasureSpec, Profile, load_profile
from targets.base import load_target
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE, Control, Stage, Tail, Verdict
from targets.harness.device import Fingerprint
from targets.harness.measurement import Interval, Session

QUICK = MeasureSpec(accept_processes=4, accept_rounds=6, block_dropped=1, block_timed=4, block_min_ms=0)

DEVICE = Fingerprint(
    machine="aarch64", cpu="Cortex-A78AE", cpu_flags="f" * 64, cores=6, cpu_quota=None, kernel="5.15.148-tegra",
    memory_mib=7620, power="15W", clocks="locked", runtime="onnxruntime", runtime_version="1.23.0",
    runtime_build="b" * 64, python="3.11.9", providers=("CPUExecutionProvider",), threads=1, spin=False,
)  # fmt: skip


def write_net(path: Path, width: int = 16, outside: bool = False, size: int | str = 16) -> Path:
    """conv 3 -> width, relu, mean over an image of this size. outside: its weights in a file of their own."""
    weight = np.random.default_rng(width).normal(size=(width, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["output"]),
    ]
    ports = (
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, size, size]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, width, 1, 1]),
    )
    graph = helper.make_graph(nodes, "net", [ports[0]], [ports[1]], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=outside, location=f"{path.name}.data", size_threshold=0)
    return path


def session(folder: Path, networks: dict[str, int], seed: int = 0) -> Session:
    """A simulated session: name -> width of the network under this name."""
    target = load_target(load_profile("simulated"), folder)
    files = {name: write_net(folder / f"w{width}.onnx", width) for name, width in networks.items()}
    return target.measure(files, QUICK.model_copy(update={"seed": seed}), "accept")


def arms(folder: Path, seed: int = 0) -> Session:
    """The three arms of a check of equal networks."""
    return session(folder, {BASELINE: 16, AGAIN: 16, CANDIDATE: 16}, seed)


def control(shift: float = 0.0) -> Control:
    """A control arm that came out as a shift of log(A' / A), bounds 0.1 % on both sides."""
    low, high = shift - 0.001, shift + 0.001
    return Control(shift, low, high, shift, low, high, None, -math.inf, 8)


def record(**changes: Any) -> CheckRecord:
    """A check that failed, with something in every field."""
    ratio = Interval(1.031, 1.0272, 1.0348, 0.0031, 8)
    unbounded = Interval(1.4, 0.0, math.inf, math.nan if changes.pop("nan", False) else 0.0, 1)
    tails = (Tail("p99", unbounded, True), Tail("budget 8ms", ratio, False, True))
    stage = Stage(1, ratio, ratio, Interval(1.0, 0.999, 1.001, 0.001, 8), tails, math.inf, "", 27.5, control())
    made = CheckRecord(
        started="2026-11-20T02:00:00Z",
        profile="jetson-orin-nano",
        device=DEVICE.digest(),
        baseline=Pin("resnet20", "a" * 64, "/runs/1", "0.5x", "2026-10-01T09:00:00Z", DEVICE.to_table()),
        candidate=Pin("inf", "c" * 64, "/runs/2", inputs=(("x", (1, "n", 3)),), outputs=(("y", ()),), project="/p"),
        verdict=Verdict("fail", "3.1 % slower", (stage, replace(stage, number=2, again=None))),
        absolute={BASELINE: {"p50": 0.8, "p99": None}, AGAIN: {"p50": 0.82}, CANDIDATE: {"p50": 1 / 3}},
        changed={"kernel": ("5.15", "6.1"), "providers": (("A", "B"), ("A",)), "cpu_quota": (None, 1.5)},
        conditions=("load was 2.10 on 6 cores", "nan"),
        layers=(LayerMove("conv1", "Conv", 0.1, 0.2), LayerMove("relu", "Relu", 0.01, 0.0)),
        ledger=Ledger(120, 1, 1.05),
        changes=(Change("2026-11-18T02:00:00Z", "p50", 0.8, 0.9, 1e-9),),
        spec=CheckSpec(fail=0.021),
        protocol="ort accept",
        seconds=81.25,
        machine=machine_of(DEVICE),
    )
    return replace(made, **changes)


def finished_run(root: Path, budget: str = "1000x", missed: bool = False, profile: str = "local") -> Path:
    """A run of width 16 against 64 with a real bundle, as a build leaves it; missed: in `rejected/`, as a miss does."""
    request = BuildRequest(root, profile, budget, root=root, console=Console(file=io.StringIO()))
    run = Run.create(root, Profile(name=profile, target="local"), request=request)
    with run:
        write_bundle(run.path / ("rejected" if missed else "bundle"), _contents(root, budget))
        run.finish("missed" if missed else "done", {})
    return run.path


def _contents(folder: Path, budget: str) -> Contents:
    measured = session(folder, {"pruned": 16, "dense": 64})
    image = np.zeros((1, 3, 16, 16), np.float32)
    latency = latency_of(measured, Budget.parse(budget), "pruned", "dense")
    return Contents(
        network="nets:tiny", target="local", model=folder / "w16.onnx", dense=folder / "w64.onnx",
        plan=PruningPlan((KeepUnits("g", tuple(range(16))),)), weights={"w": np.zeros((16, 3, 3, 3), np.float32)},
        session=measured, passes=[], report="<!doctype html>", sample_inputs={"input": image},
        sample_outputs={"output": np.zeros((1, 16, 1, 1), np.float32)},
        inputs=(TensorSpec(name="input", dtype="float32", shape=(1, 3, 16, 16), layout="NCHW"),),
        outputs=(TensorSpec(name="output", dtype="float32", shape=(1, 16, 1, 1), layout="NCHW"),),
        latency=latency, accuracy=Accuracy(metric="accuracy", dense=0.9, pruned=0.9, max_drop=0.01), versions={},
    )  # fmt: skip
