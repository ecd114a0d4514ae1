"""One measurement at a time on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from profiles.errors import DeployError, UndecidedError
from targets.harness import lease as leases
from targets.harness.agent.board import job as job_part
from targets.harness.agent.board import lease as board
from targets.harness.agent.board.base import AgentError
from targets.harness.agent.board.job import leased
from targets.harness.agent.board.lease import start_ticks
from targets.harness.lease import holder, lease

ROOT = Path(__file__).parents[2]
HOLD = "import sys,time; from pathlib import Path; from targets.harness.lease import lease\n"
HOLD += "with lease('board', 60, folder=Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process of its own that holds the lease of 'board'."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_who_waits_in_vain_is_told_who_holds_the_lease(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(UndecidedError) as error, lease("board", 1, wait_s=0.3, folder=tmp_path):
            pass
    finally:
        end(holder)
    text = str(error.value)
    assert text.startswith("the device 'board' is in use by ")
    assert f"(process {holder.pid}, expected until " in text
    assert text.endswith(
        f"waited 0 s.\nwait until it is free, or end that process; the lease is {tmp_path}/edge-deploy-board.lock."
    )


def test_a_killed_holder_leaves_no_lease_behind(tmp_path):
    end(hold(tmp_path))
    with lease("board", 1, wait_s=1, folder=tmp_path) as held:
        assert json.loads(held.path.read_text())["pid"] == os.getpid()


def test_who_holds_the_lease_is_told_without_waiting(tmp_path):
    assert holder("board", tmp_path) is None
    process = hold(tmp_path)
    try:
        told = holder("board", tmp_path)
    finally:
        end(process)
    assert told is not None and f"(process {process.pid}, expected until " in told
    assert holder("board", tmp_path) is None


def test_a_lease_can_be_taken_right_after_it_was_looked_at(tmp_path):
    with lease("board", 1, folder=tmp_path):
        pass
    assert holder("board", tmp_path) is None
    with lease("board", 1, wait_s=0, folder=tmp_path):
        assert holder("other", tmp_path) is None


def test_a_waiting_thread_gets_the_lease_when_it_is_given_back(tmp_path):
    got = []

    def wait() -> None:
        with lease("board", 1, wait_s=5, folder=tmp_path):
            got.append(time.monotonic())

    with lease("board", 1, folder=tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.4)
        given_back = time.monotonic()
        assert not got
    thread.join(5)
    assert got and got[0] >= given_back


def test_two_devices_have_two_leases(tmp_path):
    with lease("one", 1, folder=tmp_path), lease("two", 1, wait_s=0, folder=tmp_path):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_lease_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), lease("board", 1, folder=tmp_path):
        raise KeyError("x")
    with lease("board", 1, wait_s=0, folder=tmp_path):
        pass


def agent_of(folder: Path, name: str = "agent.pyz") -> subprocess.Popen[bytes]:
    """A process that leads its own group and runs a script of this name."""
    script = folder / name
    script.write_text("import time; print('up', flush=True); time.sleep(60)")
    command = [sys.executable, str(script), "drive", "job.json", "out.json"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.stdout.close()
    return process


def test_an_agent_that_outlived_its_holder_is_ended_by_the_next_one(tmp_path):
    orphan = agent_of(tmp_path)
    with pytest.raises(KeyError), lease("board", 1, folder=tmp_path) as held:
        held.note_agent(orphan.pid)
        raise KeyError("the holder dies")
    with lease("board", 1, folder=tmp_path):
        assert orphan.wait(5) == -9


def spares(folder: Path, process: subprocess.Popen[bytes], start: int) -> bool:
    """Whether the process lives on when a lease is taken whose file names it as the agent."""
    table = {"owner": "x", "pid": 1, "expires": 0, "agent": process.pid, "agent_start": start}
    (folder / "edge-deploy-board.lock").write_text(json.dumps(table))
    try:
        with lease("board", 1, folder=folder), suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
        return process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_process_that_only_has_the_orphans_number_is_left_alone(tmp_path):
    assert spares(tmp_path, agent_of(tmp_path), 1)


def test_a_process_that_is_no_agent_is_left_alone_whatever_the_file_says(tmp_path):
    other = agent_of(tmp_path, "database.py")
    assert spares(tmp_path, other, start_ticks(other.pid))
    named = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "agent.pyz"], start_new_session=True)
    assert spares(tmp_path, named, start_ticks(named.pid))


def test_an_agent_of_another_user_is_left_alone(tmp_path, monkeypatch):
    other = agent_of(tmp_path)
    monkeypatch.setattr(leases.os, "geteuid", lambda: os.getuid() + 1)
    assert spares(tmp_path, other, start_ticks(other.pid))


JUNK = [
    '{"owner": "bob"}', '{"owner": "bob", "expires": 1e20}', '{"owner": "bob", "expires": 1e999, "pid": "x"}',
    '{"owner": "bob", "expires": NaN}', '{"owner": ["x"], "pid": -1}', '{"agent": null}', '{"agent": "x"}',
    '{"agent": true, "agent_start": 1}', '{"agent": 1e99, "agent_start": []}', '{"agent": 99999999999999999999}',
    "[]", "null", "7", "[" * 4000, "\x00\x00", '{"owner": "\\u001b[2Jbob", "expires": 5}',
]  # fmt: skip


@pytest.mark.parametrize("text", JUNK)
def test_junk_in_the_file_stops_nobody_and_is_told_as_far_as_it_makes_sense(tmp_path, text):
    path = tmp_path / "edge-deploy-board.lock"
    path.write_text(text)
    with lease("board", 1, wait_s=0, folder=tmp_path):
        path.write_text(text)
        told = holder("board", tmp_path)
        with pytest.raises(UndecidedError) as error, lease("board", 1, wait_s=0, folder=tmp_path):
            pass
    assert told is not None and told.isprintable()
    assert told.startswith("bob" if '"bob"' in text else "another process")
    assert f"is in use by {told}; waited 0 s." in str(error.value)
    with lease("board", 1, wait_s=0, folder=tmp_path):
        pass


def test_a_link_in_the_place_of_the_file_is_refused_and_what_it_points_at_is_kept(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "edge-deploy-board.lock").symlink_to(victim)
    with pytest.raises(DeployError) as error, lease("board", 1, wait_s=0, folder=tmp_path):
        pass
    assert str(error.value).startswith(f"cannot open the lease file '{tmp_path}/edge-deploy-board.lock': ")
    assert victim.read_text() == "precious"
    assert holder("board", tmp_path) is None


def test_who_waits_is_told_once_for_whom(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(leases, "PATIENT_S", 0.1)
    with (
        lease("board", 60, folder=tmp_path),
        pytest.raises(UndecidedError),
        lease("board", 1, wait_s=0.8, folder=tmp_path),
    ):
        pass
    (told,) = caplog.records
    assert told.levelname == "WARNING" and told.name.startswith("targets.")
    assert told.getMessage().startswith("waiting for the device 'board', in use by ")
    assert f"(process {os.getpid()}, expected until " in told.getMessage()


def test_who_hardly_waits_is_not_told(tmp_path, caplog):
    with lease("board", 1, folder=tmp_path), pytest.raises(UndecidedError), lease("board", 1, 0.3, folder=tmp_path):
        pass
    assert caplog.records == []


def test_a_lease_file_with_rubbish_in_it_is_taken_over(tmp_path):
    (tmp_path / "edge-deploy-board.lock").write_text("{rubbish")
    with lease("board", 1, wait_s=0, folder=tmp_path) as held:
        assert json.loads(held.path.read_text())["owner"] == held.owner


def test_who_waits_in_vain_on_a_board_leaves_the_holders_name_and_its_agent(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "lease_folder", lambda: str(tmp_path))
    with lease("board", 60, folder=tmp_path) as held:
        held.note_agent(os.getpid())
        before = held.path.read_text()
        for wait_s in (0.0, None):
            waiting = board.Lease("board")
            if wait_s is not None:
                with pytest.raises(AgentError, match=f"process {os.getpid()}"):
                    waiting.take("eve@desk", 1.0, wait_s, lambda holder: None)
            waiting.give_back()
            assert held.path.read_text() == before and '"agent"' in before
    last = board.Lease("board")
    last.take("eve@desk", 1.0, 1.0, lambda holder: None)
    last.give_back()
    assert json.loads((tmp_path / "edge-deploy-board.lock").read_text()) == {}


@pytest.mark.parametrize("verb", ["drive", "rows", "layers", "build"])
def test_whatever_is_kept_by_a_fingerprint_says_what_the_device_was_while_it_was_held(tmp_path, monkeypatch, verb):
    monkeypatch.setattr(board, "lease_folder", lambda: str(tmp_path))
    held: list[bool] = []

    def facts(*asked):
        held.append(board.holder_of("board") is not None)
        return {"power_mode": "25W"}

    monkeypatch.setattr(job_part, "asked_facts", facts)
    monkeypatch.setattr(job_part, "state", lambda folder: {"load": 0.0})
    monkeypatch.setattr(job_part, "attend", lambda *arguments: {"event": "done"})
    job = {"device": "board", "owner": "eve@desk", "limit_s": 1.0, "wait_s": 1.0, "absent_s": 60.0, "verb": verb}
    seen: list[dict[str, object]] = []
    leased(job, str(tmp_path / "jobs" / "1"), seen.append)
    (told,) = seen
    assert told["facts"] == {"power_mode": "25W"} and held == [True]
    assert ("state" in told) == (verb == "drive")


@pytest.mark.parametrize("why", ["busy", "runtime", "absent"])
def test_a_job_that_never_got_the_lease_leaves_the_holders_name(tmp_path, monkeypatch, why):
    """Its runtime is missing, it waited in vain, or nobody follows it any more."""
    monkeypatch.setattr(board, "lease_folder", lambda: str(tmp_path))
    job = {"device": "board", "owner": "eve@desk", "limit_s": 1.0, "wait_s": 60.0, "absent_s": 60.0, "verb": "rows"}
    ending = {"busy": {"wait_s": 0.0}, "absent": {"absent_s": 0.0}}.get(why, {})
    if why == "runtime":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with lease("board", 60, folder=tmp_path) as held:
        before = held.path.read_text()
        with pytest.raises(AgentError) as error:
            leased({**job, **ending}, str(tmp_path), lambda event: None)
        assert (error.value.kind, held.path.read_text()) == (why, before)
