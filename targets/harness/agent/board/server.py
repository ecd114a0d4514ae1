"""The far end of a link: files, jobs and inference for a client."""

import errno
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import jetson
from .arrange import left
from .base import AgentError, Table, boot_id, program, read_number, read_text
from .files import sha256, write_file
from .inferring import Inferring
from .job import locked
from .lease import Lease, holder_of, lock
from .machine import apart, asked_facts, require_runtime, state
from .peer import ALIVE_S, MARK, Lost, Peer
from .placing import caching, object_path, placed

IDLE_S, FOLLOWED_S, LOOK_S = 120.0, 45.0, 0.25
"""A link's end without a request for so long closes itself, sooner while it follows a job; how often it looks at a
job."""
KEEP_S = 14 * 86400
"""Files and results that nobody asked for in this time are removed."""
TIMING_BYTES = 256 << 20
"""Timing caches that are kept, all together."""
SPARE_BYTES, RESERVE_BYTES = 8 << 20, 1 << 16
"""Free bytes on the disk that files sent there leave; what a job keeps for telling that the disk is full."""


class Server(object):
    """Answers a client's requests until it goes or falls silent. Everything it knows stands in its folder.

    objects/<sha256>: files; <sha256>.part: half-sent ones; jobs/<id>/: a job, its events, outcome and result.
    """

    def __init__(self, folder: str, peer: Peer) -> None:
        self.folder, self.peer = folder, peer
        self.objects, self.jobs = os.path.join(folder, "objects"), os.path.join(folder, "jobs")
        self.inferring: Optional[Inferring] = None
        self.started: List[Any] = []

    def run(self) -> None:
        """Serve."""
        for place in (self.objects, self.jobs):
            os.makedirs(place, mode=0o700, exist_ok=True)
        self.sweep()
        told = {"event": "hello", "python": "%d.%d" % sys.version_info[:2], "boot": boot_id(), "folder": self.folder}
        self.peer.write(MARK.encode())
        self.peer.send(told)
        try:
            while True:
                request = self.peer.receive(IDLE_S)
                try:
                    answer, data = self.answer(request)
                    self.peer.send(answer, data)
                except AgentError as error:
                    self.peer.send(error.to_table())
                except OSError as error:
                    text = "%s: %s" % (error.filename or self.folder, error.strerror)
                    kind = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "job"
                    self.peer.send(AgentError(kind, text, needed=0, free=self.free_bytes()).to_table())
        except Lost:
            pass
        finally:
            self.rest()

    def answer(self, request: Table) -> Tuple[Table, bytes]:
        """Do one request."""
        verb = str(request["do"])
        if verb == "infer":
            return self.infer(request)
        if verb == "fetch":
            return self.fetch(request)
        if verb == "get":
            return self.get(request)
        verbs: Dict[str, Callable[[Table], Table]] = {
            "facts": self.facts,
            "providers": self.providers,
            "state": self.state,
            "have": self.have, "put": self.put, "start": self.start, "follow": self.follow,
            "running": self.running, "stop": self.stop, "drop": self.drop, "ping": lambda _: {"event": "alive"},
        }  # fmt: skip
        if verb not in verbs:
            raise AgentError("job", "unknown request '%s'" % verb)
        return verbs[verb](request), b""

    def state(self, request: Table) -> Table:
        """How the device is."""
        seen = dict(state(self.folder), event="state", holder=holder_of(request["device"]), left=left(self.folder))
        if jetson.there():
            seen["root"] = jetson.may_be_root()
        return seen

    def facts(self, request: Table) -> Table:
        """Who the device is, with the runtime that is asked for."""
        runtime = str(request.get("runtime") or "onnxruntime")
        require_runtime(runtime)
        return dict(asked_facts(runtime, request.get("providers") or ()), event="facts")

    def providers(self, request: Table) -> Table:
        """Where the runtime can run, after it has run where it is asked to."""
        require_runtime("onnxruntime")
        return apart("onnxruntime", "providers", *request["asked"])

    def sweep(self) -> None:
        """Remove what nobody has asked for in a long time, and nothing that a running job names: a clock may jump.

        Other clients send, take and sweep files meanwhile: what is gone or does not go is left out.
        """
        swept, own = os.path.join(self.folder, "swept"), os.path.dirname(program())
        try:
            touch(swept)
            os.utime(own)
            oldest = os.stat(swept).st_mtime - KEEP_S
        except OSError:
            return  # a full disk is told to who wants to write
        at_work = [path for path in glob.glob(os.path.join(self.jobs, "*")) if locked(os.path.join(path, "lock"))]
        named = "".join(read_text(os.path.join(path, name)) for path in at_work for name in ("job.json", "work.json"))
        for kind in ("agent", "engines", "objects", "jobs"):
            for path in glob.glob(os.path.join(self.folder, kind, "*")):
                old = modified(path) < oldest and path != own and path not in at_work
                if old and os.path.basename(path) not in named:
                    remove(path)
        self.sweep_timing(oldest)

    def sweep_timing(self, oldest: float) -> None:
        """Remove timing caches that no build has written to since then, and the oldest of more than TIMING_BYTES."""
        total = 0
        for path in sorted(glob.glob(os.path.join(self.folder, "timing", "*")), key=modified, reverse=True):
            try:
                total += os.path.getsize(path)
            except OSError:
                continue
            if modified(path) < oldest or total > TIMING_BYTES:
                remove(path)

    def rest(self) -> None:
        """End the process that infers, so that nothing runs beside a measurement."""
        if self.inferring is not None:
            self.inferring.close()
            self.inferring = None

    # files

    def free_bytes(self) -> int:
        """Bytes that may still be written."""
        disk = os.statvfs(self.folder)
        return int(disk.f_bavail * disk.f_frsize)

    def have(self, request: Table) -> Table:
        """Of each file, how many bytes are there already, or None where it is whole; refuses where the rest cannot fit.

        A whole file is hashed again: a device that lost its power may have kept its name and not its content.
        """
        offsets: List[Optional[int]] = []
        needed = 0
        for digest, size in request["files"]:
            path = object_path(self.folder, digest)
            if os.path.isfile(path):
                if sha256(path) == digest:
                    os.utime(path)
                    offsets.append(None)
                    continue
                os.remove(path)
            part = path + ".part"
            there = os.path.getsize(part) if os.path.isfile(part) else 0
            offsets.append(min(there, size))
            needed += size - min(there, size)
        free = max(0, self.free_bytes() - SPARE_BYTES)
        if needed > free:
            raise AgentError("full", self.folder, needed=needed, free=free)
        return {"event": "offsets", "offsets": offsets}

    def put(self, request: Table) -> Table:
        """Take files from an offset on. What is written is fixed by the hash, so two links may write the same file."""
        failure: Optional[AgentError] = None
        for digest, size, offset in request["files"]:
            path = object_path(self.folder, digest)
            file = os.open(path + ".part", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for chunk in self.peer.chunks(size - offset):
                    try:
                        offset += 0 if failure else os.pwrite(file, chunk, offset)
                    except OSError as error:  # what is still under way must be read all the same
                        failure = AgentError("full", self.folder, needed=size - offset, free=self.free_bytes())
                        failure.message += ": %s" % error.strerror
            finally:
                os.close(file)
            if failure is None and not self.finish(digest, path):
                failure = AgentError("damaged", "the file that was sent has another SHA-256", digest)
        if failure is not None:
            raise failure
        return {"event": "put"}

    def finish(self, digest: str, path: str) -> bool:
        """Give a sent file its name, if it is what it should be."""
        part = path + ".part"
        if os.path.isfile(part):
            if sha256(part) != digest:
                os.remove(part)
                return False
            os.replace(part, path)
        return os.path.isfile(path)

    # jobs

    def job_folder(self, name: str) -> str:
        """Where a job stands."""
        if not re.match("^[0-9a-f]{8,64}$", name):
            raise AgentError("job", "'%s' is no id" % name)
        return os.path.join(self.jobs, name)

    def start(self, request: Table) -> Table:
        """Start a job, or find it started: it runs in a session of its own and outlives this process."""
        self.rest()
        folder = self.job_folder(request["id"])
        os.makedirs(folder, mode=0o700, exist_ok=True)
        file = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found = os.path.exists(os.path.join(folder, "job.json"))
            if lock(file) and not found:
                settings = {key: value for key, value in request.items() if key not in ("do", "work")}
                settings["agent"] = program()
                write_file(os.path.join(folder, "reserve"), bytes(RESERVE_BYTES))
                work = placed(request["work"], self.folder, folder)
                write_file(os.path.join(folder, "work.json"), json.dumps(work).encode())
                write_file(os.path.join(folder, "job.json"), json.dumps(settings).encode())
                command = [sys.executable, program(), "job", folder]
                with open(os.path.join(folder, "trace"), "wb") as trace, open(os.devnull, "r+b") as nothing:
                    process = subprocess.Popen(
                        command, stdin=nothing, stdout=nothing, stderr=trace, start_new_session=True, pass_fds=(file,)
                    )
                self.started.append(process)
                write_file(os.path.join(folder, "pid"), str(process.pid).encode())
        finally:
            os.close(file)
        return {"event": "started", "boot": boot_id(), "found": found}

    def running(self, request: Table) -> Table:
        """Ids that begin so, of jobs that have not ended."""
        paths = glob.glob(os.path.join(self.jobs, request["begin"] + "*"))
        return {"event": "running", "ids": [os.path.basename(p) for p in paths if locked(os.path.join(p, "lock"))]}

    def follow(self, request: Table) -> Table:
        """Tell a job's events from an offset on until it ends; the last one is its outcome, or that it is gone.

        The client answers with pings; without them the link is given up, and the job goes on.
        """
        folder = self.job_folder(request["id"])
        at, told, heard = int(request["offset"]), time.monotonic(), time.monotonic()
        while True:
            for process in self.started:
                process.poll()
            alive = locked(os.path.join(folder, "lock"))
            for line in new_lines(os.path.join(folder, "events"), at):
                at += len(line)
                told = time.monotonic()
                event = json.loads(line.decode())
                if "clock" in event:  # which begins again where the board was started anew
                    event["ago"] = max(0.0, time.monotonic() - event["clock"])
                self.peer.send(dict(event, at=at))
            outcome = read_text(os.path.join(folder, "outcome.json"))
            if outcome:
                return {"event": "finished", "outcome": json.loads(outcome)}
            if not alive:
                return {"event": "gone", "boot": boot_id(), "said": read_text(os.path.join(folder, "trace"))[-2000:]}
            now = time.monotonic()
            if now - told >= ALIVE_S:
                told = now
                self.peer.send({"event": "alive"})
            if self.peer.ready(LOOK_S):
                heard = now
                if self.peer.receive(self.peer.stall_s)["do"] == "stop":
                    return self.stop(request)
                touch(os.path.join(folder, "followed"))
            elif now - heard > FOLLOWED_S:
                raise Lost("was silent")

    def stop(self, request: Table) -> Table:
        """End a job and everything that it started."""
        folder = self.job_folder(request["id"])
        held, pid = os.path.join(folder, "lock"), read_number(os.path.join(folder, "pid"))
        for number in (signal.SIGTERM, signal.SIGKILL):
            if pid is None or not locked(held):
                break
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                break
            end = time.monotonic() + 5.0
            while locked(held) and time.monotonic() < end:
                time.sleep(0.05)
        for process in self.started:
            process.poll()
        return {"event": "stopped"}

    def fetch(self, request: Table) -> Tuple[Table, bytes]:
        """A part of a job's result."""
        with open(os.path.join(self.job_folder(request["id"]), "result"), "rb") as file:
            file.seek(request["offset"])
            data = file.read(1 << 18)
        return {"event": "part", "bytes": len(data)}, data

    def get(self, request: Table) -> Tuple[Table, bytes]:
        """A part of a file that lies here, as of an engine that was built here."""
        with open(object_path(self.folder, request["sha256"]), "rb") as file:
            file.seek(request["offset"])
            data = file.read(1 << 18)
        return {"event": "part", "bytes": len(data)}, data

    def drop(self, request: Table) -> Table:
        """Forget a job that has ended."""
        folder = self.job_folder(request["id"])
        end = time.monotonic() + 5.0
        while locked(os.path.join(folder, "lock")) and time.monotonic() < end:
            time.sleep(0.02)
        for process in self.started:
            process.poll()
        shutil.rmtree(folder, ignore_errors=True)
        return {"event": "dropped"}

    # inference

    def infer(self, request: Table) -> Tuple[Table, bytes]:
        """Outputs of a file for arrays, computed in a process of its own while the device is held."""
        data = b"".join(self.peer.chunks(request["bytes"]))
        request["path"] = object_path(self.folder, request["sha256"])
        request["options"] = caching(request["options"], self.folder)
        if not os.path.isfile(request["path"]):
            raise AgentError("missing", "the file is not there", request["sha256"])
        require_runtime(str(request["options"].get("library") or "onnxruntime"), arrays=True)
        lease = Lease(request["device"])
        try:
            lease.take(request["owner"], 60.0, request["wait_s"], lambda holder: self.peer.send(
                {"event": "waiting", "holder": holder}))  # fmt: skip
            if self.inferring is None:
                self.inferring = Inferring()
            try:
                return self.inferring.ask(request, data, lambda: self.peer.send({"event": "alive"}))
            except AgentError as error:
                if error.kind in ("killed", "lost"):
                    self.rest()
                raise
            except Lost:  # the client is gone: nothing may compute on a device that is given back
                self.rest()
                raise
        finally:
            lease.give_back()


def modified(path: str) -> float:
    """When a file was written to last; 0 where it is gone."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def remove(path: str) -> None:
    """Remove a file or a folder, as far as that goes."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        os.remove(path)
    except OSError:
        pass


def touch(path: str) -> None:
    """Set a file's time to now; it is made where it is missing."""
    with open(path, "ab"):
        pass
    os.utime(path)


def new_lines(path: str, offset: int) -> List[bytes]:
    """Whole lines of a growing file from an offset on."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return [line for line in file.readlines() if line.endswith(b"\n")]
    except OSError:
        return []


def serve(folder: str) -> int:
    """The far end of a link."""
    answers = os.dup(1)
    os.dup2(2, 1)
    Server(os.path.abspath(folder), Peer(0, answers, 30.0)).run()
    return 0
