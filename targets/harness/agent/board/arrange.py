"""Power mode and clocks as a profile asks for them while a job runs, and as they were afterwards.

What was there is written down before anything is changed, so whatever ends the job, it is given back: by the job
itself; by a guard, a process of its own that sees the job die and keeps the lease until it is done; and where both are
gone, as after a power cut, by the next one that comes. A switch of the mode resets the clocks, so they come last.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Optional

from . import jetson
from .base import AgentError, Table, boot_id, program, read_text
from .files import write_file
from .system import run

TRIES = 3
RECORD, CLOCKS, LOCK = "arranged.json", "clocks.conf", "arranged.lock"


class Arrangement(object):
    """What a job wants of the board. wish: power_mode (a name or None) and lock (whether clocks are held).

    home: the agent's folder on the board; note: takes events for the client.
    """

    def __init__(self, home: str, wish: Optional[Table], note: Callable[[Table], None]) -> None:
        self.home, self.wish, self.note = home, wish or {}, note
        self.guard: Any = None

    def begin(self, lease: int) -> None:
        """Give back what a dead job left, then make it so. lease: its descriptor, which the guard keeps open too."""
        try:
            mend(self.home)
        except AgentError as error:
            text = "what a measurement that was cut off has changed cannot be given back: %s" % error.message
            raise AgentError("left", text, record=os.path.join(self.home, RECORD), **error.more) from None
        name, lock = self.wish.get("power_mode"), bool(self.wish.get("lock"))
        if not name and not lock:
            return
        if not jetson.there():
            raise AgentError("mode", "this board is no Jetson, so it has no power mode and no jetson_clocks")
        number = jetson.find_mode(name) if name else None
        before = jetson.power_mode()
        if number is not None and before[1] == number:
            number = None
        if number is None and not lock:
            return
        self.store(before)
        self.start_guard(lease)
        if number is not None:
            jetson.set_mode(number, str(name))
        if lock:
            code, said = run(["jetson_clocks"], as_root=True)
            if code or jetson.gpu_locked() is False:
                raise jetson.refused("jetson_clocks", code, said)

    def store(self, before: Any) -> None:
        """Write down what there is; the clocks too where only the mode changes, since that resets them."""
        clocks = os.path.join(self.home, CLOCKS)
        remove(clocks)
        code, said = run(["jetson_clocks", "--store", clocks], as_root=True)
        if code or not os.path.exists(clocks):
            raise jetson.refused("jetson_clocks --store", code, said)
        record = {"boot": boot_id(), "mode": before[0], "mode_id": before[1]}
        write_file(os.path.join(self.home, RECORD), json.dumps(record).encode())

    def start_guard(self, lease: int) -> None:
        """Start the process that gives everything back when this one dies."""
        command, pipe = [sys.executable, program(), "guard", self.home], subprocess.PIPE
        with open(os.devnull, "r+b") as nothing:
            self.guard = subprocess.Popen(
                command, stdin=pipe, stdout=nothing, stderr=nothing, start_new_session=True, pass_fds=(lease,)
            )

    def end(self) -> None:
        """Give everything back. What does not go is told, and tried again by the next job.

        Where this is cut off, by a signal, the guard is left alive: it sees this process end and goes on.
        """
        try:
            mend(self.home)
        except (AgentError, OSError) as error:
            self.note({"event": "left", "message": str(error)})
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()
            self.guard.stdin.close()


def left(home: str) -> Optional[Table]:
    """What a job has changed and not given back yet, or None."""
    try:
        table = json.loads(read_text(os.path.join(home, RECORD)) or "null")
    except ValueError:
        return None
    return table if isinstance(table, dict) else None


def mend(home: str) -> None:
    """Give back what the record says was there. Clocks do not survive a restart, so after one only the mode is set."""
    if left(home) is None:
        return
    file = os.open(os.path.join(home, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        record = left(home)
        if record is None:
            return
        number, clocks = record.get("mode_id"), os.path.join(home, CLOCKS)
        held = record.get("boot") == boot_id() and os.path.exists(clocks)
        if number is not None and jetson.power_mode()[1] != number:
            if held:  # a lock of one mode may lie above what the other allows
                run(["jetson_clocks", "--restore", clocks], as_root=True)
            jetson.set_mode(int(number), str(record.get("mode")))
        if held:
            restore(clocks)
        remove(clocks)
        remove(os.path.join(home, RECORD))
    finally:
        os.close(file)


def restore(clocks: str) -> None:
    """Have jetson_clocks set what it stored, and look whether it is so: it ends with 0 where a line of it failed."""
    said, wrong = "", ""
    for _ in range(TRIES):
        code, said = run(["jetson_clocks", "--restore", clocks], as_root=True)
        wrong = "" if code else differing(clocks)
        if not code and not wrong:
            return
        time.sleep(0.5)
    raise jetson.refused("jetson_clocks --restore", code, wrong or said)


def differing(clocks: str) -> str:
    """The first of the stored lowest clocks that is not so, in words, or ""."""
    for line in read_text(clocks).splitlines():
        path, _, value = line.partition(":")
        now = read_text(path)
        if path.endswith("min_freq") and now and now != value.strip():
            return "%s is %s, it was %s" % (path, now, value.strip())
    return ""


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def guard(home: str) -> int:
    """Wait until the job that started this process is gone, then give back what it changed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1 << 10):
        pass
    try:
        mend(home)
    except (AgentError, OSError):
        return 1  # the record stays for the next one
    return 0
