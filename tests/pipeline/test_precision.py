"""`deploy build` in half precision: every measured network is in it, and what it costs is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny_project import problems, replace, request, run_of, stages, write_project

from pipeline.flow import BuildResult, build
from pipeline.graph.rewriting import Timing
from pipeline.graph.verify import compare_outputs, seeded_inputs
from pipeline.precision import told
from pipeline.release.verify import read_manifest
from profiles.errors import UsageError
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness.measurement import Session

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
HALF = {"precision": "fp16"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, BuildResult]:
    """The same project in float32 and then in half, in one folder with one cache."""
    folder = tmp_path_factory.mktemp("both")
    torch.set_num_threads(1)
    project = write_project(folder / "tiny")
    exact, half = (build(request(project, folder / "root", overrides=given)) for given in ({}, HALF))
    return exact, half


@pytest.fixture(scope="module")
def half(both: tuple[BuildResult, BuildResult]) -> BuildResult:
    return both[1]


def bundle(result: BuildResult) -> Path:
    assert result.bundle is not None
    return result.bundle


def kinds(path: Path) -> set[int]:
    """Types of the floating weights of a file."""
    floating = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return {t.data_type for t in onnx.load(str(path)).graph.initializer if t.data_type in floating}


def sessions(result: BuildResult) -> dict[str, Session]:
    lines = [json.loads(line) for line in (run_of(result) / "journal").read_text().splitlines()]
    return {line["name"]: Session.from_json(line["value"]) for line in lines if line["name"].startswith("session ")}


def test_the_bundle_is_in_half_verifies_and_keeps_budget_and_accuracy(half: BuildResult):
    assert half.exit_code == 0 and half.summary["verdict"] == "met"
    assert kinds(bundle(half) / "model.onnx") == kinds(bundle(half) / "dense.onnx") == {TensorProto.FLOAT16}
    assert problems(bundle(half)) == []
    assert half.summary["latency_ratio_interval"][1] <= 0.6
    assert half.summary["accuracy"] >= half.summary["accuracy_dense"] - 0.05
    assert read_manifest(bundle(half)).precision == "fp16"
    specs = (*read_manifest(bundle(half)).inputs, *read_manifest(bundle(half)).outputs)
    assert {spec.dtype for spec in specs} == {"float32"}


def test_the_ratio_is_of_two_networks_in_half(half: BuildResult):
    target: Any = load_target(load_profile("simulated"), run_of(half))
    truth = target.true_ms(bundle(half) / "model.onnx") / target.true_ms(bundle(half) / "dense.onnx")
    assert half.summary["latency_ratio"] == pytest.approx(truth, rel=0.01)


def test_every_network_that_was_measured_is_in_half(half: BuildResult):
    measured = sessions(half)
    dense = stages(half)["halve dense"]["outputs"]["onnx"]
    for name, session in measured.items():
        names = set(session.measurements)
        assert names >= ({"fp32", "fp32-again", "fp16"} if name == "session precision" else {"dense", "dense-again"})
        if name != "session precision":
            assert session.measurements["dense"].sha256 == dense
    candidates = sorted((run_of(half) / "work").glob("round-*.onnx"))
    assert candidates and all(kinds(path) == {TensorProto.FLOAT16} for path in candidates)
    assert measured["session precision"].measurements["fp16"].sha256 == dense
    assert measured["session precision"].measurements["fp32"].sha256 == stages(half)["dense"]["outputs"]["onnx"]


def test_what_was_measured_or_judged_in_float32_is_not_taken_for_half(both: tuple[BuildResult, BuildResult]):
    exact, half = both
    reused = {name for name, row in stages(half).items() if row.get("reused")}
    assert reused >= {"dense", "rank"}, "what is made and computed in float32 knows no precision"
    assert not reused & {"halve dense", "halve pruned", "evaluate dense fp16", "evaluate pruned"}
    assert "halve dense" not in stages(exact) and "precision" not in stages(exact)
    rows = stages(half)["tabulate"]["detail"]
    assert int(rows.split("reused ")[1].split(",")[0]) <= 2, "empty graphs alone have no precision"
    for name in ("model.onnx", "dense.onnx"):
        assert (bundle(exact) / name).read_bytes() != (bundle(half) / name).read_bytes()
    assert kinds(bundle(exact) / "model.onnx") == {TensorProto.FLOAT}


def test_rounding_moves_the_shipped_network_by_no_more_than_is_told(half: BuildResult):
    log = json.loads((bundle(half) / "passes.json").read_text())
    for name, stage, file in (("dense", "dense", "dense.onnx"), ("pruned", "export", "model.onnx")):
        done, hash = log[name]["precision"], stages(half)[stage]["outputs"]["onnx"]
        exact = onnx.load(str(run_of(half).parents[1] / ".deploy" / "objects" / hash[:2] / hash))
        shipped = onnx.load(str(bundle(half) / file))
        assert compare_outputs(exact, shipped, seeded_inputs(exact, 4)).max_rel < done["allowed"] < 0.05
        assert (done["bytes_before"], done["bytes_after"]) == (exact.ByteSize(), shipped.ByteSize())
        assert done["samples"] == 128 and done["kept"] == []
    detail = stages(half)["halve pruned"]["detail"]
    done = log["pruned"]["precision"]
    share = done["bytes_after"] / done["bytes_before"]
    assert detail == f"{done['nodes']} nodes, 0 stay float32, {share:.2f}x the bytes" and share < 0.7


def test_report_and_notes_say_what_half_precision_does_on_the_device(half: BuildResult):
    assert half.report is not None
    [note] = [note for note in half.report.notes if note.startswith("in fp16 the dense network takes ")]
    session = sessions(half)["session precision"]
    ratio = np.sqrt(session.ratio("fp16", "fp32").center * session.ratio("fp16", "fp32-again").center)
    assert f"takes {ratio:.3f}x (" in note and "of its time in fp32 on this device" in note
    assert f"accuracy goes from {half.summary['accuracy_dense']:.4f} to " in note
    [row] = [row for row in half.report.passes if row.name == "fp16 (precision)"]
    assert row.changed > 5 and row.refused == ()
    assert half.report.settings["precision"] == "fp16"
    assert "fp16 (precision)" in (bundle(half) / "report.html").read_text()


def test_the_accuracy_that_counts_is_that_of_the_users_network(both: tuple[BuildResult, BuildResult]):
    exact, half = both
    assert half.summary["accuracy_dense"] == exact.summary["accuracy_dense"]


def test_a_device_where_half_is_slower_is_told_so_and_a_faster_one_not():
    slow = told("fp16", Timing(1.0, 1.42, 1.42, 1.41, 1.43), 0.98604, 0.9858)
    assert slow == (
        "in fp16 the dense network takes 1.420x (1.410 to 1.430x) of its time in fp32 on this device, and its accuracy "
        "goes from 0.9860 to 0.9858; fp16 is slower here, try --set precision=fp32. "
        "Latencies are of networks in fp16; accuracy is counted from fp32."
    )
    assert "slower" not in told("fp16", Timing(1.0, 0.6, 0.6, 0.5, 0.7), None, None)
    assert "slower" not in told("fp16", Timing(1.0, 1.01, 1.01, 0.99, 1.03), None, None)
    one = told("fp16", Timing(1.0, 1.2, 1.2, 0.0, math.inf), None, None)
    assert "takes 1.200x of its time in fp32 on this device." in one, "a single process gives no bounds"


def test_candidates_are_measured_in_half_and_taken_before_the_rounding(tmp_path: Path):
    from test_candidates import NETS, PROJECT

    project = tmp_path / "net"
    project.mkdir()
    (project / "tinynet.py").write_text(NETS)
    (project / "deploy.toml").write_text(PROJECT)
    given = {
        **HALF, "graph": {"candidates": ["uneven-depthwise"]},
        "prune": {"rounds": 1, "value_widths": 1, "repair": "none"},
    }  # fmt: skip
    result = build(request(project, tmp_path / "root", budget="0.8x", overrides=given))
    shipped = onnx.load(str(bundle(result) / "model.onnx"))
    assert "/large/Conv" not in {node.name for node in shipped.graph.node}
    assert kinds(bundle(result) / "model.onnx") == {TensorProto.FLOAT16}
    tried = sorted((run_of(result) / "work").glob("candidate-*.onnx"))
    assert tried and all(kinds(path) == {TensorProto.FLOAT16} for path in tried)
    session = sessions(result)["session candidates 1"]
    assert session.measurements["pruned"].sha256 == stages(result)["halve exported"]["outputs"]["onnx"]
    assert result.report is not None and result.report.agreement is not None and result.report.agreement.argmax > 0.5


def test_what_overflows_on_calibration_samples_ships_in_float32_and_is_named(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    loud = "return self.head(nn.functional.adaptive_avg_pool2d(3e4 * y, 2).flatten(1)) / 3e4"
    replace(project / "tinynet.py", "return self.head(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))", loud)
    given = {**HALF, "prune": {"rounds": 1, "value_widths": 1}, "recover": {"epochs": 0}}
    result = build(request(project, tmp_path / "root", budget="0.8x", overrides=given))
    assert result.report is not None
    [row] = [row for row in result.report.passes if row.name == "fp16 (precision)"]
    assert any(
        "/head/Gemm" in why and " reaches " in why and "on 128 calibration samples" in why for why in row.refused
    )
    assert not any(why.startswith(("/stem", "/blocks")) for why in row.refused) and row.changed > 5
    both = {TensorProto.FLOAT, TensorProto.FLOAT16}
    assert kinds(bundle(result) / "model.onnx") == kinds(bundle(result) / "dense.onnx") == both
    assert all(kinds(path) == both for path in (run_of(result) / "work").glob("round-*.onnx"))
    assert result.summary["accuracy"] > 0.85
    assert problems(bundle(result)) == []


def test_a_dry_run_in_half_has_a_table_of_its_own(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    result = build(request(project, tmp_path / "root", dry_run=True, overrides=HALF))
    assert result.exit_code == 0 and result.summary["predicted_ratio"] <= 0.6
    assert "halve dense" in stages(result) and "halve pruned" not in stages(result)


def test_an_unknown_precision_is_refused_with_those_there_are(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    with pytest.raises(UsageError) as caught:
        build(request(project, tmp_path / "root", overrides={"precision": "fp8"}))
    assert caught.value.message == ("the command line: precision is 'fp8', a string; input should be 'fp32' or 'fp16'.")
