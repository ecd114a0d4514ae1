"""A SQLite file of ours: opened by several processes at once, brought to its version, moved aside when it is damaged.

Each part of the pipeline keeps a file of its own and owns its tables: `latency.sqlite` is a cache of measured rows and
may be thrown away, `nights.sqlite` is the history of the nightly checks and may not. So neither's damage, size or
version is the other's. What they share is here: write-ahead log, busy timeout, whole transactions or nothing, a
version in `user_version` that only goes up, and errors that are sentences.
"""

from __future__ import annotations

import fcntl
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from profiles.errors import DeployError

BUSY_S = 30.0
T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """What a file holds. steps: SQL that takes a file from version i to i + 1; the version is how many there are.

    Published steps never change: a new table or column is one step more, and files of every older version follow.
    lost: what a damaged file costs, the end of the warning. durable: a commit survives a power cut, not only a kill.
    """

    steps: tuple[str, ...]
    lost: str
    durable: bool = False

    @property
    def version(self) -> int:
        """The version of a file on which every step was taken."""
        return len(self.steps)


class Database:
    """An open file; close it, or use it in a `with`. moved: where a damaged one was put, or None.

    Raises DeployError when the file cannot be read or written (a full disk: nothing of the transaction stays) or is of
    a newer version of this program (nothing is touched).
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.moved: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        self._base = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def read(self, work: Work[T]) -> T:
        """What the statements give; a damaged file is moved aside and they run once more, on a new one."""
        try:
            return work(self._base)
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            self._base.close()
            self._move_aside(error)
            self._base = self._open()
        try:
            return work(self._base)
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None

    def write(self, work: Work[T]) -> T:
        """As `read`, in one transaction that no other process's writing is between."""

        def whole(base: sqlite3.Connection) -> T:
            with base:
                base.execute("BEGIN IMMEDIATE")
                return work(base)

        return self.read(whole)

    # --- opening --------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            self._move_aside(error)
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _connect(self) -> sqlite3.Connection:
        base = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            (version,) = base.execute("PRAGMA user_version").fetchone()
            if version > self.layout.version:
                raise DeployError(
                    f"{self.path} was written by a newer version "
                    f"(schema {version}, this one knows {self.layout.version}).",
                    f"update edge-deploy, or move {self.path.name} away.",
                )
            if version < self.layout.version:
                self._set_up(base)
            base.execute(f"PRAGMA synchronous={'FULL' if self.layout.durable else 'NORMAL'}")
            base.execute("PRAGMA foreign_keys=ON")
            base.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except (sqlite3.Error, DeployError):
            base.close()
            raise
        return base

    def _set_up(self, base: sqlite3.Connection) -> None:
        """Take the steps that are missing, one process at a time: turning on the log does not wait for a lock."""
        with _locked(self.path.with_name(self.path.name + ".setup.lock")):
            (version,) = base.execute("PRAGMA user_version").fetchone()
            if version < self.layout.version:
                base.execute("PRAGMA journal_mode=WAL")
            for number in range(version, self.layout.version):
                step = self.layout.steps[number]
                base.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version={number + 1}; COMMIT;")

    # --- what goes wrong ------------------------------------------------------------------------------------------

    def _move_aside(self, error: sqlite3.Error) -> None:
        """Rename the damaged file and its log, for `sqlite3 .recover`, unless another process has done so meanwhile."""
        with _locked(self.path.with_name(self.path.name + ".lock")):
            try:
                self._connect().close()
            except sqlite3.OperationalError as busy:
                raise self._unusable(busy) from None
            except sqlite3.DatabaseError:
                pass
            else:
                if self._sound():
                    return
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
                number += 1
            self.path.with_name(self.path.name + "-shm").unlink(missing_ok=True)
            for ending in ("-wal", ""):
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + ending).rename(aside.with_name(aside.name + ending))
            self.moved = aside
        log.warning("%s is damaged (%s): moved to %s; %s.", self.path, error, aside.name, self.layout.lost)

    def _sound(self) -> bool:
        base = sqlite3.connect(self.path, timeout=BUSY_S)
        try:
            return bool(base.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
        except sqlite3.DatabaseError:
            return False
        finally:
            base.close()

    def _unusable(self, error: Exception) -> DeployError:
        return DeployError(f"{self.path} cannot be used: {error}.", "free disk space, or make the folder writable.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
