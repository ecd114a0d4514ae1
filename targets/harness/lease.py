"""The device lease: one measurement at a time on one device, by a file lock that ends with its holder.

The lock file stands in /run/lock (the temporary folder where there is none) and names its holder, so that who waits
knows for whom. The lock itself is `flock`: a killed holder leaves none behind. A measuring agent that outlived its
holder is ended by its process id and start time when the next holder takes the lease.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profiles.errors import DeployError, UndecidedError

WAIT_S = 900.0
POLL_S = 0.2


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
        file = os.open((folder or lease_folder()) / f"edge-deploy-{device}.lock", os.O_RDONLY | os.O_CLOEXEC)
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
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(PermissionError):
            os.fchmod(file, 0o666)
        return file
    except OSError as error:
        raise DeployError(
            f"cannot make the lease file '{path}': {error.strerror}.", "make its folder writable."
        ) from None


def _wait(file: int, path: Path, device: str, wait_s: float) -> None:
    end = time.monotonic() + wait_s
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
            time.sleep(POLL_S)


def _holder(file: int) -> dict[str, Any]:
    try:
        table = json.loads(os.pread(file, 4096, 0).decode() or "{}")
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if "owner" not in holder:
        return "another process"
    until = datetime.fromtimestamp(float(holder["expires"]), UTC).strftime("%H:%M:%S UTC")
    return f"{holder['owner']} (process {holder['pid']}, expected until {until})"


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
    pid, start = int(holder.get("agent", 0)), int(holder.get("agent_start", 0))
    if pid > 1 and start and _start_ticks(pid) == start and os.getpgid(pid) == pid:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
