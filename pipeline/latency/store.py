"""Every latency ever measured, in one SQLite file: rows of tables, what was learnt of a device, whole sessions.

A row is one small model's time as a ratio to the reference model of its session, keyed by (device fingerprint,
protocol, SHA-256 of the model), so that equal pieces of different networks and runs are measured once. The ratio is
free of the machine's drift; the absolute scale of a device is the median of its sessions' reference times.

Several processes may use the file at once (write-ahead log, busy timeout; the first writer of a row wins). A damaged
file is moved aside with a warning and started afresh: it is a cache of measurements, nothing else depends on it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from profiles.errors import DeployError

VERSION = 1
BUSY_S = 30.0
CHUNK = 500
QUANTILE = 0.25
T = TypeVar("T")
log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS session (
    id INTEGER PRIMARY KEY, device TEXT NOT NULL, protocol TEXT NOT NULL, taken_at TEXT NOT NULL,
    reference_ms BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS row (
    device TEXT NOT NULL, protocol TEXT NOT NULL, sha256 TEXT NOT NULL, ratio REAL NOT NULL, ms BLOB NOT NULL,
    session INTEGER NOT NULL REFERENCES session(id), PRIMARY KEY (device, protocol, sha256)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fact (
    device TEXT NOT NULL, protocol TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (device, protocol, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measurement (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, taken_at TEXT NOT NULL, device TEXT NOT NULL, session TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS measurement_run ON measurement (run, taken_at);
"""


@dataclass(frozen=True, eq=False)
class Row:
    """A measured row. ratio: lower quartile over rounds of time / reference; ms: raw block medians, shape (rounds,).

    The quartile, because what disturbs a round only ever adds time, and more to a larger model than to the reference.
    """

    ratio: float
    ms: NDArray[np.float64]


@dataclass(frozen=True)
class StoredMeasurement:
    """A whole session as it was measured. session: its JSON with raw samples; taken_at: ISO 8601, UTC."""

    run: str
    taken_at: str
    device: str
    session: str


class Store:
    """The file `latency.sqlite` of a `.deploy` folder. Close it, or use it in a `with`.

    moved: where a damaged file was put, or None. Raises DeployError when the file cannot be written or is of a newer
    version of this program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.moved: Path | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._base = self._open()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    # --- rows -----------------------------------------------------------------------------------------------------

    def rows(self, device: str, protocol: str, hashes: Sequence[str]) -> dict[str, Row]:
        """SHA-256 -> row, for those of the hashes that were measured before."""

        def read(base: sqlite3.Connection) -> dict[str, Row]:
            found: dict[str, Row] = {}
            for start in range(0, len(hashes), CHUNK):
                part = list(hashes[start : start + CHUNK])
                marks = ",".join("?" * len(part))
                query = f"SELECT sha256, ratio, ms FROM row WHERE device=? AND protocol=? AND sha256 IN ({marks})"
                for sha256, ratio, ms in base.execute(query, [device, protocol, *part]):
                    found[sha256] = Row(ratio, np.frombuffer(ms, dtype="<f8"))
            return found

        return self._do(read)

    def add_rows(
        self,
        device: str,
        protocol: str,
        reference_ms: NDArray[np.float64],
        ms: Mapping[str, NDArray[np.float64]],
    ) -> None:
        """Keep a session's rows: SHA-256 -> raw block medians, shape ([sessions,] rounds). Known rows stay."""

        def write(base: sqlite3.Connection) -> None:
            keep = (device, protocol, _now(), _blob(reference_ms))
            with base:
                base.execute("BEGIN IMMEDIATE")
                session = base.execute(
                    "INSERT INTO session (device, protocol, taken_at, reference_ms) VALUES (?,?,?,?)", keep
                ).lastrowid
                base.executemany(
                    "INSERT OR IGNORE INTO row VALUES (?,?,?,?,?,?)",
                    [(device, protocol, sha256, _ratio(times, reference_ms), _blob(times), session)
                     for sha256, times in ms.items()],
                )

        self._do(write)

    def reference_ms(self, device: str, protocol: str) -> float | None:
        """Median over sessions of the reference model's time on a device, or None before the first session."""

        def read(base: sqlite3.Connection) -> float | None:
            query = "SELECT reference_ms FROM session WHERE device=? AND protocol=?"
            times = [float(np.median(np.frombuffer(ms, "<f8"))) for (ms,) in base.execute(query, (device, protocol))]
            return float(np.median(times)) if times else None

        return self._do(read)

    # --- facts ----------------------------------------------------------------------------------------------------

    def fact(self, device: str, protocol: str, name: str) -> Any | None:
        """What was learnt of a device under a name (plain JSON), or None."""

        def read(base: sqlite3.Connection) -> Any | None:
            query = "SELECT value FROM fact WHERE device=? AND protocol=? AND name=?"
            found = base.execute(query, (device, protocol, name)).fetchone()
            return json.loads(found[0]) if found else None

        return self._do(read)

    def learn(self, device: str, protocol: str, name: str, value: Any) -> Any:
        """Keep a fact (plain JSON) unless another process was first; returns the one that holds."""

        def write(base: sqlite3.Connection) -> None:
            with base:
                base.execute("BEGIN IMMEDIATE")
                text = json.dumps(value, sort_keys=True)
                base.execute("INSERT OR IGNORE INTO fact VALUES (?,?,?,?)", (device, protocol, name, text))

        self._do(write)
        return self.fact(device, protocol, name)

    # --- sessions -------------------------------------------------------------------------------------------------

    def add_measurement(self, run: str, device: str, session: str) -> None:
        """Keep a whole session (`Session.to_json()`), raw samples included, under the run that took it."""

        def write(base: sqlite3.Connection) -> None:
            with base:
                base.execute("BEGIN IMMEDIATE")
                query = "INSERT INTO measurement (run, taken_at, device, session) VALUES (?,?,?,?)"
                base.execute(query, (run, _now(), device, session))

        self._do(write)

    def measurements(self, run: str | None = None) -> list[StoredMeasurement]:
        """Sessions of a run, or of all runs, oldest first."""

        def read(base: sqlite3.Connection) -> list[StoredMeasurement]:
            query = "SELECT run, taken_at, device, session FROM measurement WHERE ? IS NULL OR run=? ORDER BY id"
            return [StoredMeasurement(*row) for row in base.execute(query, (run, run))]

        return self._do(read)

    # --- the file -------------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run some statements; a damaged file is moved aside and they run once more on a new one."""
        try:
            return work(self._base)
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            self._base.close()
            self._move_aside(error)
            self._base = self._open()
            return work(self._base)

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
            if version > VERSION:
                raise DeployError(
                    f"{self.path} was written by a newer version (schema {version}, this one knows {VERSION}).",
                    f"update edge-deploy, or move {self.path.name} away.",
                )
            if version < VERSION:
                self._set_up(base)
            base.execute("PRAGMA synchronous=NORMAL")
            base.execute("SELECT count(*) FROM session").fetchone()
        except (sqlite3.Error, DeployError):
            base.close()
            raise
        return base

    def _set_up(self, base: sqlite3.Connection) -> None:
        """Make the tables, one process at a time: the change to write-ahead logging does not wait for a lock."""
        with _locked(self.path.with_name(self.path.name + ".setup.lock")):
            (version,) = base.execute("PRAGMA user_version").fetchone()
            if version < VERSION:
                base.execute("PRAGMA journal_mode=WAL")
                base.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")

    def _move_aside(self, error: sqlite3.Error) -> None:
        """Rename the damaged file and its log, unless another process has done so meanwhile."""
        with _locked(self.path.with_name(self.path.name + ".lock")):
            try:
                self._connect().close()
            except sqlite3.DatabaseError:
                pass
            else:
                if self._sound():
                    return
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
                number += 1
            self.path.rename(aside)
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            self.moved = aside
        log.warning("%s is damaged (%s): moved to %s; rows are measured again.", self.path, error, aside.name)

    def _sound(self) -> bool:
        base = sqlite3.connect(self.path, timeout=BUSY_S)
        try:
            return bool(base.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
        except sqlite3.DatabaseError:
            return False
        finally:
            base.close()

    def _unusable(self, error: sqlite3.Error) -> DeployError:
        return DeployError(f"{self.path} cannot be used: {error}.", "free disk space, or make the folder writable.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ratio(ms: NDArray[np.float64], reference_ms: NDArray[np.float64]) -> float:
    """Geometric mean over sessions of the low quantile over rounds."""
    return float(np.exp(np.mean(np.log(np.quantile(ms / reference_ms, QUANTILE, axis=-1)))))


def _blob(values: NDArray[np.float64]) -> bytes:
    return np.ascontiguousarray(values, dtype="<f8").tobytes()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
