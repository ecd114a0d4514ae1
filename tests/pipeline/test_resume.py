"""Builds that are killed, interrupted or run side by side: they go on, and equal journals give equal bundles."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_project import problems, request, write_project

from pipeline import cli
from pipeline.flow import BuildResult, build
from pipeline.run import BuildRequest, read_state

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
ROOT = Path(__file__).parents[2]
SETTINGS = ("--set", "recover.epochs=8", "--set", "recover.patience=8")
OVERRIDES = {"recover": {"epochs": 8, "patience": 8}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("resume") / "tiny")


@pytest.fixture(scope="module")
def whole(project: Path) -> BuildResult:
    """A build that nobody disturbed."""
    torch.set_num_threads(1)
    return build(request(project, project.parent / "whole", overrides=OVERRIDES))


# --- a build in a process of its own, and how far it is ---------------------------------------------------------------


def start(project: Path, root: Path, out: Path) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "pipeline.cli", "build", "--target", "simulated", "--project", str(project),
        "--budget", "0.6x", "--out", str(out), "--json", *SETTINGS,
    ]  # fmt: skip
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=ENVIRONMENT, text=True, stdout=pipe, stderr=pipe)


def stages(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "run.json").read_bytes())["stages"])
    except FileNotFoundError:
        return {}


def journalled(run: Path, name: str) -> int:
    """How many whole entries of a name the journal holds."""
    try:
        data = (run / "journal").read_bytes()
    except FileNotFoundError:
        return 0
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return sum(f'"name":"{name}'.encode() in line for line in lines)


def stop(process: subprocess.Popen[str], how: signal.Signals, reached: Callable[[], Any]) -> tuple[str, str]:
    """Wait until the build has come so far, send the signal, and give what it said."""
    deadline = time.monotonic() + 120
    while not reached():
        if process.poll() is not None:
            pytest.fail(f"the build ended by itself: {process.communicate()}")
        assert time.monotonic() < deadline, "the build did not come so far"
        time.sleep(0.002)
    process.send_signal(how)
    return process.communicate(timeout=60)


def resume(run: Path) -> BuildResult:
    return build(BuildRequest.again(run, Console(file=io.StringIO(), width=200)))


def files(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(bundle.iterdir())}


# --- killed ----------------------------------------------------------------------------------------------------------


MOMENTS: dict[str, Callable[[Path], Any]] = {
    "in-capture": lambda run: (run / "run.json").exists(),
    "in-values": lambda run: "tabulate" in stages(run),
    "in-search": lambda run: journalled(run, "loss") >= 3,
    "in-recover": lambda run: (run / "work" / "recover.checkpoint").exists(),
    "in-accept": lambda run: "evaluate pruned" in stages(run),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_that_was_killed_goes_on_to_a_bundle_that_verifies(
    project: Path, whole: BuildResult, tmp_path: Path, moment: str
):
    run = tmp_path / "run"
    process = start(project, tmp_path / "root", run)
    stop(process, signal.SIGKILL, lambda: MOMENTS[moment](run))
    assert process.returncode == -signal.SIGKILL
    assert read_state(run)["status"] == "running" and not (run / "bundle").exists()
    before = (run / "journal").read_bytes() if (run / "journal").exists() else b""
    result = resume(run)
    assert result.exit_code == 0 and result.bundle == run / "bundle" and problems(run / "bundle") == []
    assert read_state(run)["status"] == "done"
    after = (run / "journal").read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1]), "what was measured before the kill is kept"
    names = [(entry["name"], entry["key"]) for entry in map(json.loads, after.splitlines())]
    assert len(names) == len(set(names)), "nothing is measured twice"
    # the simulated device gives the same samples for the same files, so the killed build ends with the same network
    assert whole.bundle is not None
    for name in ("dense.onnx", "model.onnx", "plan.json", "pruned.safetensors", "sample.safetensors", "passes.json"):
        assert (run / "bundle" / name).read_bytes() == (whole.bundle / name).read_bytes(), name


def test_a_build_that_was_killed_with_its_journal_complete_measures_nothing_again(
    project: Path, whole: BuildResult, tmp_path: Path
):
    run = tmp_path / "run"
    process = start(project, tmp_path / "root", run)
    stop(process, signal.SIGKILL, lambda: journalled(run, "session accept"))
    assert process.returncode == -signal.SIGKILL
    journal = (run / "journal").read_bytes()
    assert not (run / "bundle").exists() and journal.endswith(b"\n")
    assert resume(run).exit_code == 0
    assert (run / "journal").read_bytes() == journal
    assert whole.bundle is not None
    one, two = files(run / "bundle"), files(whole.bundle)
    assert one.keys() == two.keys()
    timed = {"measurement.json", "manifest.json", "report.html"}
    assert {name for name in one if one[name] != two[name]} <= timed
    assert untimed(one["measurement.json"]) == untimed(two["measurement.json"])
    first, second = (json.loads(each["manifest.json"]) for each in (one, two))
    for name in timed:
        first["files"].pop(name, None), second["files"].pop(name, None)
    assert first == second


def untimed(session: bytes) -> Any:
    return {name: value for name, value in json.loads(session).items() if name not in ("started", "ended")}


def test_the_same_journal_gives_the_same_bundle_even_with_an_empty_cache(whole: BuildResult, tmp_path: Path):
    assert whole.bundle is not None
    finished, run = Path(whole.summary["run"]), tmp_path / "again"
    run.mkdir()
    for name in ("journal", "profile.json"):
        shutil.copy(finished / name, run / name)
    state = read_state(finished)
    del state["summary"], state["finished"]
    state |= {"status": "running", "stages": {}, "request": state["request"] | {"root": str(tmp_path / "root")}}
    (run / "run.json").write_text(json.dumps(state))
    result = resume(run)
    assert result.exit_code == 0 and result.bundle is not None
    assert (run / "journal").read_bytes() == (finished / "journal").read_bytes()
    one, two = files(result.bundle), files(whole.bundle)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


# --- interrupted, and side by side -----------------------------------------------------------------------------------


def test_control_c_says_how_to_go_on_and_that_command_ends_with_a_bundle(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    process = start(project, tmp_path / "root", run)
    out, err = stop(process, signal.SIGINT, lambda: "tabulate" in stages(run))
    told = json.loads(out)
    assert process.returncode == 130 == told["exit_code"] and "Traceback" not in err
    assert told["error"] == f"interrupted; what was done is kept in '{run}'."
    assert told["hint"] == f"deploy build --resume --out {run}"
    assert read_state(run)["status"] == "interrupted"
    monkeypatch.chdir(tmp_path / "root")
    with pytest.raises(SystemExit) as done:
        cli.main([*told["hint"].split()[1:], "--json"])
    assert done.value.code == 0
    bundle = Path(json.loads(capsys.readouterr().out)["bundle"])
    assert bundle == run / "bundle" and problems(bundle) == []


@pytest.mark.slow
def test_two_builds_at_once_share_one_cache_and_both_finish(project: Path, tmp_path: Path):
    runs = [tmp_path / "one", tmp_path / "two"]
    processes = [start(project, tmp_path / "root", run) for run in runs]
    for process, run in zip(processes, runs, strict=True):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        told = json.loads(out)
        assert told["bundle"] == str(run / "bundle") and problems(run / "bundle") == []
    one, two = (files(run / "bundle") for run in runs)
    assert one["model.onnx"] == two["model.onnx"] and one["plan.json"] == two["plan.json"]
    assert {path.name for path in (tmp_path / "root").iterdir()} == {".deploy"}
