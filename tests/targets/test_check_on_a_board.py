"""Whole nightly checks of networks that break, by the real agent on a board: a sentence, an exit code, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.nightly.history import Nights
from pipeline.nouns import CheckRecord

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0
KEYS = ("[check]", "screen_processes = 3", "confirm_processes = 3", "rounds = 5", "warmup_s = 0.1")


@pytest.fixture
def deploy(board, tmp_path):
    """Starts `deploy VERB … --target` of the board in a folder of its own."""
    target = str(board.file("robot-7", *KEYS))

    def started(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *words, "--target", target]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        env.pop("GITHUB_STEP_SUMMARY", None)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, cwd=tmp_path, env=env, **pipes)

    return started


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def with_nan(path: Path) -> Path:
    """The network with a weight that is no number."""
    model = onnx.load(path)
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, path)
    return path


def crashing(path: Path) -> Path:
    """The network with a last operator that reaches beyond its input, as only running it shows."""
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "scores"
    constants = {"nothing": np.zeros(1, np.float32), "beyond": np.full(1, 1e6, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["scores", "nothing"], ["zeros"]),
            helper.make_node("Add", ["zeros", "beyond"], ["far"]),
            helper.make_node("Cast", ["far"], ["places"], to=onnx.TensorProto.INT64),
            helper.make_node("GatherElements", ["scores", "places"], ["output"], axis=1),
        ]
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def only_night(folder: Path) -> CheckRecord:
    with Nights(folder / ".deploy" / "nights.sqlite") as nights:
        (record,) = nights.records()
    return record


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"), [(with_nan, "are NaN or infinite"), (crashing, "does not run: ")], ids=["nan", "crashing"]
)
def test_a_network_that_breaks_in_the_agent_is_told_kept_and_never_passes(deploy, conv, tmp_path, spoil, said):
    assert finished(deploy("baseline", "accept", str(conv("a"))))[0] == 0
    broken = str(spoil(conv("b")))
    code, out, err = finished(deploy("check", "--candidate", broken, "--junit", "j.xml", "--html", "p.html"))
    assert code == 1 and out == "" and said in err and "Traceback" not in err, err
    assert (
        ET.parse(tmp_path / "j.xml").getroot().get("errors") == "1"
        and "not measured" in (tmp_path / "p.html").read_text()
    )
    night = only_night(tmp_path)
    assert night.verdict.outcome == "inconclusive" and said in night.verdict.reason and night.candidate.name == "b"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "number", "said"),
    [
        ("drive", signal.SIGKILL, "the measuring agent ended by signal 9."),
        ("worker", signal.SIGSEGV, "the measuring process of '"),
    ],
)
def test_a_process_that_dies_in_a_check_is_told_and_the_night_is_kept(
    deploy, conv, board, tmp_path, word, number, said
):
    assert finished(deploy("baseline", "accept", str(conv("a"))))[0] == 0
    check = deploy("check", "--candidate", str(conv("b", layers=3)), "--junit", "j.xml", "--json")
    end = time.monotonic() + PATIENCE_S
    while not (agents := board.running(word)) and time.monotonic() < end and check.poll() is None:
        time.sleep(0.02)
    agents[0].send_signal(number)
    code, out, _ = finished(check)
    told = json.loads(out)
    assert code == 1 == told["exit_code"] and told["error"].startswith(said)
    assert ("crashed" in told["error"]) == (number == signal.SIGSEGV)
    assert ET.parse(tmp_path / "j.xml").getroot().get("errors") == "1"
    assert only_night(tmp_path).verdict.reason == told["error"]
