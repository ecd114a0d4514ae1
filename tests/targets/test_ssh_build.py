"""The main job on a board behind sshd: GTSRB's ResNet-20, with a link that fails and a client that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
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
    out, err = process.communicate(timeout=1200)
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


def rows(root: Path) -> dict[str, tuple[bytes, int]]:
    """Rows of tables that are stored, by hash: block medians, and the session that they were taken in."""
    file = root / ".deploy" / "latency.sqlite"
    if not file.is_file():
        return {}
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
        try:
            return {sha: (ms, session) for sha, ms, session in base.execute("SELECT sha256, ms, session FROM row")}
        except sqlite3.OperationalError:  # it is just being made
            return {}


def sessions(root: Path) -> int:
    """Sessions of rows that are stored, those included of which no row was kept."""
    with closing(sqlite3.connect(f"file:{root / '.deploy' / 'latency.sqlite'}?mode=ro", uri=True)) as base:
        return int(base.execute("SELECT count(*) FROM session").fetchone()[0])


class Measured(threading.Thread):
    """Looks on, until the block ends, which processes on a board measure rows: `pids`."""

    def __init__(self, board: TestBoard) -> None:
        super().__init__()
        self.place, self.over, self.pids = board.cache / "jobs", threading.Event(), set[str]()

    def run(self) -> None:
        while not self.over.wait(0.02):
            for job in self.place.glob("*"):
                with suppress(OSError, ValueError):  # it is just being made, or dropped
                    if json.loads((job / "job.json").read_text())["verb"] == "rows":
                        self.pids.add((job / "pid").read_text())

    def __enter__(self) -> Measured:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def wait(process: subprocess.Popen[str], reached, what: str) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (DATA / "gtsrb32").is_dir(), reason=f"no gtsrb32 in {DATA}; set EDGE_DATA to its folder")
def test_a_trained_network_is_built_on_a_board_though_the_link_fails_and_the_client_is_killed(
    board: TestBoard, tmp_path: Path
):
    """The link is down for three seconds while the table is measured, and the client dies in it; --resume ends it.

    What it had begun on the board is gone on with: there are as many processes that measured as there are sessions.
    """
    profile, project, run = board.file("robot-7", *SHORT), lenient(tmp_path / "net"), tmp_path / "run"
    words = ("--target", str(profile), "--project", str(project), "--budget", "0.5x", "--out", str(run))
    quick = ("--rounds", "2", "--set", "prune.calibration=128", "--set", "recover.epochs=0")
    with Measured(board) as measured:
        first = deploy("build", *words, *quick, cwd=tmp_path)
        wait(first, lambda: board.running("rows"), "the table was not begun")
        board.do("link", "down")
        time.sleep(3.0)
        board.do("link", "up")
        wait(first, lambda: rows(tmp_path) and board.running("rows"), "the table's second job was not begun")
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
        before = rows(tmp_path)
        assert b'"tabulate"' not in (run / "run.json").read_bytes(), "the table was done already"

        told = ended(deploy("build", "--resume", "--out", str(run), cwd=tmp_path))
    assert told["verdict"] == "met"
    after = rows(tmp_path)
    assert before.items() < after.items(), "a row that was there was measured again"
    assert len(measured.pids) == sessions(tmp_path) == len({session for _, session in after.values()})
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    assert "robot-7" in json.dumps(manifest)
    assert ended(deploy("verify", str(run / "bundle"), cwd=tmp_path))
