"""One measurement at a time on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from profiles.errors import UndecidedError
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


def test_an_agent_that_outlived_its_holder_is_ended_by_the_next_one(tmp_path):
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with pytest.raises(KeyError), lease("board", 1, folder=tmp_path) as held:
        held.note_agent(orphan.pid)
        raise KeyError("the holder dies")
    with lease("board", 1, folder=tmp_path):
        assert orphan.wait(5) == -9


def test_a_process_that_only_has_the_orphans_number_is_left_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        table = {"owner": "x", "pid": 1, "expires": 0, "agent": other.pid, "agent_start": 1}
        (tmp_path / "edge-deploy-board.lock").write_text(json.dumps(table))
        with lease("board", 1, folder=tmp_path):
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_lease_file_with_rubbish_in_it_is_taken_over(tmp_path):
    (tmp_path / "edge-deploy-board.lock").write_text("{rubbish")
    with lease("board", 1, wait_s=0, folder=tmp_path) as held:
        assert json.loads(held.path.read_text())["owner"] == held.owner
