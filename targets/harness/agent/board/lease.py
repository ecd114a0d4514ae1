"""The lease of the device, held by one at a time."""

import datetime
import fcntl
import json
import os
import tempfile
import time
from typing import Any, Callable, Dict, Optional

from .base import AgentError, Table, read_text

OWNER_LETTERS = 128
LATEST_S = 253402300799.0
"""End of the year 9999 in seconds since the epoch, the last day that has a name."""
SOUND: Dict[str, Callable[[Any], bool]] = {
    "owner": lambda value: isinstance(value, str) and 0 < len(value) <= OWNER_LETTERS and value.isprintable(),
    "pid": lambda value: type(value) is int and 0 < value < 2**31,
    "since": lambda value: type(value) in (int, float) and 0 <= value <= LATEST_S,
    "expires": lambda value: type(value) in (int, float) and 0 <= value <= LATEST_S,
    "agent": lambda value: type(value) is int and 0 < value < 2**31,
    "agent_start": lambda value: type(value) is int and value > 0,
}
"""What an entry of a lease file must look like. Everybody may write the file, so nothing in it is trusted."""


def lease_folder() -> str:
    """Where lock files stand."""
    return "/run/lock" if os.access("/run/lock", os.W_OK | os.X_OK) else tempfile.gettempdir()


def open_lease(path: str) -> int:
    """Descriptor of a lock file, never through a link that somebody else may have put there."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    if os.path.isfile(path):  # another user's file may be open for reading only; it can be locked all the same
        return os.open(path, (os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) | flags)
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
        os.fchmod(file, 0o666)
    except PermissionError:
        pass
    return file


def lock(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file without waiting; whether that went."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def read_holder(file: int) -> Table:
    """What a lease file says of its holder: the entries that make sense."""
    try:
        table = json.loads(os.pread(file, 4096, 0).decode() or "{}")
    except (ValueError, RecursionError):
        return {}
    known = table if isinstance(table, dict) else {}
    return {name: known[name] for name, sound in SOUND.items() if name in known and sound(known[name])}


def write_holder(file: int, table: Table) -> None:
    """Write down who holds a lease, where the file may be written; the lock holds all the same."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(table).encode(), 0)
    except OSError:
        pass


def describe_holder(holder: Table) -> str:
    """Who holds a lease and until when, in words."""
    known = ["process %d" % holder["pid"]] if "pid" in holder else []
    if "expires" in holder:
        moment = datetime.datetime.fromtimestamp(holder["expires"], datetime.timezone.utc)
        known.append("expected until %s UTC" % moment.strftime("%H:%M:%S"))
    return str(holder.get("owner", "another process")) + (" (%s)" % ", ".join(known) if known else "")


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 where it is gone."""
    text = read_text("/proc/%d/stat" % pid)
    return int(text.rpartition(")")[2].split()[19]) if text else 0


class Lease(object):
    """The device, held by one at a time, until this process ends at the latest."""

    def __init__(self, device: str) -> None:
        path = os.path.join(lease_folder(), "edge-deploy-%s.lock" % device)
        try:
            self.file = open_lease(path)
        except OSError as error:
            raise AgentError("job", "cannot open the lease file '%s': %s" % (path, error.strerror)) from None
        self.held = False

    def take(self, owner: str, holds_s: float, wait_s: float, waiting: Callable[[str], None]) -> None:
        """Wait for it. waiting: called about every two seconds with who holds it."""
        begin = time.monotonic()
        told = begin
        while not lock(self.file):
            now = time.monotonic()
            if now - begin >= wait_s:
                raise AgentError("busy", describe_holder(read_holder(self.file)), waited_s=now - begin)
            if now - told >= 2.0:
                told = now
                waiting(describe_holder(read_holder(self.file)))
            time.sleep(0.2)
        self.held = True
        now = datetime.datetime.now(datetime.timezone.utc).timestamp()  # for people: nothing waits by it
        write_holder(self.file, {"owner": owner, "pid": os.getpid(), "since": now, "expires": now + holds_s})

    def give_back(self) -> None:
        """Let the next one have it. Who waited in vain leaves the file as it is: it names another holder."""
        if self.held:
            write_holder(self.file, {})
        os.close(self.file)


def holder_of(device: str) -> Optional[str]:
    """Who holds a device's lease, in words, or None while it is free."""
    try:
        file = os.open(os.path.join(lease_folder(), "edge-deploy-%s.lock" % device), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if lock(file, fcntl.LOCK_SH) else describe_holder(read_holder(file))
    finally:
        os.close(file)
