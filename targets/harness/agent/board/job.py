"""A job that outlives its link."""

import fcntl
import glob
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import zlib
from typing import Any, Callable

from .arrange import Arrangement
from .base import END_S, AgentError, Table, program, read_text
from .files import sha256, write_file, write_result
from .lease import Lease, lock
from .machine import asked_facts, require_runtime, state


def locked(path: str) -> bool:
    """Whether a process holds this lock file. A job holds its own for as long as it lives, whatever ends it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def run_detached(folder: str) -> int:
    """Do the job of a folder: lease, run, spool. Its outcome is a file; it never depends on who is listening."""
    signal.signal(signal.SIGTERM, stop)
    with open(os.path.join(folder, "job.json"), "rb") as file:
        job = json.loads(file.read().decode())
    with open(os.path.join(folder, "events"), "ab", 0) as events:

        def note(table: Table) -> None:
            try:
                events.write(json.dumps(table).encode() + b"\n")
            except OSError:
                pass  # on a full disk the outcome says what there is to say

        try:
            outcome = leased(job, folder, note)
        except AgentError as error:
            outcome = error.to_table()
        except OSError as error:
            outcome = AgentError("disk", "cannot write results to %s: %s" % (folder, error.strerror)).to_table()
        except SystemExit:
            outcome = {"event": "stopped"}
    os.remove(os.path.join(folder, "reserve"))
    write_result(os.path.join(folder, "outcome.json"), outcome)
    return 0


def leased(job: Table, folder: str, note: Callable[[Table], None]) -> Table:
    """The outcome of a job, which holds the device meanwhile."""
    lease = Lease(job["device"])
    absence = Absence(folder, job["absent_s"])

    def waiting(holder: str) -> None:
        absence.check()
        note({"event": "waiting", "holder": holder})

    try:
        runtime = str(job.get("runtime") or "onnxruntime")
        require_runtime(runtime)
        lease.take(job["owner"], job["limit_s"], job["wait_s"], waiting)
        home = os.path.dirname(os.path.dirname(folder))
        arrangement = Arrangement(home, job.get("wish"), note)
        try:
            arrangement.begin(lease.file)
            seen: Table = {"event": "leased", "clock": time.monotonic()}
            seen["facts"] = asked_facts(runtime, job.get("providers") or ())
            if job["verb"] == "drive":
                seen["state"] = state(folder)
            note(seen)
            if job["verb"] == "facts":
                write_result(os.path.join(folder, "out.json"), {})
                return spool(folder, os.path.join(folder, "out.json"))
            outcome = attend(job, folder, note, absence)
            if job["verb"] == "build" and outcome["event"] == "done":
                for plan in glob.glob(os.path.join(folder, "engine-*.plan")):
                    os.replace(plan, os.path.join(home, "objects", sha256(plan)))
            return outcome
        finally:
            arrangement.end()
    finally:
        lease.give_back()


class Absence(object):
    """Ends a job that nobody has followed for so long: who asked for it is gone for good."""

    def __init__(self, folder: str, limit_s: float) -> None:
        self.path, self.limit_s = os.path.join(folder, "followed"), limit_s
        self.last, self.since = self.touched(), time.monotonic()

    def touched(self) -> float:
        """When it was followed last; compared with itself only, so that the clock may jump."""
        try:
            return os.stat(self.path).st_mtime
        except OSError:
            return 0.0

    def check(self) -> None:
        """Raise AgentError when it was too long."""
        last = self.touched()
        if last != self.last:
            self.last, self.since = last, time.monotonic()
        elif time.monotonic() - self.since > self.limit_s:
            raise AgentError("absent", "nobody has followed the job for %.0f s" % self.limit_s)


def attend(job: Table, folder: str, note: Callable[[Table], None], absence: Absence) -> Table:
    """Run the verb in a process of its own, pass on what it tells, and spool what it found."""
    work, out, said = (os.path.join(folder, name) for name in ("work.json", "out.json", "errors"))
    command = [sys.executable, program(), job["verb"], work, out]
    last: Table = {}
    end = time.monotonic() + job["limit_s"]
    with open(said, "wb") as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdout is not None
        pipe, buffer = child.stdout.fileno(), b""
        try:
            while last.get("event") not in ("done", "error"):
                if time.monotonic() > end:
                    raise AgentError("astray", "the job did not end within %.0f s" % job["limit_s"])
                absence.check()
                if not select.select([pipe], [], [], 1.0)[0]:
                    continue
                part = os.read(pipe, 1 << 16)
                if not part:
                    break
                lines = (buffer + part).split(b"\n")
                buffer = lines.pop()
                for line in lines:
                    try:
                        event = json.loads(line.decode())
                    except ValueError:
                        continue
                    if event["event"] == "progress":
                        note(event)
                    else:
                        last = event
            try:  # its result is whole, so it is kept whether or not a library hangs as the process ends
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                pass
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            child.stdout.close()
    if last.get("event") != "done":
        return last or {"event": "died", "code": child.returncode, "said": read_text(said)[-2000:]}
    return spool(folder, out)


def spool(folder: str, out: str) -> Table:
    """Keep a result, packed, until it is fetched; its outcome."""
    with open(out, "rb") as file:
        data = zlib.compress(file.read(), 6)
    path = os.path.join(folder, "result")
    write_file(path, data)
    os.remove(out)
    return {"event": "done", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def stop(number: int, frame: Any) -> None:
    """Turn a request to end into an exit that closes the workers on its way."""
    raise SystemExit(128 + number)
