"""Files that are named and checked by their SHA-256."""

import hashlib
import json
import os

from .base import AgentError, Table


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
