"""The main job on a board behind sshd: GTSRB's ResNet-20, with a link that fails and a client that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boards import TestBoard

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "benchmarks" / "projects" / "resnet20_gtsrb"
DATA = Path(os.environ.get("EDGE_DATA") or ROOT.parent / "shared" / "data")
SHORT = ("[measure]", "accept_processes = 3", "accept_rounds = 20")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "EDGE_DATA": str(DATA), "EDGE_DATA_LIMIT": "2048"}


def deploy(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", *words, "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=pipe, stderr=pipe)


def ended(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}{err}"
    told: dict[str, object] = json.loads(out)
    return told


def lenient(folder: Path) -> Path:
    """The project, content with an accuracy that no recovery follows: what is shown here is the way there."""
    shutil.copytree(PROJECT, folder)
    toml = folder / "deploy.toml"
    text = toml.read_text().replace("max_drop = 0.01", "max_drop = 0.2")
    toml.write_text(text.replace('"../.."', json.dumps(str(ROOT / "benchmarks"))))
    return folder


def rows(root: Path) -> set[str]:
    """Hashes of the table's rows that are stored."""
    file = root / ".deploy" / "latency.sqlite"
    if not file.is_file():
        return set()
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as base:
        return {sha for (sha,) in base.execute("SELECT sha256 FROM row")}


def wait(process: subprocess.Popen[str], reached, what: str) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "gtsrb32").is_dir(), reason=f"no gtsrb32 in {DATA}; set EDGE_DATA to its folder")
def test_a_trained_network_is_built_on_a_board_though_the_link_fails_and_the_client_is_killed(
    board: TestBoard, tmp_path: Path
):
    """The link is down for three seconds while the table is measured, then the client dies; --resume ends it."""
    profile, project, run = board.file("robot-7", *SHORT), lenient(tmp_path / "net"), tmp_path / "run"
    words = ("--target", str(profile), "--project", str(project), "--budget", "0.5x", "--out", str(run))
    quick = ("--rounds", "2", "--set", "prune.calibration=128", "--set", "recover.epochs=0")
    first = deploy("build", *words, *quick, cwd=tmp_path)
    wait(first, lambda: board.running("job"), "the table was not begun")
    board.do("link", "down")
    time.sleep(3.0)
    board.do("link", "up")
    wait(first, lambda: (run / "run.json").is_file() and b'"values"' in (run / "run.json").read_bytes(), "no values")
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    before = rows(tmp_path)
    assert before

    told = ended(deploy("build", "--resume", "--out", str(run), cwd=tmp_path))
    assert told["verdict"] == "met"
    assert rows(tmp_path) == before, "a row was measured again under another name"
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    assert "robot-7" in json.dumps(manifest)
    assert ended(deploy("verify", str(run / "bundle"), cwd=tmp_path))
