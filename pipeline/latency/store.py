"""Every latency ever measured, in one SQLite file: rows of tables, what was learnt of a device, whole sessions.

A row is one small model's time as a ratio to the reference model of its session, keyed by (device fingerprint,
protocol, SHA-256 of the model), so that equal pieces of different networks and runs are measured once. The ratio is
free of the machine's drift; the absolute scale of a device is the median of its sessions' reference times.

Several processes may use the file at once (write-ahead log, busy timeout; the first writer of a row wins). A damaged
file is moved aside with a warning and started afresh: it is a cache of measurements, nothing else depends on it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.database import Database, Layout

CHUNK = 500
QUANTILE = 0.25

ROWS_AND_SESSIONS = """
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
LAYOUT = Layout((ROWS_AND_SESSIONS,), lost="rows are measured again")


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


class Store(Database):
    """The file `latency.sqlite` of a `.deploy` folder. Close it, or use it in a `with`.

    moved: where a damaged file was put, or None. Raises DeployError when the file cannot be written or is of a newer
    version of this program.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, LAYOUT)

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

        return self.read(read)

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
            session = base.execute(
                "INSERT INTO session (device, protocol, taken_at, reference_ms) VALUES (?,?,?,?)", keep
            ).lastrowid
            base.executemany(
                "INSERT OR IGNORE INTO row VALUES (?,?,?,?,?,?)",
                [
                    (device, protocol, sha256, _ratio(times, reference_ms), _blob(times), session)
                    for sha256, times in ms.items()
                ],
            )

        self.write(write)

    def reference_ms(self, device: str, protocol: str) -> float | None:
        """Median over sessions of the reference model's time on a device, or None before the first session."""

        def read(base: sqlite3.Connection) -> float | None:
            query = "SELECT reference_ms FROM session WHERE device=? AND protocol=?"
            times = [float(np.median(np.frombuffer(ms, "<f8"))) for (ms,) in base.execute(query, (device, protocol))]
            return float(np.median(times)) if times else None

        return self.read(read)

    # --- facts ----------------------------------------------------------------------------------------------------

    def fact(self, device: str, protocol: str, name: str) -> Any | None:
        """What was learnt of a device under a name (plain JSON), or None."""

        def read(base: sqlite3.Connection) -> Any | None:
            query = "SELECT value FROM fact WHERE device=? AND protocol=? AND name=?"
            found = base.execute(query, (device, protocol, name)).fetchone()
            return json.loads(found[0]) if found else None

        return self.read(read)

    def learn(self, device: str, protocol: str, name: str, value: Any) -> Any:
        """Keep a fact (plain JSON) unless another process was first; returns the one that holds."""

        def write(base: sqlite3.Connection) -> None:
            text = json.dumps(value, sort_keys=True)
            base.execute("INSERT OR IGNORE INTO fact VALUES (?,?,?,?)", (device, protocol, name, text))

        self.write(write)
        return self.fact(device, protocol, name)

    def relearn(self, device: str, protocol: str, name: str, change: Callable[[Any | None], Any]) -> None:
        """Replace a fact (plain JSON) by what `change` makes of the one that holds, or of None."""

        def write(base: sqlite3.Connection) -> None:
            query = "SELECT value FROM fact WHERE device=? AND protocol=? AND name=?"
            found = base.execute(query, (device, protocol, name)).fetchone()
            text = json.dumps(change(json.loads(found[0]) if found else None), sort_keys=True)
            base.execute("INSERT OR REPLACE INTO fact VALUES (?,?,?,?)", (device, protocol, name, text))

        self.write(write)

    # --- sessions -------------------------------------------------------------------------------------------------

    def add_measurement(self, run: str, device: str, session: str) -> None:
        """Keep a whole session (`Session.to_json()`), raw samples included, under the run that took it."""

        def write(base: sqlite3.Connection) -> None:
            query = "INSERT INTO measurement (run, taken_at, device, session) VALUES (?,?,?,?)"
            base.execute(query, (run, _now(), device, session))

        self.write(write)

    def measurements(self, run: str | None = None) -> list[StoredMeasurement]:
        """Sessions of a run, or of all runs, oldest first."""

        def read(base: sqlite3.Connection) -> list[StoredMeasurement]:
            query = "SELECT run, taken_at, device, session FROM measurement WHERE ? IS NULL OR run=? ORDER BY id"
            return [StoredMeasurement(*row) for row in base.execute(query, (run, run))]

        return self.read(read)


def _ratio(ms: NDArray[np.float64], reference_ms: NDArray[np.float64]) -> float:
    """Geometric mean over sessions of the low quantile over rounds."""
    return float(np.exp(np.mean(np.log(np.quantile(ms / reference_ms, QUANTILE, axis=-1)))))


def _blob(values: NDArray[np.float64]) -> bytes:
    return np.ascontiguousarray(values, dtype="<f8").tobytes()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
