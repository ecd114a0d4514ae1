"""How a whole check ends, from the command line: every verdict's exit code, and what keeps one from being reached."""

from __future__ import annotations

import json
import math
import sqlite3
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from test_check import network, pin, run, stored

from pipeline.nightly.history import Nights
from targets.harness.compare import Control
from targets.harness.measurement import Session
from targets.simulated import Simulated

CHECK = ("check", "--target", "simulated", "--junit", "j.xml")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return tmp_path


def hair_slower(path: Path) -> Path:
    """The network with an Abs at its end: 1.4 % slower on the simulated device."""
    model = onnx.load(network(path))
    last = model.graph.node[-1]
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Abs", ["before"], ["y"], name="abs"))
    onnx.save(model, path)
    return path


def ended(place: Path) -> tuple[int, int]:
    """Failures and errors of the JUnit report."""
    root = ET.parse(place / "j.xml").getroot()
    return int(root.get("failures", -1)), int(root.get("errors", -1))


HAIR = ("check.fail=0.0001", "check.warn=0.0001", "check.fail_low=0.0001")
"""Tolerances that no stage is fine enough for."""


@pytest.mark.parametrize(
    ("candidate", "settings", "outcome", "code", "junit"),
    [
        (hair_slower, (), "warn", 0, (0, 0)),
        (lambda path: network(path, layers=3), (), "improved", 0, (0, 0)),
        (network, HAIR, "undecided", 4, (0, 1)),
        (network, ("check.control_sd=1e-9",), "inconclusive", 4, (0, 1)),
    ],
    ids=["warn", "improved", "undecided", "inconclusive"],
)
def test_every_verdict_has_its_exit_code(place, capsys, candidate, settings, outcome, code, junit):
    pin(place, network(place / "a.onnx"))
    words = [*CHECK, "--candidate", str(candidate(place / "b.onnx")), "--json"]
    for setting in settings:
        words += ["--set", setting]
    left, out, err = run(capsys, *words)
    told = json.loads(out)
    assert (left, told["outcome"], told["exit_code"], ended(place)) == (code, outcome, code, junit), told["reason"]
    assert err == "" and stored(place)[-1].verdict.outcome == outcome


class Disturbed(Simulated):
    """A simulated device on which something else disturbs a quarter of all blocks."""

    def measure(self, *args, **kwargs) -> Session:
        session = super().measure(*args, **kwargs)
        measured = {
            name: replace(m, processes=tuple(replace(p, flagged=np.arange(len(p.ns)) % 4 == 0) for p in m.processes))
            for name, m in session.measurements.items()
        }
        return replace(session, measurements=measured)


def test_a_contaminated_session_is_no_result_of_measure_and_no_verdict_of_check(place, capsys, monkeypatch):
    monkeypatch.setattr("targets.simulated.target", Disturbed)
    model = network(place / "a.onnx")
    code, out, err = run(capsys, "measure", str(model), "--target", "simulated")
    assert code == 4 and "protocol:" in out and "note: the session is contaminated: " in err
    assert run(capsys, "measure", str(model), "--target", "simulated", "--json")[0] == 4
    pin(place, model)
    code, out, _ = run(capsys, *CHECK)
    assert code == 4 and out.startswith("inconclusive: ") and "25 % of the blocks" in out and ended(place) == (0, 1)
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        assert len(nights.sessions(1)) == 2, "measured once more"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("runtime", "onnxruntime", "runtime was onnxruntime, is simulated"), ("cores", 64, "cores was 64, is 1")],
)
def test_a_baseline_of_another_runtime_or_device_is_exit_4_and_an_error_of_the_report(
    place, capsys, field, value, said
):
    pin(place, network(place / "a.onnx"))
    record = place / ".deploy" / "baselines" / "simulated.json"
    table = json.loads(record.read_text())
    table["baselines"][-1]["fingerprint"][field] = value
    record.write_text(json.dumps(table))
    code, out, err = run(capsys, *CHECK)
    assert code == 4 and out == "" and said in err and "deploy baseline accept RUN --target simulated" in err
    assert ended(place) == (0, 1) and said in (place / "j.xml").read_text()
    assert "inconclusive" in run(capsys, "history")[1]


def test_a_store_of_a_newer_version_is_left_as_it_is_by_check_and_history(place, capsys):
    pin(place, network(place / "a.onnx"))
    assert run(capsys, *CHECK)[0] == 0
    with sqlite3.connect(place / ".deploy" / "nights.sqlite") as base:
        base.execute("PRAGMA user_version=99")
    base.close()
    for words in (CHECK, ("history", "--html", "h.html")):
        code, out, err = run(capsys, *words)
        assert code == 1 and out == "" and "written by a newer version (schema 99, this one knows 2)" in err
        assert "update edge-deploy" in err
    assert ended(place) == (0, 1) and not (place / "h.html").exists()


def arm(shift: float, stage: int) -> Control:
    """A control arm that came out as a shift of log(A' / A), bounds 0.1 % on both sides."""
    low, high = shift - 0.001, shift + 0.001
    return Control(shift, low, high, shift, low, high, None, -math.inf, 8, stage)


def test_a_ledger_of_false_alarms_widens_what_a_whole_check_tolerates(place, capsys):
    pin(place, network(place / "a.onnx"))
    words = [*CHECK, "--candidate", str(hair_slower(place / "b.onnx"))]
    assert run(capsys, *words)[1].startswith("warn: ")
    (first,) = stored(place)
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        for night in range(40):
            shift = 0.03 if night % 4 == 0 else 0.0
            nights.add(first, [], [arm(shift, 1), arm(shift, 2)])
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.startswith("pass: ") and "the tolerances are widened" in out and "10 of 41 controls" in out
    record = stored(place)[-1]
    assert record.spec.warn > 5 * first.spec.warn and record.ledger.widened > 5
    steep = str(network(place / "c.onnx", layers=5))
    assert run(capsys, *CHECK, "--candidate", steep)[0] == 3, "a quarter slower fails all the same"


def test_a_paced_check_judges_missed_deadlines_from_end_to_end(place, capsys):
    pin(place, network(place / "a.onnx"))
    paced = ("--set", "measure.paced_ms=2.6", "--json")
    code, out, _ = run(capsys, *CHECK, *paced)
    same = json.loads(out)
    assert code == 0 and same["outcome"] == "pass" and "paced" in same["protocol"]
    slow = str(network(place / "b.onnx", layers=6))
    code, out, _ = run(capsys, *CHECK, "--candidate", slow, *paced)
    told = json.loads(out)
    assert code == 3 and "deadline misses" in told["reason"] and "slower in both stages" in told["reason"]
    for stage in told["stages"]:
        (misses,) = (tail for tail in stage["tails"] if tail["name"] == "deadline misses")
        assert misses["risen"] and misses["candidate"] > 0.5 > misses["baseline_again"]
    with Nights(place / ".deploy" / "nights.sqlite") as nights:
        assert {session.spec.paced_ms for session in nights.sessions(2)} == {2.6}
        (arms, _) = nights.controls("simulated", None)
        assert arms[0].timed and arms[0].missed is not None
