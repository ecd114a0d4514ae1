"""The nightly check from pins to the store, on a simulated device with a known truth, and its command line."""

from __future__ import annotations

import contextlib
import errno
import html
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
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
from pipeline.nightly.records import from_table
from pipeline.nouns import CheckRecord
from pipeline.run import Interrupted
from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE
from targets.harness.measurement import Session
from targets.simulated import Simulated


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


def test_building_and_every_stage_have_a_bar_of_their_own(place, monkeypatch):
    asked: list[str] = []
    build_each = Simulated.build_each
    monkeypatch.setattr(
        Simulated, "build_each", lambda self, models, progress=None: (progress(1.0), build_each(self, models))[1]
    )
    pin(place, network(place / "a.onnx"))
    profile = load_profile("simulated")
    request = nightly.CheckRequest(profile, None, place / ".deploy", place / "runs")
    bar = lambda text: lambda done: asked.append(text)  # noqa: E731
    nightly.check(request, load_target(profile, place / ".deploy"), bar)
    assert list(dict.fromkeys(asked)) == ["build", "stage 1"]


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
        assert len(nights.controls("simulated", kept[numbers[0]].machine)) == 2


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
    (gap,) = stored(place)
    assert gap.verdict.outcome == "inconclusive" and "cores was 64" in gap.verdict.reason and not gap.verdict.stages
    assert gap.changed["cores"][0] == 64 and gap.absolute == {}


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


def test_a_pinned_network_that_the_device_refuses_is_told_as_the_baseline(place):
    model = onnx.load(network(place / "a.onnx"))
    model.graph.node[0].op_type = "Convolve"
    onnx.save(model, place / "a.onnx")
    pin(place, place / "a.onnx")
    with pytest.raises(DeployError) as refused:
        checked(place, network(place / "b.onnx"))
    assert "'baseline'" in refused.value.message and "objects" not in str(refused.value)


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
    assert code == 2 and "no check was ever made here" in err and "deploy check --target simulated" in err


def test_a_baseline_compared_with_itself_says_so_in_every_form(place, capsys):
    pin(place, network(place / "a.onnx"))
    said = "(the same file: a check of the environment)"
    _, out, _ = run(capsys, "check", "--target", "simulated", "--junit", "j.xml", "--markdown", "m.md")
    assert out.startswith(f"pass: {said} no slowdown")
    assert out.count("would have been noticed") == 1 and "could have seen" not in out
    assert "simulated device" in out and "simulated device" in (place / "m.md").read_text()
    assert said in (place / "j.xml").read_text() and said in (place / "m.md").read_text()
    told = json.loads(run(capsys, "check", "--target", "simulated", "--json")[1])
    assert told["reason"].startswith(said) and told["simulated"] is True
    assert "a (the same file)" in run(capsys, "history")[1]


def breaks(error: BaseException):
    """A `target` plug-in of a simulated device that measures nothing."""

    def target(profile, state):
        device = Breaking(profile, state)
        device.error = error
        return device

    return target


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        ("bug", 1, "RuntimeError: a bug"),
        ("scratch", 1, "'.deploy/scratch' cannot be used: file exists."),
        ("object", 1, "is damaged: the SHA-256 of"),
        ("candidate", 2, "there is no run, bundle or ONNX file 'c.onnx'."),
        ("setting", 2, "prune.min_widht"),
        ("newer", 1, "was written by a newer version (schema 99, this one knows 2)."),
    ],
)
def test_no_report_of_a_check_that_ends_with_an_error_is_last_nights(place, capsys, monkeypatch, spoil, code, said):
    pinned = pin(place, network(place / "a.onnx"))
    words = ["check", "--target", "simulated", "--junit", "j.xml", "--markdown", "m.md", "--html", "p.html"]
    assert run(capsys, *words)[0] == 0 and "pass" in (place / "p.html").read_text()
    if spoil == "bug":
        monkeypatch.setattr("targets.simulated.target", breaks(RuntimeError("a bug")))
    elif spoil == "scratch":
        (place / ".deploy" / "scratch").rmdir()
        (place / ".deploy" / "scratch").write_text("")
    elif spoil == "object":
        kept = baseline.artifact_of(place / ".deploy", pinned)
        kept.chmod(0o600)
        kept.write_bytes(b"no network")
    elif spoil == "newer":
        with sqlite3.connect(place / ".deploy" / "nights.sqlite") as base:
            base.execute("PRAGMA user_version=99")
        base.close()
    more = {"candidate": ["--candidate", "c.onnx"], "setting": ["--set", "prune.min_widht=4"]}.get(spoil, [])
    ended, out, err = run(capsys, *words, *more)
    assert ended == code and out == "" and said in err
    root = ET.parse(place / "j.xml").getroot()
    assert (root.get("errors"), root.find(".//testcase").get("classname")) == ("1", "deploy.check.simulated")
    assert said in root.find(".//error").text
    for report in ("m.md", "p.html"):
        told = html.unescape((place / report).read_text()).replace("\\", "")
        assert said in told and "not measured" in told and "no slowdown beyond" not in told


def test_a_reader_that_left_costs_neither_the_reports_nor_the_exit_code(place):
    pin(place, network(place / "a.onnx"))
    slow = str(network(place / "b.onnx", layers=5))
    words = ["check", "--target", "simulated", "--candidate", slow, "--junit", "j.xml", "--markdown", "m.md"]
    for more in ([], ["--json"]):
        ended, err = unread(*words, *more)
        assert (ended, err) == (3, "")
        assert ET.parse(place / "j.xml").getroot().get("failures") == "1" and "fail" in (place / "m.md").read_text()
        (place / "j.xml").unlink()
    assert unread("history") == (0, "")


def unread(*words: str) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline.cli", *words]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    return done.returncode, done.stderr


# --- places that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--junit", "--markdown", "--html"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(place, capsys, option):
    pin(place, network(place / "a.onnx"))
    (place / "file").write_text("")
    for path in ("/proc/report", "file/report", "/dev/null"):
        code, out, err = run(capsys, "check", "--target", "simulated", option, path)
        assert code == 2 and out == "" and path in err and "Traceback" not in err
    assert stored(place) == []


def test_a_summary_that_cannot_be_written_is_refused_before_anything_is_measured(place, capsys, monkeypatch):
    pin(place, network(place / "a.onnx"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "nowhere" / "s.md"))
    code, _, err = run(capsys, "check", "--target", "simulated")
    assert code == 2 and f"cannot write '{place / 'nowhere' / 's.md'}'" in err and stored(place) == []
    assert not (place / "nowhere").exists()


def unwritable(monkeypatch) -> None:
    """From now on no report can be written: the disk went away meanwhile."""

    def refused(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pipeline.cache.write_atomic", refused)


def test_a_report_that_cannot_be_written_in_the_end_hides_no_verdict(place, capsys, monkeypatch):
    pin(place, network(place / "a.onnx"))
    slow = network(place / "b.onnx", layers=5)
    unwritable(monkeypatch)
    words = ["check", "--target", "simulated", "--candidate", str(slow), "--junit", "j.xml", "--html", "p.html"]
    code, out, err = run(capsys, *words)
    assert code == 1 and out.startswith("fail: slower") and "Error: cannot write 'j.xml': Read-only" in err
    assert "warning: cannot write 'p.html'" in err
    code, out, _ = run(capsys, *words, "--json")
    told = json.loads(out)
    assert code == 1 == told["exit_code"] and told["outcome"] == "fail" and "cannot write 'j.xml'" in told["error"]
    assert [record.verdict.outcome for record in stored(place)] == ["fail", "fail"]


def test_a_report_of_an_error_that_cannot_be_written_does_not_hide_the_error(place, capsys, monkeypatch):
    unwritable(monkeypatch)
    code, _, err = run(capsys, "check", "--target", "simulated", "--junit", "j.xml")
    assert code == 4 and "has no baseline" in err and "warning: cannot write 'j.xml'" in err


def test_measure_looks_at_its_places_first_and_shows_what_it_measured(place, capsys, monkeypatch):
    words = ["measure", str(network(place / "a.onnx")), "--target", "simulated"]
    for option in ("--out", "--html"):
        code, out, err = run(capsys, *words, option, str(place))
        assert code == 2 and out == "" and "is a directory" in err
        assert run(capsys, *words, option, "/proc/x")[0] == 2
    unwritable(monkeypatch)
    code, out, err = run(capsys, *words, "--out", "s.json")
    assert code == 1 and "protocol:" in out and "cannot write 's.json'" in err
    code, out, _ = run(capsys, *words, "--out", "s.json", "--json")
    assert code == 1 and "a" in json.loads(out)["models"] and "cannot write" in json.loads(out)["error"]


# --- what a check keeps when something goes wrong ------------------------------------------------------------------


def stored(place: Path) -> list[CheckRecord]:
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        return nights.records()


class Breaking(Simulated):
    """A simulated device whose session number `at` ends with `error`, or whose profiler does (at = 0)."""

    at, error = 1, DeployError("the agent was killed.")
    asked = 0

    def measure(self, *args, **kwargs) -> Session:
        self.asked += 1
        if self.asked == self.at:
            raise self.error
        return super().measure(*args, **kwargs)

    def layers(self, *args, **kwargs):
        if self.at == 0:
            raise self.error
        return super().layers(*args, **kwargs)


def broken(place: Path, at: int, error: BaseException, candidate: Path | None = None) -> nightly.CheckResult:
    profile = load_profile("simulated")
    device = Breaking(profile, place / ".deploy")
    device.at, device.error = at, error
    return nightly.check(nightly.CheckRequest(profile, candidate, place / ".deploy", place / "runs"), device)


def test_a_fail_stands_though_its_layers_could_not_be_looked_at(place):
    pin(place, network(place / "a.onnx"))
    slow = network(place / "b.onnx", layers=5)
    result = broken(place, 0, DeployError("the lease is held by process 7."), slow)
    assert result.exit_code == 3 and result.record.verdict.outcome == "fail" and result.record.layers == ()
    assert "the layers were not looked at: the lease is held by process 7." in result.record.conditions
    assert stored(place) == [result.record]
    again = broken(place, 0, KeyboardInterrupt(), slow)
    assert again.exit_code == 130 and again.record.verdict.outcome == "fail" and len(stored(place)) == 2


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (DeployError("the agent was killed."), DeployError, "the agent was killed."),
        (KeyboardInterrupt(), Interrupted, "interrupted."),
        (OSError(errno.ENOSPC, "No space left on device", "x"), DeployError, "No space left"),
        (RuntimeError("a bug"), RuntimeError, "RuntimeError: a bug."),
    ],
    ids=["killed", "interrupted", "full", "bug"],
)
def test_what_was_measured_before_a_check_broke_off_is_kept(place, error, raised, said):
    pin(place, network(place / "a.onnx"))
    with pytest.raises(raised):
        broken(place, 2, error, network(place / "b.onnx", layers=5))
    (record,) = stored(place)
    assert record.verdict.outcome == "inconclusive" and said in record.verdict.reason
    assert [stage.number for stage in record.verdict.stages] == [1] and record.absolute[CANDIDATE]["p50"] > 0
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        assert len(nights.sessions(1)) == 1 and len(nights.controls("simulated", record.machine)) == 1


def test_a_night_that_could_not_be_measured_is_a_night_of_the_history(place, capsys):
    pin(place, network(place / "a.onnx"))
    with pytest.raises(UndecidedError):
        broken(place, 1, UndecidedError("the device does not answer."))
    code, out, _ = run(capsys, "history", "--target", "simulated", "--html", "h.html")
    assert code == 0 and "inconclusive" in out and "1 inconclusive" in (place / "h.html").read_text()
    (told,) = json.loads(run(capsys, "history", "--json")[1])["checks"]
    assert told["reason"].endswith("the device does not answer.") and told["stages"] == []


def test_a_check_that_broke_off_before_it_looked_for_a_candidate_names_none(place, capsys, monkeypatch):
    pin(place, network(place / "a.onnx"))
    monkeypatch.setattr(Simulated, "fingerprint", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checked(place, None)
    assert stored(place)[0].candidate.name == "not known" and " not known " in run(capsys, "history")[1]


def test_the_first_check_says_that_no_control_was_kept_before_it(place, capsys):
    pin(place, network(place / "a.onnx"))
    assert "No control was kept before this check" in run(capsys, "check", "--target", "simulated")[1]
    assert "0 of 1 controls so far" in run(capsys, "check", "--target", "simulated")[1]


@pytest.mark.parametrize(
    "words",
    [("--paced", "1e9"), ("--paced", "61s"), ("--paced", "nan"), ("--sustained", "1e9"), ("--sustained", "inf")],
)
def test_a_period_or_a_time_out_of_all_measure_is_a_mistake(place, capsys, words):
    code, out, err = run(capsys, "measure", str(network(place / "a.onnx")), "--target", "simulated", *words)
    assert code == 2 and out == "" and "Traceback" not in err and err.startswith("Error: ")


def test_the_doctor_of_a_simulated_device_leases_nothing_and_what_is_fatal_is_exit_4(place, capsys):
    code, out, _ = run(capsys, "doctor", "--target", "simulated", "--json")
    assert code == 0 and [told["name"] for told in json.loads(out)["conditions"]] == ["device", "runtime", "providers"]
    words = ["doctor", "--target", "simulated", "--set", 'providers=["NoSuchProvider"]']
    code, out, _ = run(capsys, *words)
    assert code == 4 and "NoSuchProvider" in out and "set providers to some of" in out
    told = json.loads(run(capsys, *words, "--json")[1])
    assert told["exit_code"] == 4 and not told["conditions"][-1]["ok"]


def test_a_record_of_measure_is_longer_than_a_check_and_says_so(place, capsys):
    model = network(place / "a.onnx")
    told = json.loads(run(capsys, "measure", str(model), "--target", "simulated", "--json")[1])
    assert told["spec"]["block_min_ms"] == pytest.approx(1e4 / (8 * 60)) and told["spec"]["least_s"] == 10.0
    short = ("--set", "measure.least_s=0", "--json")
    told = json.loads(run(capsys, "measure", str(model), "--target", "simulated", *short)[1])
    assert told["spec"]["block_min_ms"] == 5.0
    pin(place, model)
    assert checked(place, None).sessions[0].spec.block_min_ms == 5.0


def test_measure_holds_the_first_of_several_networks_against_itself(place, capsys):
    models = [str(network(place / "a.onnx")), str(network(place / "a again.onnx", layers=5))]
    words = ["--target", "simulated", "--out", "s.json", "--html", "m.html", "--json"]
    told = json.loads(run(capsys, "measure", *models, *words)[1])
    assert list(told["models"]) == ["a", "a again", "a again again"] and told["again"] == "a again again"
    low, high = told["models"]["a again again"]["ratio_bounds"]
    assert low < 1.0 < high and high - low < 0.02 and told["models"]["a again"]["ratio"] > 1.2
    session = Session.from_json((place / "s.json").read_text())
    assert session.measurement("a again again").sha256 == session.measurement("a").sha256
    assert (
        "a again again" in (place / "m.html").read_text()
        and "a again again" in run(capsys, "measure", *models, *words[:2])[1]
    )
    for more in (models[:1], [*models, "--sustained", "2s"]):
        assert json.loads(run(capsys, "measure", *more, *words)[1])["again"] is None


class Updated(Simulated):
    """A simulated device whose kernel is another one from its second session on."""

    asked = 0

    def measure(self, *args, **kwargs) -> Session:
        session = super().measure(*args, **kwargs)
        self.asked += 1
        kernel = "Linux 1" if self.asked == 1 else "Linux 2"
        return replace(session, fingerprint=replace(session.fingerprint, kernel=kernel))


def test_a_device_that_changes_between_the_stages_is_no_verdict(place):
    pin(place, network(place / "a.onnx"))
    profile = load_profile("simulated")
    slow = network(place / "b.onnx", layers=5)
    request = nightly.CheckRequest(profile, slow, place / ".deploy", place / "runs")
    verdict = nightly.check(request, Updated(profile, place / ".deploy")).record.verdict
    assert verdict.outcome == "inconclusive" and "kernel was Linux 1, is Linux 2" in verdict.reason


def test_a_mistake_in_what_was_asked_is_no_night(place):
    pin(place, network(place / "a.onnx"))
    with pytest.raises(UsageError):
        checked(place, place / "nothing.onnx")
    assert stored(place) == []


def test_a_store_that_cannot_be_written_hides_no_verdict(place, capsys, monkeypatch):
    pin(place, network(place / "a.onnx"))

    monkeypatch.setattr(Nights, "add", no_room)
    slow = network(place / "b.onnx", layers=5)
    words = ["check", "--target", "simulated", "--candidate", str(slow), "--junit", "j.xml"]
    code, out, err = run(capsys, *words)
    assert code == 1 and out.startswith("fail: slower") and "the verdict stands, but it could not be kept" in err
    assert len(ET.parse(place / "j.xml").getroot().findall(".//failure")) == 1
    told = json.loads(run(capsys, *words, "--json")[1])
    assert (told["outcome"], told["number"], told["exit_code"]) == ("fail", None, 1)
    with pytest.raises(DeployError, match="the agent was killed"):
        broken(place, 1, DeployError("the agent was killed."))


@pytest.fixture
def small(place):
    """The `.deploy` of `place` on a file system of 8 MiB."""
    (place / ".deploy").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place / ".deploy")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place / ".deploy")], check=True)


def fill(folder: Path) -> None:
    """Leave no room on the file system of a folder."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


class Full(Simulated):
    """A simulated device whose disk is full as soon as anybody looks who it is."""

    def fingerprint(self):
        fill(self.state)
        return super().fingerprint()


def test_raw_samples_that_the_store_has_no_room_for_are_kept_beside_the_reports(small, capsys, monkeypatch):
    pin(small, network(small / "a.onnx"))
    keep = Nights.add

    def filled(nights: Nights, *what) -> int:
        fill(small / ".deploy")
        return keep(nights, *what)

    monkeypatch.setattr(Nights, "add", filled)
    code, out, err = run(capsys, "check", "--target", "simulated", "--junit", "reports/j.xml")
    assert code == 1 and out.startswith("pass: ") and "the verdict stands, but it could not be kept" in err
    assert "database or disk is full" in err and "free disk space" in err
    (aside,) = (small / "reports").glob("check-simulated-*.json")
    assert f"Its record and raw samples are in '{aside}'." in err
    told = json.loads(aside.read_text())
    (session,) = (Session.from_json(json.dumps(each)) for each in told["sessions"])
    record = from_table(told["record"])
    assert record.verdict.outcome == "pass"
    assert session.ratio(CANDIDATE, BASELINE) == record.verdict.stages[0].ratio
    (small / ".deploy" / "filler").unlink()
    assert stored(small) == []


def test_a_check_that_is_kept_without_its_change_points_is_not_said_to_be_lost(place, capsys, monkeypatch):
    pin(place, network(place / "a.onnx"))
    monkeypatch.setattr(Nights, "amend", no_room)
    code, out, err = run(capsys, "check", "--target", "simulated", "--junit", "j.xml")
    assert code == 1 and out.startswith("pass: ") and len(stored(place)) == 1 and not list(place.glob("*.json"))
    assert "check 1 is kept, but what past nights say beside it could not be kept: nights.sqlite cannot" in err


def test_without_reports_raw_samples_go_to_the_temporary_folder_and_nowhere_is_said(place, capsys, monkeypatch):
    pin(place, network(place / "a.onnx"))
    monkeypatch.setattr(Nights, "add", no_room)
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    (place / "tmp").mkdir()
    assert "Its record and raw samples are in" in run(capsys, "check", "--target", "simulated")[2]
    assert len(list((place / "tmp").glob("check-simulated-*.json"))) == 1
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    assert "Its raw samples are lost" in run(capsys, "check", "--target", "simulated")[2]


def no_room(*_: object) -> int:
    raise DeployError("nights.sqlite cannot be used: disk is full.", "free disk space.")


def test_a_disk_that_is_full_before_anything_is_measured_leaves_no_verdict_to_stand(small, capsys, monkeypatch):
    pin(small, network(small / "a.onnx"))
    monkeypatch.setattr("targets.simulated.target", Full)
    code, out, err = run(capsys, "check", "--target", "simulated", "--junit", "j.xml")
    assert code == 1 and out == "" and "No space left on device" in err and "verdict" not in err
    assert "warning: the record of this check could not be kept" in err
    assert ET.parse(small / "j.xml").getroot().get("errors") == "1" and not list(small.glob("*.json"))


# --- what is compared, and by what it is judged --------------------------------------------------------------------


def test_a_network_of_another_input_is_refused_with_both_shapes(place):
    pin(place, network(place / "a.onnx", size=16))
    with pytest.raises(UndecidedError, match=r"x 1x32x16x16 -> y 1x32x16x16, 'b' x 1x32x32x32") as refused:
        checked(place, network(place / "b.onnx", size=32))
    assert refused.value.exit_code == 4 and stored(place)[0].candidate.name == "b"


@pytest.mark.parametrize(
    ("own", "baselines", "candidates", "judged"),
    [
        (None, "8ms@p99", None, "8ms@p99"), (None, "8ms@p99", "7ms", "7ms"), ("6ms", "8ms@p99", "7ms", "6ms"),
        (None, "8ms", "0.5x", "8ms"), ("0.5x", "8ms", None, "8ms"), ("0.5x", None, "0.4x", None), (None,) * 4,
    ],
)  # fmt: skip
def test_the_profiles_budget_is_judged_else_that_of_the_build(own, baselines, candidates, judged):
    profile = load_profile("simulated", {"budget": own} if own else None)
    pins = (baseline.Pin("a", "1" * 64, "", baselines), baseline.Pin("b", "2" * 64, "", candidates))
    found = nightly.budget_of(profile, *pins)
    assert (None if found is None else str(found)) == judged


def test_the_budget_that_the_baseline_was_built_for_is_judged_in_the_stages(place):
    pinned, path = baseline.from_run(network(place / "a.onnx"))
    baseline.accept(place / ".deploy", "simulated", replace(pinned, budget="900ms@p90"), path)
    names = [tail.name for tail in checked(place, None).record.verdict.stages[0].tails]
    assert "budget 900ms@p90" in names


def test_the_instruction_set_of_a_new_kernel_is_told_and_does_not_stop_the_check(place):
    pinned, path = baseline.from_run(network(place / "a.onnx"))
    table = load_target(load_profile("simulated"), place / ".deploy").fingerprint().to_table()
    flags = {**table, "cpu_flags": "0" * 64}
    baseline.accept(place / ".deploy", "simulated", replace(pinned, fingerprint=flags), path)
    record = checked(place, None).record
    assert "cpu_flags" in record.changed and record.verdict.outcome == "pass"


def test_an_unreadable_record_of_another_profile_does_not_stop_a_check(place):
    pin(place, network(place / "a.onnx"))
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        nights.add(replace(checked(place, None).record, profile="another"), [])
    base = sqlite3.connect(place / ".deploy" / "nights.sqlite")
    base.execute("UPDATE night SET record='{' WHERE profile='another'")
    base.commit()
    base.close()
    assert checked(place, None).number == 3


def test_a_step_that_tonight_makes_certain_is_told_tonight_and_in_the_history(place, capsys):
    pin(place, network(place / "a.onnx"))
    first = checked(place, None).record
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        for night in range(18):
            scale = (0.5 if night < 14 else 1.0) * (1.0 + 0.001 * (night % 3))
            own = {arm: {"p50": scale * float(ms["p50"])} for arm, ms in first.absolute.items()}
            nights.add(replace(first, started=f"2026-11-{night + 1:02d}T03:00:00+00:00", absolute=own), [])
    base = sqlite3.connect(place / ".deploy" / "nights.sqlite")
    base.execute("PRAGMA foreign_keys=ON")
    for table, column in (("time", "night"), ("control", "night"), ("session", "night"), ("night", "id")):
        base.execute(f"DELETE FROM {table} WHERE {column}=1")
    base.commit()
    base.close()
    record = checked(place, None).record
    assert [found.at[:10] for found in record.changes] == ["2026-11-15"], "five nights on the new level, with tonight"
    assert stored(place)[-1].changes == record.changes
    _, out, _ = run(capsys, "history", "--html", "h.html")
    assert out.count("Advisory: p50 of") == 1 and "Advisory" not in run(capsys, "history", "--json")[1]
    assert "Change points, advisory" in (place / "h.html").read_text()
    assert len(json.loads(run(capsys, "history", "--json")[1])["changes"]) == 1


class Dated(Simulated):
    """A simulated device with the kernel that a file names."""

    def _fingerprint(self, spec):
        return replace(super()._fingerprint(spec), kernel=(self.state / "kernel").read_text())


def test_the_night_of_a_new_kernel_is_told_that_night_and_marked_in_the_history(place, capsys, monkeypatch):
    monkeypatch.setattr("targets.simulated.target", Dated)
    (place / ".deploy").mkdir()
    (place / ".deploy" / "kernel").write_text("Linux 1")
    pin(place, network(place / "a.onnx"))
    assert "Since the check before" not in run(capsys, "check", "--target", "simulated")[1]
    (place / ".deploy" / "kernel").write_text("Linux 2")
    _, out, _ = run(capsys, "check", "--target", "simulated", "--html", "p.html")
    said = "kernel was Linux 1, is Linux 2; the baseline's p50 was "
    assert f"Since the check before: {said}" in out and "over 1 night and is" in out
    assert said in html.unescape((place / "p.html").read_text())
    _, out, _ = run(capsys, "check", "--target", "simulated")
    assert "since the baseline was accepted: kernel" in out and "Since the check before" not in out
    _, out, _ = run(capsys, "history", "--html", "h.html")
    assert "\n2*  " in out and "1*" not in out and "3*" not in out
    assert f"Check 2*: {said}" in out and "over 2 nights since" in out
    assert said in html.unescape((place / "h.html").read_text()) and "device changed" in (place / "h.html").read_text()
    (told,) = json.loads(run(capsys, "history", "--last", "2", "--json")[1])["device_changes"]
    assert told["number"] == 2 and told["nights"] == [1, 2] and told["fields"]["kernel"]["now"] == "Linux 2"
    assert json.loads(run(capsys, "history", "--last", "1", "--json")[1])["device_changes"] == []


class Shaky(Simulated):
    """A simulated device on which one process of the candidate never becomes steady."""

    def measure(self, *args, **kwargs) -> Session:
        session = super().measure(*args, **kwargs)
        last = list(session.measurements)[-1]
        own = session.measurements[last]
        first = replace(own.processes[0], warmup=replace(own.processes[0].warmup, steady=False))
        shaky = replace(own, processes=(first, *own.processes[1:]))
        return replace(session, measurements={**session.measurements, last: shaky})


def test_a_network_that_never_became_steady_is_unstable_in_check_and_measure(place, capsys, monkeypatch):
    monkeypatch.setattr("targets.simulated.target", Shaky)
    model = network(place / "a.onnx")
    pin(place, model)
    _, out, _ = run(capsys, "check", "--target", "simulated")
    assert "Not in order: UNSTABLE: 1 of 8 processes of the candidate never became steady" in out
    _, out, _ = run(capsys, "measure", str(model), "--target", "simulated", "--html", "m.html")
    assert "UNSTABLE: 1 of 8 processes of 'a' never became steady." in out
    assert "UNSTABLE: 1 of 8" in (place / "m.html").read_text()


def test_two_profiles_of_one_name_that_share_a_baseline_are_told(place, capsys):
    model = str(network(place / "a.onnx"))
    for folder in ("x", "y"):
        (place / folder).mkdir()
        (place / folder / "arm.toml").write_text('extends = "simulated"\n')
    assert "takes the place" not in run(capsys, "baseline", "accept", model, "--target", "x/arm.toml")[2]
    assert "takes the place" not in run(capsys, "baseline", "accept", model, "--target", "x/arm.toml")[2]
    said = f"Not in order: the baseline was accepted with the profile '{place / 'x' / 'arm.toml'}'"
    assert said in run(capsys, "check", "--target", "y/arm.toml")[1]
    assert said not in run(capsys, "check", "--target", "x/arm.toml")[1]
    (pinned,) = json.loads(run(capsys, "baseline", "show", "--json")[1])["baselines"]
    assert pinned["file"] == str(place / "x" / "arm.toml")
    told = run(capsys, "baseline", "accept", model, "--target", "y/arm.toml")[2]
    assert f"takes the place of one accepted with another file, '{place / 'x' / 'arm.toml'}'" in told


def test_hints_name_the_target_as_it_was_typed(place, capsys):
    (place / "arm.toml").write_text('extends = "simulated"\n')
    _, _, err = run(capsys, "check", "--target", "./arm.toml")
    assert "deploy baseline accept RUN --target ./arm.toml" in err
    pinned = pin(place, network(place / "a.onnx"))
    baseline.artifact_of(place / ".deploy", pinned).unlink()
    _, _, err = run(capsys, "check", "--target", "simulated")
    assert "deploy baseline accept RUN --target simulated" in err
