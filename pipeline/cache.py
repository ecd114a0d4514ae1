"""Content-addressed storage: an object is a file whose name is its SHA-256, a key says which objects a stage made.

    .deploy/objects/ab/abcd…         bytes, named by their hash
    .deploy/keys/<stage>/<key>.json  what a finished stage gave
    .deploy/locks/                   one file a lock, so that two builds on one folder wait for each other
    .deploy/runs/                    one file a run: where it lies, so that `gc` keeps what it refers to
    .deploy/baselines/               one file a profile: what nightly checks compare with, kept by `gc` for ever
    .deploy/engines/, timing/        built engines, and what was timed for them (targets/harness/engines.py); engines of
                                     the newest baselines are kept by `gc` for ever

Everything is written under a temporary name, flushed to the disk and then moved into place, so a kill at any moment
leaves either the whole file or none of it. A read checks the hash: a damaged object is dropped and counts as absent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import DeployError

log = logging.getLogger(__name__)

HASH = re.compile(r"\b[0-9a-f]{64}\b")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not grow so large",
}
_REFUSED = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
        *(errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    )
)
_CHUNK = 1 << 20


def file_hash(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(error: OSError, path: Path) -> DeployError | None:
    """The user's error for a write that found no space, or None when the error is another one."""
    if error.errno not in _FULL:
        return None
    folder = next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free // (1 << 20)
    message = f"{_FULL[error.errno]}: '{path}' could not be written, {free} MiB are free."
    return DeployError(message, "free some space, or remove what no run needs: deploy gc --keep-days 0")


def refused(error: OSError) -> DeployError | None:
    """The user's error for a place that is full or that may not be used, or None when the error is another one."""
    named = error.filename if error.filename2 is None else error.filename2
    place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else Path()
    if error.errno not in _REFUSED:
        return disk_full(error, place)
    message = f"'{place}' cannot be used: {str(error.strerror).lower()}."
    return DeployError(message, "run it where that can be read and written, or name another place.")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, flushed and moved to it when the block ends; removed when the block fails.

    Raises DeployError when the disk is full.
    """
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        full = disk_full(error, path)
        if full is not None:
            raise full from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing. Raises DeployError when the disk is full."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock on a file; yields False when `wait` is off and another process holds it.

    The lock ends with the process, however it ends, and its file may be deleted by whoever holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                log.warning("waiting for another build that holds %s.", path.name)
                fcntl.flock(descriptor, kind)
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    yield True
                    return
        finally:
            os.close(descriptor)


@contextmanager
def named(files: Mapping[str, Path]) -> Iterator[None]:
    """Errors inside tell these files by their names, not by where they lie: the path of an object says nothing."""
    try:
        yield
    except DeployError as error:
        for name, path in files.items():
            for place in sorted((str(path.resolve()), str(path)), key=len, reverse=True):
                error.message = error.message.replace(place, name)
        error.args = (error.message,)
        raise


@dataclass(frozen=True)
class Swept:
    """What `gc` removed: files and their bytes."""

    objects: int = 0
    keys: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Cache:
    """The state folder `.deploy/`; making one touches no file."""

    root: Path

    # --- objects ---------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where the object with this hash lies or would lie."""
        return self.root / "objects" / digest[:2] / digest

    def put_bytes(self, data: bytes) -> str:
        """Store bytes and give their hash. Raises DeployError when the disk is full."""
        digest = hashlib.sha256(data).hexdigest()
        if not self.has(digest):
            write_atomic(self.path(digest), data)
        return digest

    def put_file(self, source: Path) -> str:
        """Store a copy of a file and give its hash; the copy is hashed, so a file that changes meanwhile cannot lie.

        Raises OSError for a file that cannot be read, DeployError when the disk is full.
        """
        digest = file_hash(source)
        if self.has(digest):
            return digest
        with writing(self.path(digest)) as temporary:
            with source.open("rb") as old, temporary.open("wb") as new:
                shutil.copyfileobj(old, new, _CHUNK)
            if file_hash(temporary) != digest:
                raise DeployError(f"'{source}' changed while it was stored.", "run the command again.")
        return digest

    def has(self, digest: str) -> bool:
        """Whether the object is here and whole; a damaged one is dropped with a warning."""
        path = self.path(digest)
        try:
            found = file_hash(path)
        except FileNotFoundError:
            return False
        if found == digest:
            return True
        log.warning("%s is damaged (its hash is %s…) and was dropped; it will be made again.", path, found[:12])
        path.unlink(missing_ok=True)
        return False

    def get(self, digest: str) -> bytes | None:
        """The bytes of an object, or None when it is absent or damaged."""
        return self.path(digest).read_bytes() if self.has(digest) else None

    # --- keys ------------------------------------------------------------------------------------------------------

    def key_path(self, stage: str, key: str) -> Path:
        """Where the record of a finished stage lies or would lie."""
        return self.root / "keys" / stage / f"{key}.json"

    def read_key(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None; a record that is no JSON object is dropped with a warning."""
        path = self.key_path(stage, key)
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            record = None
        if isinstance(record, dict):
            with suppress(FileNotFoundError):
                os.utime(path)  # what is used stays young for gc
            return record
        log.warning("%s is damaged and was dropped; its stage runs again.", path)
        path.unlink(missing_ok=True)
        return None

    def write_key(self, stage: str, key: str, record: dict[str, Any]) -> None:
        """Keep the record of a finished stage. Raises DeployError when the disk is full."""
        write_atomic(self.key_path(stage, key), json.dumps(record, sort_keys=True, allow_nan=False).encode())

    @contextmanager
    def working(self, stage: str, key: str) -> Iterator[None]:
        """Hold the lock of one key: a second build that wants the same waits, and then finds the result."""
        with locked(self.root / "locks" / f"{stage}-{key}"):
            yield

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by every build, shared between them, so that `gc` never runs beside one."""
        with locked(self.root / "locks" / "use", shared=True):
            yield

    # --- collecting ------------------------------------------------------------------------------------------------

    def remember_run(self, run: Path) -> None:
        """Note where a run lies, so that `gc` keeps the objects that it refers to."""
        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        write_atomic(self.root / "runs" / name, str(run.resolve()).encode())

    def runs(self) -> list[Path]:
        """Folders of every run that was made with this cache and is still there; the others are forgotten."""
        found = []
        for note in sorted(self.root.glob("runs/*")):
            run = Path(note.read_text(encoding="utf-8"))
            if (run / "run.json").is_file():
                found.append(run)
            elif not run.exists():
                note.unlink(missing_ok=True)
        return found

    def gc(self, keep_days: float) -> Swept:
        """Remove keys not used for `keep_days` days and objects that no key, run or baseline refers to.

        Engines and timings that were not used for so long go too, save the engines of what is a baseline now.

        Raises DeployError while a build uses the folder.
        """
        with locked(self.root / "locks" / "use", wait=False) as mine:
            if not mine:
                raise DeployError(f"a build is using '{self.root}'.", "deploy gc, once it has ended.")
            return self._sweep(time.time() - keep_days * 86400)

    def _sweep(self, before: float) -> Swept:
        referred: set[str] = set()
        for run in self.runs():
            for name in ("run.json", "journal"):
                with suppress(FileNotFoundError):
                    referred |= set(HASH.findall((run / name).read_text(encoding="utf-8", errors="replace")))
        keys = objects = size = 0
        newest: set[str] = set()
        for path in self.root.glob("baselines/*.json"):
            pinned = path.read_text(encoding="utf-8", errors="replace")
            referred |= set(HASH.findall(pinned))
            newest |= _newest(pinned)
        for path in self.root.glob("keys/*/*.json"):
            if path.stat().st_mtime < before and path.stem not in referred:
                size, keys = size + path.stat().st_size, keys + 1
                path.unlink()
            else:
                referred |= set(HASH.findall(path.read_text(encoding="utf-8", errors="replace")))
        for path in self.root.glob("objects/??/*"):
            if path.name not in referred:
                size, objects = size + path.stat().st_size, objects + 1
                path.unlink()
        for path in (*self.root.glob("engines/*"), *self.root.glob("timing/*")):
            if path.stat().st_mtime < before and not newest & _models(path):  # what is used stays young
                size, objects = size + _bytes(path), objects + 1
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.root.glob("locks/*-*"):
            path.unlink()  # nobody holds one: every build also holds `use`
        shutil.rmtree(self.root / "scratch", ignore_errors=True)
        return Swept(objects, keys, size)


def _newest(baselines: str) -> set[str]:
    """Hash of the network that a profile's record of baselines names last; a damaged record names none."""
    found = re.findall(r'"sha256": "([0-9a-f]{64})"', baselines)
    return set(found[-1:])


def _models(engine: Path) -> set[str]:
    """Hashes of the files that an engine was built of, as its record tells; none for what is no engine."""
    try:
        told = json.loads((engine / "record.json").read_bytes())["model"]
        return set(told.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(each.stat().st_size for each in (path, *path.glob("*")) if each.is_file())
