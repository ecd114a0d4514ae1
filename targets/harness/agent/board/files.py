"""Files that are named and checked by their SHA-256."""

import contextlib
import fcntl
import hashlib
import json
import os
from typing import Dict, Iterator

from .base import AgentError, Table

SEAL, LOCK = ".seal", ".lock"
"""In a folder of `whole`: what it holds, and who works in it."""


def sha256(path: str) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def write_file(path: str, data: bytes) -> None:
    """Write under a temporary name, force it to the disk and move it."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        raise


def write_result(path: str, table: Table) -> str:
    """Write JSON under a temporary name, force it to the disk and move it; returns its SHA-256."""
    data = json.dumps(table, separators=(",", ":")).encode()
    try:
        write_file(path, data)
    except OSError as error:
        raise AgentError(
            "disk", "cannot write %d bytes of results to %s: %s" % (len(data), path, error.strerror)
        ) from None
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def whole(folder: str) -> Iterator[None]:
    """A folder held alone, in which another program writes what a later one trusts: after the block it is sealed.

    A file that was half written as its process died, or has been damaged since, is not what the seal says: the folder
    is then emptied before the block. Where no seal can be written, on a full disk, the next one empties it too.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    seal = os.path.join(folder, SEAL)
    lock = os.open(os.path.join(folder, LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = contents(folder)
        if before and sealed(seal) != before:
            for name in before:
                os.remove(os.path.join(folder, name))
        yield
        after = contents(folder)
        if sealed(seal) != after:
            with contextlib.suppress(OSError):
                write_file(seal, json.dumps(after, sort_keys=True).encode())
    finally:
        os.close(lock)


def contents(folder: str) -> Dict[str, str]:
    """Names of the files in a folder but for those of `whole`, and the SHA-256 of each."""
    names = sorted(name for name in os.listdir(folder) if name not in (SEAL, LOCK, SEAL + ".part"))
    return {name: sha256(os.path.join(folder, name)) for name in names if os.path.isfile(os.path.join(folder, name))}


def sealed(seal: str) -> Table:
    """What a seal says; nothing where there is none or it makes no sense."""
    try:
        with open(seal, "rb") as file:
            table: Table = json.loads(file.read().decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
