"""The way to a board: one ssh process, the agent at its far end, JSON lines and raw bytes between.

A `Link` is one connection. It pushes the agent, one zip named by its hash, where it is not there yet. A `Board` keeps
a link and makes a new one when it is lost: files go on where they stopped, jobs and results are asked for by their id,
so whatever is done twice has its effect once. No timing crosses a link (measurement.md, section 3, rule 10).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shlex
import subprocess
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import SshSpec
from targets.harness import bench, lease, pack
from targets.harness.agent.board.files import sha256 as agent_sha256
from targets.harness.agent.board.peer import MARK, Lost, Peer
from targets.harness.device import Look

HELLO_S = 60.0
"""For a connection and for Python to start on a slow board."""
STALL_S = 30.0
"""A link on which nothing moves for so long is lost."""
HASH_S = 300.0
"""For the board to look through the files that it holds."""
PATIENCE_S = 600.0
"""How long a lost board is called again; and how long a job on it goes on without anybody who follows it."""
WAIT_S = 900.0
"""How long a job waits for the lease."""
CALLS_S, MOST_CALLS, PATIENT_CALLS = (0.5, 1.0, 2.0, 4.0, 8.0), 150, 4
"""Pauses between calls to a lost board, and how many there are at most; after so many it is told."""
PING_S = 4.0
RESTARTS = 2
KEPT = ("rows", "build")
"""Jobs whose result is the same whenever it is asked for: it stays on the board until it is known to be put away."""
SSH = {"ConnectTimeout": 15, "ServerAliveInterval": 5, "ServerAliveCountMax": 6}
ECHOES = ("kex_exchange_identification:", "ssh_exchange_identification:", "Connection closed by UNKNOWN")
"""What ssh says last where the way leads through another host that was not reached; why, stands before it."""
DEVICE = "local"
"""The board's own name of its lease: who measures on it by hand takes the same one."""
BOOT = r"""
import hashlib, json, os, sys
def tell(**table):
    os.write(1, ("edge-deploy " + json.dumps(table) + "\n").encode())
def whole():
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == sha
    except (IOError, OSError):
        return False
sha, size, home = sys.argv[1], int(sys.argv[2]), os.path.expanduser("~")
home = os.path.join(home, os.path.expanduser(sys.argv[3]))
path = os.path.join(home, "agent", sha[:16], "agent.pyz")
if sys.version_info < (3, 6):
    tell(event="error", kind="python", message="%d.%d" % sys.version_info[:2])
    sys.exit(0)
try:
    if not whole():
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        disk = os.statvfs(home)
        if disk.f_bavail * disk.f_frsize < 2 * size:
            tell(event="error", kind="full", message=home, needed=2 * size, free=disk.f_bavail * disk.f_frsize)
            sys.exit(0)
        tell(event="want")
        data = b""
        while len(data) < size:
            part = os.read(0, size - len(data))
            if not part:
                sys.exit(0)
            data += part
        part = path + ".%d" % os.getpid()
        with open(part, "wb") as file:
            file.write(data)
        os.rename(part, path)
    os.execv(sys.executable, [sys.executable, path, "serve", home])
except OSError as error:
    tell(event="error", kind="folder", message="%s: %s" % (error.filename or home, error.strerror))
"""
Table = dict[str, Any]
T = TypeVar("T")
log = logging.getLogger(__name__)


class LinkLost(Exception):
    """A link that was lost, or that could not be made because the board does not answer; worth another call.

    unmet: what it means where the board was never met: an error in what the user wrote, for which no call is worth it.
    """

    def __init__(self, reason: str, unmet: DeployError | None = None) -> None:
        super().__init__(reason)
        self.unmet = unmet


@dataclass(frozen=True)
class Place:
    """A board: its name for ssh, and how it is reached and used."""

    host: str
    spec: SshSpec

    def __post_init__(self) -> None:
        if not self.host or self.host.startswith("-") or re.search(r"\s", self.host):
            raise UsageError(f"host '{self.host}' is no name of a board.", 'host = "robot-7", as ssh knows it.')

    def by_hand(self, *words: str) -> str:
        """A command for people that does something on the board."""
        return shlex.join(["ssh", *self._asked(), self.host, *words])

    def command(self, remote: str, fresh: bool) -> list[str]:
        """The ssh command. fresh: make a connection of its own, whatever other connections there are."""
        given = {name.lower() for name in self.spec.options}
        strict = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
        alive = [word for k, v in SSH.items() if k.lower() not in given for word in ("-o", f"{k}={v}")]
        alone = ["-o", "ControlPath=none"] if fresh else []
        return ["ssh", "-T", *strict, *alone, *self._asked(), *alive, "--", self.host, remote]

    def _asked(self) -> list[str]:
        config = ["-F", str(Path(self.spec.config).expanduser())] if self.spec.config else []
        return config + [word for name, value in self.spec.options.items() for word in ("-o", f"{name}={value}")]


class Link:
    """One connection to the agent on a board."""

    def __init__(self, place: Place, fresh: bool) -> None:
        self.place = place
        self.hello: Table = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the link
        source, digest = pack.packed(), pack.digest()
        python = place.spec.python if re.fullmatch(r"[\w./~+-]+", place.spec.python) else shlex.quote(place.spec.python)
        remote = f"exec {python} -c {shlex.quote(BOOT)} {digest} {len(source)} {shlex.quote(place.spec.folder)}"
        try:
            self._process = subprocess.Popen(
                place.command(remote, fresh), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        except FileNotFoundError:
            raise DeployError("there is no 'ssh' on this machine.", "apt-get install openssh-client") from None
        assert self._process.stdin is not None and self._process.stdout is not None
        self.peer = Peer(self._process.stdout.fileno(), self._process.stdin.fileno(), STALL_S)
        try:
            self._greet(source)
        except Lost as error:
            raise self.lost(error) from None
        except BaseException:
            self.close()
            raise

    def _greet(self, source: bytes) -> None:
        while self.hello.get("event") != "hello":
            line = self.peer.line(HELLO_S).decode("utf-8", "replace")
            if not line.startswith(MARK):
                continue
            self.hello = json.loads(line.removeprefix(MARK))
            if self.hello["event"] == "want":
                self.peer.write(source)
            elif self.hello["event"] == "error":
                raise refused(self.place, self.hello)

    def receive(self, patience_s: float) -> Table:
        """The next line from the board."""
        return self.peer.receive(patience_s)

    def ask(self, request: Table, data: bytes = b"", patience_s: float = STALL_S) -> tuple[Table, bytes]:
        """The answer to a request. Raises DeployError for what the board refuses."""
        self.peer.send(request, data)
        told = False
        while True:
            answer = self.receive(patience_s)
            if answer["event"] == "waiting":
                if not told:
                    log.warning("waiting for the device '%s', in use by %s.", self.place.host, answer["holder"])
                told = True
            elif answer["event"] == "error":
                raise Refusal(answer)
            elif answer["event"] != "alive":
                return answer, b"".join(self.peer.chunks(answer.get("bytes", 0)))

    def ended(self) -> bool:
        """Whether the far end has hung up meanwhile, as it does when nobody asks it anything for a while."""
        return self._process.poll() is not None

    def lost(self, error: Lost) -> Exception:
        """What a lost link means: LinkLost when calling again may help, DeployError when it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        code = self._process.poll()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip()
        self.close()
        return explain(self.place, code, said, str(error))

    def close(self) -> None:
        """End the ssh process; the agent at its far end ends when it finds the link closed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Refusal(Exception):
    """What the agent answered instead; `Board` makes the user's error of it."""

    def __init__(self, event: Table) -> None:
        super().__init__(event["message"])
        self.event = event


@dataclass(frozen=True)
class Done:
    """A finished job. result: the agent's; seen: facts of the board when it began, and its state before a `drive`."""

    result: Table
    seen: Table
    started: str


@dataclass
class Following:
    """How far a job's events were read. found: whether it was there already when it was asked for."""

    id: str
    progress: Callable[[float], None] | None = None
    look: Look | None = None
    found: bool = False
    offset: int = 0
    seen: Table = field(default_factory=dict)
    started: str = ""
    told: bool = False


class Board:
    """A board, called again whenever its link is lost. One request at a time; threads wait for each other."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.runtime = "onnxruntime"
        self.providers: list[str] = []
        self.wish: Table = {}
        """The state that jobs ask of the board: `Arrangement` on its side."""
        self._link: Link | None = None
        self._met = False
        self._work = ""
        self._kept: list[str] = []
        self._turn = threading.RLock()

    def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()
            self._link = None

    @property
    def resumes(self) -> bool:
        """Whether jobs are begun so that another process can find them."""
        return bool(self._work)

    @contextlib.contextmanager
    def resumable(self, name: str) -> Iterator[None]:
        """Give the jobs of a `with` ids that follow from this name and from what they are.

        Another process that asks for the same under the same name, after this one was killed, finds the job that was
        begun or its result. What ends before its time leaves both on the board.
        """
        self._work = hashlib.sha256(name.encode()).hexdigest()[:16]
        try:
            yield
        finally:
            self._work = ""
        self._forget()

    def settle(self) -> None:
        """Wait until the jobs that an earlier process began under the same name have ended; their results stay."""
        if not self._work:
            return
        for name in self.ask({"do": "running", "begin": self._work})[0]["ids"]:
            log.warning("'%s' is still at work on what this run asked of it before; waiting for it.", self.place.host)
            with self._in_words():
                self._attend(Following(name))

    def _forget(self) -> None:
        """Have the board forget results that were fetched and are put away by now."""
        while self._kept:
            self.ask({"do": "drop", "id": self._kept.pop()})

    @property
    def hello(self) -> Table:
        """How the board's agent introduced itself."""
        return self._persist(lambda link: link.hello)

    def ask(self, request: Table, data: bytes = b"", patience_s: float = STALL_S) -> tuple[Table, bytes]:
        """The answer to a request that may be made twice. Raises DeployError for what the board refuses."""
        with self._in_words():
            return self.try_to(request, data, patience_s)

    def try_to(self, request: Table, data: bytes = b"", patience_s: float = STALL_S) -> tuple[Table, bytes]:
        """Like `ask`, but raises Refusal for what the board refuses."""
        return self._persist(lambda link: link.ask(request, data, patience_s))

    @contextlib.contextmanager
    def _in_words(self, names: Mapping[str, str] | None = None) -> Iterator[None]:
        try:
            yield
        except Refusal as error:
            raise refused(self.place, error.event, names) from None

    def _persist(self, action: Callable[[Link], T]) -> T:
        """Do something over the link, again over a new one where it is lost."""
        with self._turn:
            lost_at, calls = None, 0
            while True:
                try:
                    if self._link is not None and self._link.ended():
                        self.close()
                    if self._link is None:
                        self._link = Link(self.place, fresh=calls > 0)
                        self._met, lost_at = True, None
                    return action(self._link)
                except Lost as error:
                    assert self._link is not None
                    lost, self._link = self._link.lost(error), None
                    if not isinstance(lost, LinkLost):
                        raise lost from None
                    reason = lost
                except LinkLost as error:
                    reason = error
                except Refusal:
                    raise
                except BaseException:
                    self.close()
                    raise
                if reason.unmet is not None and not self._met:
                    raise reason.unmet
                lost_at, calls = lost_at or time.monotonic(), calls + 1
                tried = calls >= (MOST_CALLS if self._met else 2)
                if tried or time.monotonic() - lost_at > PATIENCE_S:
                    raise reason.unmet or unreachable(self.place, str(reason))
                if calls == PATIENT_CALLS:
                    log.warning("the link to '%s' was lost (%s); calling again.", self.place.host, reason)
                time.sleep(CALLS_S[min(calls, len(CALLS_S)) - 1])

    def send(self, files: Mapping[str, Path]) -> None:
        """Have the board hold these files. files: SHA-256 -> path; what is there already is not sent again."""
        with self._in_words({digest: str(path) for digest, path in files.items()}):
            try:
                self._persist(lambda link: self._send(link, files))
            except Refusal as error:
                if error.event["kind"] != "damaged":
                    raise
                # a half-sent file that the board lost its power over: the board has removed it
                self._persist(lambda link: self._send(link, files))

    def _send(self, link: Link, files: Mapping[str, Path]) -> None:
        sizes = [(digest, path.stat().st_size) for digest, path in files.items()]
        there = link.ask({"do": "have", "files": sizes}, patience_s=HASH_S)[0]["offsets"]
        missing = [(d, size, offset) for (d, size), offset in zip(sizes, there, strict=True) if offset is not None]
        if not missing:
            return
        link.peer.send({"do": "put", "files": missing})
        for digest, size, offset in missing:
            left = size - offset
            with files[digest].open("rb") as file:
                file.seek(offset)
                while left and (part := file.read(min(left, 1 << 16))):
                    link.peer.write(part)
                    left -= len(part)
            if left:
                raise DeployError(f"'{files[digest]}' became shorter while it was sent.", "run it again.")
        answer = link.receive(HASH_S)
        if answer["event"] == "error":
            raise Refusal(answer)

    def run(
        self,
        verb: str,
        job: Table,
        files: Mapping[str, Path],
        names: Mapping[str, str],
        limit_s: float,
        progress: Callable[[float], None] | None = None,
        look: Look | None = None,
        device: str = "",
    ) -> Done:
        """Do a job on the board, whatever happens to the link. The paths in it are SHA-256 of files.

        names: paths of this machine by the names that the job gives its models. device: which state of the board the
        result belongs to; a job that was begun in another one is not gone on with.

        It holds the board's lease and outlives the link; its result waits there under an id. A board that starts
        anew in the middle has lost the job, which is started again. look: at the board, each time that it is leased.
        """
        names = {digest: str(path) for digest, path in files.items()} | dict(names)
        self._forget()
        for _ in range(1 + RESTARTS):
            self.send(files)
            follow = Following(self._id([verb, job, self.wish, self.runtime, device]), progress, look)
            with self._in_words(names):
                boot, end = self._started(verb, job, limit_s, follow)
                if end["event"] == "finished" and (end["outcome"]["event"] == "done" or not follow.found):
                    return self._finish(follow, verb, end["outcome"], names, limit_s)
            how = "was started anew" if end.get("boot", boot) != boot else "lost the measuring agent"
            if end["event"] == "gone":
                log.warning("'%s' %s in the middle of a job; the job is started again.", self.place.host, how)
            else:
                log.info("a job that '%s' ended before this process asked for it is started again", self.place.host)
            self.ask({"do": "drop", "id": follow.id})
        said = str(end.get("said", "")).strip().splitlines()
        raise DeployError(
            f"the board '{self.place.host}' {how} {1 + RESTARTS} times in the middle of a job"
            f"{': ' + said[-1] if said else ''}.",
            f"look why: {self.place.by_hand('uptime; dmesg | tail')}",
        )

    def _started(self, verb: str, job: Table, limit_s: float, follow: Following) -> tuple[str, Table]:
        """Start a job and follow it to its end: the board's boot id, and the last event. An error ends it there too."""
        request = {
            "do": "start", "id": follow.id, "verb": verb, "work": job, "device": DEVICE, "owner": lease.owner(),
            "limit_s": limit_s, "wait_s": WAIT_S, "absent_s": PATIENCE_S, "wish": self.wish,
            "runtime": self.runtime, "providers": self.providers,
        }  # fmt: skip
        try:
            started = self.try_to(request, patience_s=HASH_S)[0]
        except BaseException:
            self._stop(follow.id)
            raise
        follow.found = started["found"]
        return started["boot"], self._attend(follow)

    def _attend(self, follow: Following) -> Table:
        """The last event of a job that was started. An error ends it on the board too."""
        try:
            return self._persist(lambda link: self._follow(link, follow))
        except BaseException:
            self._stop(follow.id)
            raise

    def _id(self, what: Any) -> str:
        """An id for a job: a new one, or the one that follows from the work and from what is asked."""
        if not self._work or what[0] == "facts":
            return uuid.uuid4().hex
        return self._work + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _follow(self, link: Link, follow: Following) -> Table:
        """Read a job's events until it ends, answering now and then so that the board knows that somebody listens."""
        link.peer.send({"do": "follow", "id": follow.id, "offset": follow.offset})
        pinged = 0.0
        while True:
            event = link.receive(STALL_S)
            follow.offset = event.get("at", follow.offset)
            if event["event"] == "progress" and follow.progress is not None:
                follow.progress(float(event["done"]))
            elif event["event"] == "waiting" and not follow.told:
                follow.told = True
                log.warning("waiting for the device '%s', in use by %s.", self.place.host, event["holder"])
            elif event["event"] == "left":
                log.warning("'%s' was not given back as it was: %s.", self.place.host, event["message"])
            elif event["event"] == "leased":
                follow.seen, follow.started = event, bench.utc_now(event["ago"])
                if follow.look is not None:
                    follow.look(event.get("facts", {}), event.get("state", {}))
            elif event["event"] == "finished" and event["outcome"]["event"] == "stopped":
                # by somebody else, as a system does that shuts down: as good as gone
                return {"event": "gone", "boot": link.hello["boot"], "said": ""}
            elif event["event"] in ("finished", "gone"):
                return event
            elif event["event"] == "error":
                raise Refusal(event)
            if time.monotonic() - pinged >= PING_S:
                pinged = time.monotonic()
                link.peer.send({"do": "ping"})

    def _finish(self, follow: Following, verb: str, outcome: Table, names: Mapping[str, str], limit_s: float) -> Done:
        if outcome["event"] != "done":
            self.ask({"do": "drop", "id": follow.id})
            raise self._failed(outcome, names, limit_s)
        data = bytearray()

        def fetch(link: Link) -> None:
            while len(data) < outcome["size"]:
                part = link.ask({"do": "fetch", "id": follow.id, "offset": len(data)})[1]
                if not part:
                    break
                data.extend(part)

        self._persist(fetch)
        if hashlib.sha256(data).hexdigest() != outcome["sha256"]:
            text = f"the result of job {follow.id} on '{self.place.host}' is damaged: its SHA-256 differs."
            raise DeployError(text, "measure again.")
        self._kept.append(follow.id)
        if not self._work or verb not in KEPT:
            self._forget()
        return Done(json.loads(zlib.decompress(data)), follow.seen, follow.started)

    def get(self, digest: str, size: int, out: Path) -> None:
        """Fetch a file that lies on the board, as an engine that was built there."""
        with out.open("wb") as file:

            def part(link: Link) -> None:
                while file.tell() < size:
                    got = link.ask({"do": "get", "sha256": digest, "offset": file.tell()})[1]
                    if not got:
                        break
                    file.write(got)

            with self._in_words():
                self._persist(part)
        if agent_sha256(str(out)) != digest:
            text = f"what '{self.place.host}' sent of '{out.name}' is damaged: its SHA-256 differs."
            raise DeployError(text, "run it again.")

    def _failed(self, outcome: Table, names: Mapping[str, str], limit_s: float) -> DeployError:
        """The user's error for a job that ended without a result."""
        if outcome["event"] == "died":
            return bench.died(outcome["code"], outcome["said"])
        if outcome["kind"] == "astray":
            return bench.astray(limit_s)
        version = ""
        if outcome["kind"] == "model" and "hint" not in outcome:
            version = str(self.ask({"do": "facts", "runtime": self.runtime})[0]["runtime_version"])
        return refused(self.place, outcome, names, version)

    def _stop(self, name: str) -> None:
        """End a job that nobody wants any more; where the board does not answer it ends by itself."""
        with self._turn, contextlib.suppress(Lost, LinkLost, DeployError, Refusal):
            self.close()
            link = Link(self.place, fresh=False)
            try:
                link.ask({"do": "stop", "id": name})
                link.ask({"do": "drop", "id": name})
            finally:
                link.close()


# --- what went wrong, in words ---------------------------------------------------------------------------------------


def explain(place: Place, code: int | None, said: str, reason: str) -> Exception:
    """What the end of an ssh process means. code: None where it had to be ended; said: its stderr."""
    host, lines = place.host, [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(ECHOES)] or lines
    last = telling[-1].rstrip(".") if telling else reason
    if "HOST IDENTIFICATION HAS CHANGED" in said:
        remove = next((line for line in lines if line.startswith("ssh-keygen") and " -R " in line), "")
        return DeployError(
            f"the host key of '{host}' is not the known one, so nothing was sent to it.",
            f"look at the key that it shows: {_scan(place)}\n"
            f"Only if the board was set up anew, forget the old one: {remove or 'ssh-keygen -R ' + host}",
        )
    if "Host key verification failed" in said or "host key is known for" in said:
        hint = f"compare its fingerprint once by hand: {place.by_hand('true')}"
        return DeployError(f"the host key of '{host}' is not known yet.", hint)
    # of these two only the last line tells: before it stands what the board's own start-up files have to say
    if "Permission denied (" in last and code == 255:
        hint = f"ssh-copy-id {host}, or ssh-add your key; then try: {place.by_hand('true')}"
        return LinkLost(last, DeployError(f"'{host}' lets nobody in with your keys: {last}.", hint))
    if "Could not resolve hostname" in last:
        hint = "write it into ~/.ssh/config, or its address into the profile's 'host'."
        return LinkLost(last, DeployError(f"no board named '{host}' is known: {last}.", hint))
    if "Bad configuration option" in said or "Can't open user config file" in said:
        return DeployError(f"ssh refuses its options for '{host}': {last}.", "mend ssh.options or ssh.config.")
    if code in (126, 127):
        hint = f"set ssh.python to Python 3.6 or later; look for it: {place.by_hand('ls /usr/bin/python3*')}"
        return DeployError(f"there is no '{place.spec.python}' on '{host}': {last}.", hint)
    if code is not None and 0 < code < 128 and lines:
        return DeployError(f"the agent on '{host}' ended with code {code}: {last}.", bench.DOCTOR)
    return LinkLost(last)


def _scan(place: Place) -> str:
    """The command that shows which key a board has now."""
    command = [*place.command("", True)[:-3], "-G", place.host]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    found = dict(line.split(" ", 1) for line in asked.stdout.splitlines() if " " in line)
    port, name = found.get("port", "22"), found.get("hostname", place.host)
    return f"ssh-keyscan -p {port} {shlex.quote(name)} | ssh-keygen -lf -"


def unreachable(place: Place, reason: str) -> DeployError:
    """The user's error for a board that does not answer."""
    hint = f"is it on, and in the network? {place.by_hand('true')}"
    return DeployError(f"the board '{place.host}' cannot be reached: {reason}.", hint)


def refused(
    place: Place, event: Mapping[str, Any], names: Mapping[str, str] | None = None, version: str = ""
) -> DeployError:
    """The user's error for what the agent on the board answered.

    names: paths of files by what the agent calls them, their SHA-256 included; version: of the board's runtime.
    """
    host, kind, message = place.host, event["kind"], str(event["message"]).rstrip(".")
    name = str(event.get("model") or "")
    where = (names or {}).get(name.rsplit("/", 1)[-1], name) if "/" in name else name
    if kind == "python":
        hint = f"set ssh.python to a newer one; look for it: {place.by_hand('ls /usr/bin/python3*')}"
        return DeployError(f"'{place.spec.python}' on '{host}' is Python {message}; 3.6 or later is needed.", hint)
    if kind == "full":
        text = (
            f"the disk of '{host}' is full: {event['needed']} bytes are needed, {event['free']} are free in {message}."
        )
        return DeployError(text, f"free space there: {place.by_hand('df -h')}")
    if kind == "disk":
        return DeployError(f"on '{host}': {message}.", f"free space there: {place.by_hand('df -h')}")
    if kind == "folder":
        return DeployError(f"cannot use the agent's folder on '{host}': {message}.", "set ssh.folder to another one.")
    if kind == "runtime":
        install = place.by_hand(f"{place.spec.python} -m pip install --user {event['package']}")
        hint = f"{install}\nor set ssh.python to an environment that has it."
        return DeployError(f"{message} for '{place.spec.python}' on '{host}'.", hint)
    if kind == "broken":
        imported = f"{place.spec.python} -c 'import onnxruntime'"
        hint = f"try it there: {place.by_hand(imported)}"
        return DeployError(f"onnxruntime does not start on '{host}': {message}.", hint)
    if kind == "left":
        hint = f"set mode and clocks by hand, then forget the record: {place.by_hand('rm ' + str(event['record']))}"
        return DeployError(f"on '{host}', {message}.", hint)
    if kind == "root":
        hint = "let this user run nvpmodel and jetson_clocks by sudo without a password; deploy doctor says how."
        return DeployError(f"'{host}' does not let its state be set: {message}.", hint)
    if kind == "mode":
        again = place.by_hand(f"sudo nvpmodel -m {event.get('reboot')}")
        hint = f"set it once by hand, and let the board start anew: {again}" if "reboot" in event else ""
        return DeployError(f"on '{host}': {message}.", hint or "deploy doctor --target T")
    if kind == "busy":
        text = f"the device '{host}' is in use by {message}; waited {event['waited_s']:.0f} s."
        return UndecidedError(text, "wait until it is free, or ask its holder.")
    if kind == "damaged":
        where = (names or {}).get(name, name)
        return DeployError(f"'{where}' changed while it was sent to '{host}': its SHA-256 differs.", "run it again.")
    return bench.mendable({**event, "model": where or None}, names or {}, version or "there")
