"""What every part of the agent uses: its error, its clock, small system files, lines on stdout."""

import json
import os
import signal
import sys
import time
from typing import Any, Callable, Dict, Optional, Sequence

Table = Dict[str, Any]
END_S = 10.0
"""How long a process may take to end once there is nothing left for it to do."""


class AgentError(Exception):
    """What ends a job. kind: model, memory, disk, killed, lost, late, long, disturbed, job, full, busy, astray, …

    model: which one it is, or None; more: numbers that belong to it.
    """

    def __init__(self, kind: str, message: str, model: Optional[str] = None, **more: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.model = model
        self.more = more

    def to_table(self) -> Table:
        """Plain table for JSON."""
        return dict(self.more, event="error", kind=self.kind, message=self.message, model=self.model)


def now_ns() -> int:
    """Nanoseconds of the monotonic clock."""
    return int(time.perf_counter() * 1e9)


CLOCK: Callable[[], int] = getattr(time, "perf_counter_ns", now_ns)


def program() -> str:
    """What Python is given to run the agent: the zip that was pushed to a board, or the folder of the same files."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read_text(path: str) -> str:
    """Text of a small system file, or "" where it is missing or not readable.

    A thermal zone that is switched off gives EAGAIN, for which a file object of Python's gives None.
    """
    parts = []
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            part = os.read(file, 1 << 16)
            while part:
                parts.append(part)
                part = os.read(file, 1 << 16)
        finally:
            os.close(file)
    except OSError:
        return ""
    return b"".join(parts).decode("utf-8", "replace").strip("\x00 \t\r\n")


def read_number(path: str) -> Optional[int]:
    """Whole number in a small system file, or None."""
    text = read_text(path).split()
    try:
        return int(text[0]) if text else None
    except ValueError:
        return None


def boot_id() -> str:
    """Changes whenever the device starts."""
    return read_text("/proc/sys/kernel/random/boot_id")


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that happens."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def tell(table: Table) -> None:
    """One JSON line on stdout."""
    sys.stdout.write(json.dumps(table) + "\n")
    sys.stdout.flush()


def median(values: Sequence[int]) -> int:
    """Middle value; the lower middle of an even count is averaged with the upper one."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2
