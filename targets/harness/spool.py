"""Working folders that vanish with their process, even one that is killed, and that nobody takes from a living one.

Whether somebody still works in a folder is asked of a lock in it: a process in another container has no number here, or
somebody else's. The kernel lifts the lock when its process dies, and the next one removes what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from profiles.errors import DeployError

LOCK = "lock"
LEFT_S = 86400.0
"""A folder without that file is of a version that had none, or is being made: after so long it is nobody's."""


@contextlib.contextmanager
def working_folder(place: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `place`, gone afterwards; those of dead processes with the same prefix go too.

    Raises DeployError where none can be made.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        sweep(place, prefix)
        folder, held = _held(place, prefix)
    except OSError as error:
        message = f"cannot make a folder in '{place}': {error.strerror}."
        raise DeployError(message, "free space or choose another folder.") from None
    try:
        with folder as name:
            yield Path(name)
    finally:
        os.close(held)


def sweep(place: Path, prefix: str) -> None:
    """Remove what killed processes left behind."""
    for left in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            try:
                held = _locked(left / LOCK)
            except FileNotFoundError:
                if time.time() - left.stat().st_mtime > LEFT_S:
                    shutil.rmtree(left, ignore_errors=True)
                continue
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)


def _held(place: Path, prefix: str) -> tuple[tempfile.TemporaryDirectory[str], int]:
    """A new folder, and its locked file: another process may sweep it before it is locked, which needs another one."""
    while True:
        folder = tempfile.TemporaryDirectory(dir=place, prefix=prefix)
        held = None
        try:
            held = _locked(Path(folder.name) / LOCK, os.O_CREAT)
        finally:
            if held is None:
                folder.cleanup()
        if held is not None:
            return folder, held


def _locked(path: Path, flags: int = 0) -> int | None:
    """Descriptor of a file that nobody else has locked, or None; a file that was removed meanwhile is not it."""
    file = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(file)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None
