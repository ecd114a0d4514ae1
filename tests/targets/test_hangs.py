"""What hangs or goes away in the middle on a board: the device is given back all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import pytest

from targets.harness import pack
from targets.harness.agent.board import driver, inferring, job, lease, server
from targets.harness.agent.board.files import sha256
from targets.harness.agent.board.peer import Peer

INFERRER = f"""
import os, sys, time
sys.path.insert(0, {str(pack.FOLDER)!r})
from board.base import die_with_parent
from board.peer import Lost, Peer
die_with_parent()
peer = Peer(os.dup(0), os.dup(1), 60.0)
try:
    while True:
        request = peer.receive(60.0)
        time.sleep(0.6)
        peer.send({{"event": "arrays", "arrays": [], "bytes": 0, "pid": os.getpid()}})
except Lost:
    pass
"""
"""Infers for longer than the client is told that it is alive, and then waits for the next request, as the real one."""


def program(folder: Path, text: str) -> str:
    """A program in the agent's place."""
    folder.mkdir()
    (folder / "__main__.py").write_text(text)
    return str(folder)


class Client:
    """A server in a thread, and the client's end of its link."""

    def __init__(self, home: Path) -> None:
        (home / "objects").mkdir(parents=True)
        (home / "net").write_bytes(b"net")
        self.digest = sha256(str(home / "net"))
        (home / "objects" / self.digest).write_bytes(b"net")
        source, self.sink = os.pipe()
        self.source, sink = os.pipe()
        self.server = server.Server(str(home), Peer(source, sink, 5.0))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.file = os.fdopen(self.source, "rb")
        assert b'"hello"' in self.file.readline()

    def ask(self) -> None:
        """Have it infer."""
        request = {"do": "infer", "sha256": self.digest, "options": {}, "arrays": [], "bytes": 0}
        request |= {"device": "board", "owner": "eve@desk", "wait_s": 1.0}
        os.write(self.sink, json.dumps(request).encode() + b"\n")

    def answer(self) -> dict[str, object]:
        """What comes of it."""
        while (event := json.loads(self.file.readline()))["event"] == "alive":
            pass
        return dict(event)

    def hang_up(self) -> None:
        """Close both pipes, as a link that is lost."""
        self.file.close()
        os.close(self.sink)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client of a board whose inferring process is the one above."""
    monkeypatch.setattr(lease, "lease_folder", lambda: str(tmp_path))
    monkeypatch.setattr(server, "require_runtime", lambda *arguments, **others: None)
    monkeypatch.setattr(inferring, "ALIVE_S", 0.1)
    monkeypatch.setattr(inferring, "program", lambda: program(tmp_path / "agent", INFERRER))
    return Client(tmp_path / "home")


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return Path(f"/proc/{pid}").exists()


def test_a_link_that_is_lost_while_it_infers_leaves_neither_lease_nor_process(client):
    client.ask()
    first = client.answer()
    assert first["event"] == "arrays" and alive(first["pid"]) and lease.holder_of("board") is None
    client.ask()
    time.sleep(0.2)
    assert "eve@desk" in str(lease.holder_of("board"))
    client.hang_up()
    client.thread.join(8.0)
    assert not client.thread.is_alive()
    assert lease.holder_of("board") is None and not alive(first["pid"])


def test_the_process_ends_before_the_device_is_given_back_to_others(client, monkeypatch):
    seen = []
    real = lease.Lease.give_back

    def give_back(self):
        seen.append(client.server.inferring)
        real(self)

    monkeypatch.setattr(lease.Lease, "give_back", give_back)
    client.ask()
    time.sleep(0.2)
    client.hang_up()
    client.thread.join(8.0)
    assert seen == [None]


def test_a_process_that_does_not_end_is_ended_and_said_so(monkeypatch):
    """Its pipe is closed or silent, and yet it lives."""
    monkeypatch.setattr(driver, "END_S", 0.2)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        begun = time.monotonic()
        error = driver.died(process, errors, "net")
    assert time.monotonic() - begun < 10.0 and process.returncode == -9
    assert (error.kind, error.message, error.model) == ("lost", "answered no more and was ended", "net")


DONE = """
import json, sys, time
with open(sys.argv[3], "w") as file:
    file.write('{"rows": 7}')
print(json.dumps(EVENT))
sys.stdout.flush()
time.sleep(30)
"""


@pytest.mark.parametrize("event", ["done", "error"])
def test_a_job_that_hangs_as_its_process_ends_is_spooled_and_ended(tmp_path, monkeypatch, event):
    monkeypatch.setattr(job, "END_S", 0.3)
    told = {"event": event, "kind": "memory", "message": "out of memory"}
    monkeypatch.setattr(job, "program", lambda: program(tmp_path / "agent", DONE.replace("EVENT", repr(told))))
    children = []
    real = subprocess.Popen

    def popen(*arguments, **others):
        children.append(real(*arguments, **others))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    begun = time.monotonic()
    work = {"verb": "rows", "limit_s": 20.0}
    outcome = job.attend(work, str(tmp_path), lambda event: None, job.Absence(str(tmp_path), 20.0))
    assert time.monotonic() - begun < 15.0
    assert [child.returncode for child in children] == [-9]
    if event == "error":
        assert outcome == told
        return
    assert outcome["event"] == "done"
    assert json.loads(zlib.decompress((tmp_path / "result").read_bytes())) == {"rows": 7}
