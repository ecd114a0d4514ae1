"""The device lease: one measurement at a time on one device, by a file lock that ends with its holder.

The lock file stands in /run/lock (the temporary folder where there is none) and names its holder, so that who waits
knows for whom. The lock itself is `flock`: a killed holder leaves none behind. A measuring agent that outlived its
holder is ended by its process id and start time when the next holder takes the lease.

Everybody may write the file, so nothing in it is trusted: entries that make no sense are as good as missing, and only
a process that is the user's own and runs the measuring agent is ended.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profiles.errors import DeployError, UndecidedError

WAIT_S = 900.0
POLL_S = 0.2
AGENT = "agent.py"
PATIENT_S = 2.0
"""Waits that are longer are told."""
LATEST_S = 253402300799.0
"""End of the year 9999 in seconds since the epoch, the last day that has a name."""
OWNER_LETTERS = 128
log = logging.getLogger(__name__)


def lease_folder() -> Path:
    """Where lock files stand."""
    shared = Path("/run/lock")
    return shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def owner() -> str:
    """Who asks, as `user@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True)
class Lease:
    """A lease that is held. expires: when its holder meant to be done, seconds since the epoch."""

    path: Path
    owner: str
    pid: int
    expires: float
    _file: int

    def note_agent(self, pid: int) -> None:
        """Write down the measuring agent's process, so that a later holder can end it should it outlive this one."""
        _write(self._file, {**_holder(self._file), "agent": pid, "agent_start": _start_ticks(pid)})


@contextmanager
def lease(device: str, holds_s: float, wait_s: float = WAIT_S, folder: Path | None = None) -> Iterator[Lease]:
    """Hold the lease of a device for the body of a `with`.

    holds_s: how long the holder means to need it, written down for others. Waits at most wait_s seconds, then raises
    UndecidedError with the holder's name.
    """
    path = (folder or lease_folder()) / f"edge-deploy-{device}.lock"
    file = _open(path)
    try:
        _wait(file, path, device, wait_s)
        _end_orphan(_holder(file))
        held = Lease(path, owner(), os.getpid(), time.time() + holds_s, file)
        _write(file, {"owner": held.owner, "pid": held.pid, "since": time.time(), "expires": held.expires})
        yield held
        _write(file, {})
    finally:
        os.close(file)


def holder(device: str, folder: Path | None = None) -> str | None:
    """Who holds the device's lease and until when, in words, or None while it is free. Waits for nobody."""
    try:
        path = (folder or lease_folder()) / f"edge-deploy-{device}.lock"
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _describe(_holder(file))
    finally:
        os.close(file)


def _open(path: Path) -> int:
    """The lock file, never through a link that somebody else may have put there."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if path.is_file():  # another user's file may be open for reading only; it can be locked all the same
            return os.open(path, (os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) | flags)
        file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        with suppress(PermissionError):
            os.fchmod(file, 0o666)
        return file
    except OSError as error:
        hint = f"remove it, or make {path.parent} writable."
        raise DeployError(f"cannot open the lease file '{path}': {error.strerror}.", hint) from None


def _wait(file: int, path: Path, device: str, wait_s: float) -> None:
    begin, told = time.monotonic(), False
    end = begin + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise UndecidedError(
                    f"the device '{device}' is in use by {_describe(_holder(file))}; waited {wait_s:.0f} s.",
                    f"wait until it is free, or end that process; the lease is {path}.",
                ) from None
            if not told and time.monotonic() - begin >= PATIENT_S:
                told = True
                log.warning("waiting for the device '%s', in use by %s.", device, _describe(_holder(file)))
            time.sleep(POLL_S)


def _holder(file: int) -> dict[str, Any]:
    """What the file says of its holder: the entries that make sense."""
    try:
        table = json.loads(os.pread(file, 4096, 0).decode() or "{}")
    except (ValueError, RecursionError):
        return {}
    known = table if isinstance(table, dict) else {}
    return {name: known[name] for name, sound in SOUND.items() if name in known and sound(known[name])}


def _is_process(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_moment(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LATEST_S


def _is_owner(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= OWNER_LETTERS and value.isprintable()


def _is_ticks(value: Any) -> bool:
    return type(value) is int and value > 0


SOUND: Mapping[str, Callable[[Any], bool]] = {
    "owner": _is_owner,
    "pid": _is_process,
    "since": _is_moment,
    "expires": _is_moment,
    "agent": _is_process,
    "agent_start": _is_ticks,
}


def _describe(holder: dict[str, Any]) -> str:
    known = [f"process {holder['pid']}"] if "pid" in holder else []
    if "expires" in holder:
        known.append(f"expected until {datetime.fromtimestamp(holder['expires'], UTC):%H:%M:%S UTC}")
    return str(holder.get("owner", "another process")) + (f" ({', '.join(known)})" if known else "")


def _write(file: int, table: dict[str, Any]) -> None:
    with suppress(OSError):  # another user's file is open for reading only; the lock holds all the same
        data = json.dumps(table).encode()
        os.ftruncate(file, 0)
        os.pwrite(file, data, 0)


def _start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def _end_orphan(holder: dict[str, Any]) -> None:
    pid, start = holder.get("agent"), holder.get("agent_start")
    if pid is None or start is None or _start_ticks(pid) != start:
        return
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid and _is_own_agent(pid):
            os.killpg(pid, signal.SIGKILL)


def _is_own_agent(pid: int) -> bool:
    """Whether a process is this user's and runs the measuring agent."""
    place = Path(f"/proc/{pid}")
    try:
        words = place.joinpath("cmdline").read_bytes().decode("utf-8", "replace").split("\x00")
        return place.stat().st_uid == os.geteuid() and any(Path(word).name == AGENT for word in words[1:2])
    except OSError:
        return False
