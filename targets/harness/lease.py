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
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import DeployError, UndecidedError
from targets.harness import pack
from targets.harness.agent.board import lease as board
from targets.harness.agent.board.lease import describe_holder, open_lease, read_holder, start_ticks, write_holder

WAIT_S = 900.0
POLL_S = 0.2
PATIENT_S = 2.0
"""Waits that are longer are told."""
log = logging.getLogger(__name__)


def lease_folder() -> Path:
    """Where lock files stand."""
    return Path(board.lease_folder())


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
        write_holder(self._file, {**read_holder(self._file), "agent": pid, "agent_start": start_ticks(pid)})


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
        _end_orphan(read_holder(file))
        held = Lease(path, owner(), os.getpid(), time.time() + holds_s, file)
        write_holder(file, {"owner": held.owner, "pid": held.pid, "since": time.time(), "expires": held.expires})
        yield held
        write_holder(file, {})
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
        return describe_holder(read_holder(file))
    finally:
        os.close(file)


def _open(path: Path) -> int:
    try:
        return open_lease(str(path))
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
                    f"the device '{device}' is in use by {describe_holder(read_holder(file))}; waited {wait_s:.0f} s.",
                    f"wait until it is free, or end that process; the lease is {path}.",
                ) from None
            if not told and time.monotonic() - begin >= PATIENT_S:
                told = True
                log.warning("waiting for the device '%s', in use by %s.", device, describe_holder(read_holder(file)))
            time.sleep(POLL_S)


def _end_orphan(holder: dict[str, Any]) -> None:
    pid, start = holder.get("agent"), holder.get("agent_start")
    if pid is None or start is None or start_ticks(pid) != start:
        return
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid and _is_own_agent(pid):
            os.killpg(pid, signal.SIGKILL)


def _is_agent(words: list[str]) -> bool:
    return any(word == str(pack.FOLDER) or Path(word).name == pack.NAME for word in words)


def _is_own_agent(pid: int) -> bool:
    """Whether a process is this user's and runs the measuring agent."""
    place = Path(f"/proc/{pid}")
    try:
        words = place.joinpath("cmdline").read_bytes().decode("utf-8", "replace").split("\x00")
        return place.stat().st_uid == os.geteuid() and _is_agent(words[1:2])
    except OSError:
        return False
