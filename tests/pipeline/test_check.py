"""The nightly check from pins to the store, on a simulated device with a known truth, and its command line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import check as nightly
from pipeline.cli.frame import main
from pipeline.nightly import baseline
from pipeline.nightly.history import Nights
from profiles.errors import DeployError, UndecidedError
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE


def network(path: Path, layers: int = 4, size: int = 32) -> Path:
    """A chain of 3x3 convolutions of 32 channels."""
    nodes, weights = [], []
    for index in range(layers):
        name = "y" if index == layers - 1 else f"t{index}"
        values = np.random.default_rng(index).standard_normal((32, 32, 3, 3)).astype(np.float32) * 0.05
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        source = "x" if index == 0 else f"t{index - 1}"
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [name], name=f"conv{index}", pads=[1] * 4))
    shape = (1, 32, size, size)
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], weights,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return tmp_path


def pin(place: Path, model: Path, target: str = "simulated") -> baseline.Pin:
    device = load_target(load_profile(target), place / ".deploy")
    pinned, path = baseline.from_run(model)
    pinned = replace(pinned, fingerprint=device.fingerprint().to_table())
    baseline.accept(place / ".deploy", target, pinned, path)
    return pinned


def checked(place: Path, candidate: Path | None, overrides=None) -> nightly.CheckResult:
    profile = load_profile("simulated", overrides)
    request = nightly.CheckRequest(profile, candidate, place / ".deploy", place / "runs")
    return nightly.check(request, load_target(profile, place / ".deploy"))


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(list(words))
    told = capsys.readouterr()
    return int(done.value.code or 0), told.out, told.err


# --- the flow ------------------------------------------------------------------------------------------------------


def test_without_a_newer_run_the_baseline_is_checked_against_itself_and_passes(place):
    pin(place, network(place / "a.onnx"))
    result = checked(place, None)
    assert result.record.same and result.record.verdict.outcome == "pass"
    assert result.record.verdict.exit_code == 0 and not result.record.layers


def test_a_network_with_one_more_layer_fails_and_the_layers_say_where(place):
    pin(place, network(place / "a.onnx"))
    record = checked(place, network(place / "b.onnx", layers=5)).record
    assert record.verdict.outcome == "fail" and record.verdict.exit_code == 3
    assert record.verdict.stages[-1].ratio.low > 1.02 and len(record.verdict.stages) == 2
    moved = record.layers[0]
    assert moved.name == "conv4" and moved.baseline_ms == 0.0 < moved.candidate_ms


def test_a_faster_network_is_an_improvement_and_the_baseline_stays(place):
    kept = pin(place, network(place / "a.onnx"))
    record = checked(place, network(place / "b.onnx", layers=3)).record
    assert record.verdict.outcome == "improved" and record.verdict.exit_code == 0
    assert baseline.baseline_of(place / ".deploy", "simulated").sha256 == kept.sha256


def test_every_check_is_kept_with_its_samples_and_its_control_arms(place):
    pin(place, network(place / "a.onnx"))
    numbers = [checked(place, None).number for _ in range(2)]
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        kept = nights.numbered("simulated")
        assert list(kept) == numbers
        first, second = (nights.sessions(number) for number in numbers)
        arms = [BASELINE, AGAIN, CANDIDATE]
        assert list(first[0].measurements) == arms and first[0].seed != second[0].seed
        assert len(nights.controls("simulated", kept[numbers[0]].device)) == 2


def test_a_profile_without_a_baseline_cannot_be_checked(place):
    with pytest.raises(UndecidedError, match="profile 'simulated' has no baseline") as refused:
        checked(place, None)
    assert refused.value.hint == "deploy baseline accept RUN --target simulated"


def test_a_baseline_of_another_machine_is_refused(place):
    pinned, path = baseline.from_run(network(place / "a.onnx"))
    table = load_target(load_profile("simulated"), place / ".deploy").fingerprint().to_table()
    baseline.accept(place / ".deploy", "simulated", replace(pinned, fingerprint={**table, "cores": 64}), path)
    with pytest.raises(UndecidedError, match="cores was 64"):
        checked(place, None)
    assert not (place / ".deploy" / "nights.sqlite").exists()


def test_a_new_kernel_is_recorded_and_does_not_stop_the_check(place):
    pinned, path = baseline.from_run(network(place / "a.onnx"))
    table = load_target(load_profile("simulated"), place / ".deploy").fingerprint().to_table()
    baseline.accept(place / ".deploy", "simulated", replace(pinned, fingerprint={**table, "kernel": "Linux 1"}), path)
    record = checked(place, None).record
    assert record.changed["kernel"] == ("Linux 1", table["kernel"]) and record.verdict.outcome == "pass"


def test_a_damaged_pinned_network_is_an_error_and_not_a_pass(place):
    pinned = pin(place, network(place / "a.onnx"))
    stored = baseline.artifact_of(place / ".deploy", pinned)
    stored.chmod(0o600)
    stored.write_bytes(b"no network")
    with pytest.raises(DeployError, match="damaged"):
        checked(place, None)


def test_a_stage_that_says_nothing_is_measured_once_more_and_is_then_inconclusive(place):
    pin(place, network(place / "a.onnx"))
    record = checked(place, None, {"check": {"control_sd": 1e-9}})
    assert record.record.verdict.outcome == "inconclusive" and record.record.verdict.exit_code == 4
    assert len(record.sessions) == 2


# --- the command line ----------------------------------------------------------------------------------------------


def test_accept_check_and_history_from_the_command_line(place, capsys, monkeypatch):
    summary = place / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    model = network(place / "a.onnx")
    assert run(capsys, "baseline", "accept", str(model), "--target", "simulated")[0] == 0
    code, out, _ = run(capsys, "baseline", "show", "--json")
    (shown,) = json.loads(out)["baselines"]
    assert code == 0 and shown["profile"] == "simulated" and shown["name"] == "a"
    slow = network(place / "b.onnx", layers=5)
    words = ["check", "--target", "simulated", "--candidate", str(slow), "--json", "--junit", "j.xml"]
    code, out, _ = run(capsys, *words, "--markdown", "m.md", "--html", "p.html")
    told = json.loads(out)
    assert code == 3 == told["exit_code"] and told["number"] == 1
    assert len(ET.parse(place / "j.xml").getroot().findall(".//failure")) == 1
    assert "fail" in summary.read_text() and summary.read_text().strip() == (place / "m.md").read_text().strip()
    assert "<html" in (place / "p.html").read_text() and "https://" not in (place / "p.html").read_text()
    code, out, _ = run(capsys, "check", "--target", "simulated")
    assert code == 0 and "pass" in out
    code, out, _ = run(capsys, "history", "--target", "simulated", "--html", "h.html")
    assert code == 0 and "fail" in out and "pass" in out and (place / "h.html").is_file()


def test_a_check_that_could_not_be_measured_leaves_a_report_that_does_not_pass(place, capsys):
    code, out, err = run(capsys, "check", "--target", "simulated", "--junit", "j.xml", "--markdown", "m.md")
    assert code == 4 and out == "" and "has no baseline" in err and "deploy baseline accept RUN" in err
    assert len(ET.parse(place / "j.xml").getroot().findall(".//error")) == 1
    assert "has no baseline" in (place / "m.md").read_text()


def test_history_before_the_first_check_says_how_to_make_one(place, capsys):
    code, _, err = run(capsys, "history", "--target", "simulated")
    assert code == 2 and "no check was ever made here" in err and "deploy check --target T" in err
