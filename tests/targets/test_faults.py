"""Faults while rows of a table are measured and while engines are built, on a Jetson whose mode and clocks are set.

Whatever happens: nothing of ours runs on the board afterwards, mode and clocks are as they were, what had ended is not
lost, and no row is measured and no engine built a second time. The table is measured by ONNX Runtime, the engines are
built by the stand-in for TensorRT. Run as a program, this file is the client that is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from boards import TestBoard
from engine_sites import installed, make_site, write_relu
from test_jetson import Shown, orin  # noqa: F401  a fixture
from test_ssh import fill
from test_ssh_build import rows

from pipeline.latency.store import Store
from pipeline.latency.timing import ROUNDS, SESSIONS, Clock, key
from profiles.errors import DeployError
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness import lease
from targets.harness.transport import Board, Place
from targets.jetson import Jetson

ROOT = Path(__file__).parents[2]
HALF = 2
"""Models of each of the two jobs: the fault comes in the second one."""
MORE = 8
"""Models that make the second job longer than another client takes to arrive and to be told that it waits."""
WISH = 'jetson = { power_mode = "25W", clocks = "locked", telemetry_ms = 0 }'
RUNTIMES = {"rows": "ort", "build": "tensorrt"}
BUILD_S = 1.0


@dataclass
class Work:
    """Two jobs of a kind, one after the other, in a folder of models. kind: `rows` or `build`, as the agent has it."""

    kind: str
    folder: Path
    profile: Path
    targets: list[Jetson] = field(default_factory=list)

    def do(self) -> None:
        """What is put away already is not asked for again."""
        target = load_target(load_profile(str(self.profile)), self.folder / ".deploy")
        assert isinstance(target, Jetson)
        self.targets.append(target)
        models = sorted(self.folder.glob("*.onnx"))
        with target.resumable("a run"):
            for half in (models[:HALF], models[HALF:]):
                if self.kind == "build":
                    target.build_each({path: path.with_suffix(".plan") for path in half})
                    continue
                with Store(self.folder / ".deploy" / "latency.sqlite") as store:
                    Clock(target, store).ratios({key(path.read_bytes()): path.read_bytes() for path in half})

    def kept(self) -> dict[str, object]:
        """What is put away, by its key: block medians of a row and its session, when an engine was written."""
        if self.kind == "rows":
            return dict(rows(self.folder))
        return {path.parent.name: path.stat().st_mtime_ns for path in self.folder.glob(".deploy/engines/*/*.plan")}


@pytest.fixture(params=list(RUNTIMES))
def work(request, orin: Shown, tmp_path, conv) -> Iterator[Work]:  # noqa: F811
    """A work of each kind; in the end it hangs up, and the board's fixture looks at what is left there."""
    with installed(orin.board, make_site(tmp_path / "site", build_s=BUILD_S)):
        made = Work(request.param, tmp_path, profile_of(orin.board, request.param))
        write_models(made, conv, range(2 * HALF))
        yield made
        for target in made.targets:
            target.board.close()


def profile_of(board: TestBoard, kind: str, user: str = "ada") -> Path:
    runtime = RUNTIMES[kind]
    lines = (f'runtime = "{runtime}"', *(['precision = "fp32"'] if runtime == "ort" else []), WISH)
    return board.file(f"{kind}-{user}", *lines, extends="jetson-orin-nano", options={"User": user})


def write_models(work: Work, conv, numbers: range) -> None:
    for number in numbers:
        if work.kind == "build":
            write_relu(work.folder / f"{number:02}.onnx", f"net{number}")
        else:
            conv(f"{number:02}", channels=56 + 8 * (number % 2), size=80, layers=5 + number // 2)


class Jobs:
    """Jobs of this process. begun: id, kind, and whether it was found; ended: how often, by the hash of each model."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, str, bool]] = []
        self.ended: Counter[str] = Counter()

    def of(self, kind: str) -> list[tuple[str, bool]]:
        """Those of a kind."""
        return [(name, found) for name, verb, found in self.begun if verb == kind]


@pytest.fixture
def jobs(monkeypatch) -> Jobs:
    seen, started, run = Jobs(), Board._started, Board.run

    def spy(self, verb, job, limit_s, follow):
        try:
            return started(self, verb, job, limit_s, follow)
        finally:
            seen.begun.append((follow.id, verb, follow.found))

    def count(self, verb, job, *more, **named):
        done = run(self, verb, job, *more, **named)
        seen.ended.update(set(job["models"]))
        return done

    monkeypatch.setattr(Board, "_started", spy)
    monkeypatch.setattr(Board, "run", count)
    return seen


class During(threading.Thread):
    """Does something once the first job's results are put away and the second one is at work."""

    def __init__(self, work: Work, board: TestBoard, action: Callable[[], object]) -> None:
        super().__init__()
        self.work, self.board, self.action = work, board, action
        self.before: dict[str, object] = {}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            deadline = time.monotonic() + 300.0
            while len(self.work.kept()) < HALF or not self.board.running(self.work.kind):
                assert time.monotonic() < deadline, "the second job was not begun"
                time.sleep(0.05)
            self.before = self.work.kept()
            self.action()
        except Exception as error:  # noqa: BLE001  it is raised where it is joined
            self.error = error

    def ended(self) -> None:
        """Raise what went wrong in it."""
        self.join()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Fault:
    """Something that happens to a board. inject: does it; mend: undoes it, after the work ended or was refused.

    prepare: what has to be so before, as inject must be done before the work is.
    refused: how the error begins that ends the work, which is then asked for again. starts: jobs begun, of the kind.
    warned: what the log says.
    """

    inject: Callable[[TestBoard], object]
    mend: Callable[[TestBoard], object] = TestBoard.mend
    prepare: Callable[[TestBoard], object] = TestBoard.mend
    refused: str = ""
    starts: int = 2
    warned: str = ""


def cut(seconds: float) -> Callable[[TestBoard], None]:
    def inject(board: TestBoard) -> None:
        board.do("link", "down")
        time.sleep(seconds)
        board.do("link", "up")

    return inject


def kill(board: TestBoard) -> None:
    for process in board.running("job"):
        process.send_signal(signal.SIGKILL)


def crowd(board: TestBoard) -> None:
    """Fill the disk, and what is set free meanwhile too: an earlier job's files go when the next one is at work."""
    for number in range(40):
        with suppress(OSError):  # it is full already
            fill(board, 0, f"fill {number}")
        time.sleep(0.05)


def forget_key(board: TestBoard) -> None:
    new = (board.folder / "hostkey.pub").read_text().split()
    (board.folder / "known_hosts").write_text(f"[{board.address}]:2222 {new[0]} {new[1]}\n")


FAULTS = {
    "the link is down for 3 s": Fault(cut(3.0)),
    "the link is down for 60 s": Fault(cut(60.0)),
    "30 % of the packets are lost": Fault(lambda board: board.do("loss", "30")),
    "the link has 400 kbit/s": Fault(lambda board: board.do("rate", "400")),
    "the agent is killed": Fault(kill, starts=3, warned="'board' lost the measuring agent in the middle of a job"),
    "the disk is full": Fault(
        crowd,
        lambda board: [path.unlink() for path in (board.folder / "home").glob("fill*")],
        lambda board: fill(board, 24 << 20),
        refused="on 'board': cannot write ",
        starts=3,
    ),
    "the board is started anew": Fault(
        lambda board: board.do("reboot"), starts=3, warned="'board' was started anew in the middle of a job"
    ),
    "the host key changes": Fault(
        lambda board: board.do("newkey"),
        forget_key,
        refused="the host key of 'board' is not the known one, so nothing was sent to it.",
        starts=4,  # the job that was lost is found, and started again
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_happens_nothing_is_lost_and_nothing_is_done_twice(name, work, orin, jobs, caplog):  # noqa: F811
    fault = FAULTS[name]
    fault.prepare(orin.board)
    thread = During(work, orin.board, lambda: fault.inject(orin.board))
    try:
        if fault.refused:
            with pytest.raises(DeployError) as error:
                work.do()
            assert error.value.message.startswith(fault.refused)
        else:
            work.do()
    finally:
        thread.ended()
        fault.mend(orin.board)
    if fault.refused:
        assert work.kept() == thread.before
        work.do()
    after = work.kept()
    assert len(thread.before) == HALF and len(after) == 2 * HALF
    assert thread.before.items() <= after.items(), "what had ended is as it was"
    assert list(jobs.ended.values()) == [1] * 2 * HALF, "a row was measured again, or an engine built again"
    assert fault.warned in caplog.text and len(jobs.of(work.kind)) == fault.starts


@pytest.mark.slow
def test_a_second_client_waits_is_told_for_whom_and_does_its_own(work, orin, jobs, conv, caplog):  # noqa: F811
    write_models(work, conv, range(2 * HALF, 2 * HALF + MORE))
    (work.folder / "ben").mkdir()
    second = Work(work.kind, work.folder / "ben", profile_of(orin.board, work.kind, "ben"))
    for path in sorted(work.folder.glob("*.onnx"))[:HALF]:
        shutil.copy(path, second.folder)
    thread = During(work, orin.board, second.do)
    work.do()
    thread.ended()
    for target in second.targets:
        target.board.close()
    assert (len(work.kept()), len(second.kept())) == (2 * HALF + MORE, HALF) and len(jobs.of(work.kind)) == 3
    assert f"waiting for the device 'board', in use by {lease.owner()} (process " in caplog.text
    assert not list((orin.board.folder / "home" / "ben" / ".cache" / "edge-deploy" / "jobs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while the job is at work", "after the job has ended"])
def test_a_client_that_is_killed_finds_the_job_that_it_had_begun(when, work, orin, jobs):  # noqa: F811
    command = [sys.executable, __file__, work.kind, str(work.folder), str(work.profile)]
    client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    thread = During(work, orin.board, client.kill)
    client.wait()
    thread.ended()
    (left,) = orin.board.jobs()
    place = orin.board.cache / "jobs" / left
    found: list[bytes] = []
    if when == "after the job has ended":
        deadline = time.monotonic() + 120.0
        while not (place / "outcome.json").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found.append((place / "result").read_bytes())
    work.do()
    after = work.kept()
    assert jobs.of(work.kind) == [(left, True)], "the second half was asked for, and found; the first was not"
    assert list(jobs.ended.values()) == [1] * HALF
    assert len(after) == 2 * HALF and thread.before.items() <= after.items()
    new = [value for name, value in after.items() if name not in thread.before]
    for result in found:
        told = json.loads(zlib.decompress(result))
        if work.kind == "rows":
            ms = np.array(told["rows"]).reshape(SESSIONS, HALF, ROUNDS) * 1e-6
            assert sorted(ms[:, index].tobytes() for index in range(HALF)) == sorted(ms for ms, _ in new)
        else:
            hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(work.folder.glob("*.plan"))]
            assert hashes[HALF:] == [made["sha256"] for made in told["built"]]


def test_what_is_asked_under_another_name_or_of_another_device_is_another_job():
    board = Board(Place("board", load_profile("ssh").ssh))
    plain = [board._id(["rows", {"models": ["a"]}, "device"]) for _ in range(2)]
    assert len(set(plain)) == 2
    ids = []
    for name, device in (("one", "a"), ("one", "a"), ("one", "b"), ("two", "a")):
        with board.resumable(name):
            ids.append(board._id(["rows", {"models": ["a"]}, device]))
            assert board._id(["facts"]) != board._id(["facts"])
    assert ids[0] == ids[1] and len(set(ids)) == 3


if __name__ == "__main__":
    Work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])).do()
