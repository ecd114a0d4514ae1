"""Every check of every night in one SQLite file, `.deploy/nights.sqlite`: records, raw samples, controls, times.

Nights are in the order in which they were added, by number: a clock that jumps cannot reorder them, `at` is for
people. A check is kept whole or not at all. The file is apart from `latency.sqlite`, which is a cache: this one is the
only record of what was said, of every raw sample it was said from, and of how often equal networks were said to differ.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.database import Database, Layout
from pipeline.nightly.changes import Series, changes
from pipeline.nightly.records import control_from_table, control_to_table, from_table, to_table
from pipeline.nouns import Change, CheckRecord, Ledger
from profiles.errors import DeployError
from profiles.schema import CheckSpec
from targets.harness.compare import CANDIDATE, Control, widen
from targets.harness.measurement import Session, Statistic

NIGHTS = """
CREATE TABLE night (
    id INTEGER PRIMARY KEY AUTOINCREMENT, profile TEXT NOT NULL, device TEXT NOT NULL, at TEXT NOT NULL,
    outcome TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX night_of_profile ON night (profile, id);
CREATE TABLE session (
    night INTEGER NOT NULL REFERENCES night(id), position INTEGER NOT NULL, zlib BLOB NOT NULL,
    PRIMARY KEY (night, position));
CREATE TABLE control (
    profile TEXT NOT NULL, device TEXT NOT NULL, night INTEGER NOT NULL REFERENCES night(id),
    position INTEGER NOT NULL, control TEXT NOT NULL, PRIMARY KEY (profile, device, night, position)) WITHOUT ROWID;
CREATE TABLE time (
    profile TEXT NOT NULL, sha256 TEXT NOT NULL, statistic TEXT NOT NULL, night INTEGER NOT NULL REFERENCES night(id),
    arm TEXT NOT NULL, device TEXT NOT NULL, protocol TEXT NOT NULL, at TEXT NOT NULL, ms REAL NOT NULL,
    PRIMARY KEY (profile, sha256, statistic, night, arm)) WITHOUT ROWID;
"""
MACHINES = "ALTER TABLE night ADD COLUMN machine TEXT NOT NULL DEFAULT '';"
"""Digest of the device whatever software it runs (`baseline.machine_of`), by which the ledger counts."""
LAYOUT = Layout((NIGHTS, MACHINES), lost="nights from now on are kept in a new file", durable=True)
WATCHED: tuple[Statistic, ...] = ("p50", "p99")
"""Statistics of the baseline whose nights are searched for change points."""
log = logging.getLogger(__name__)


class Nights(Database):
    """The file `nights.sqlite` of a `.deploy` folder. Close it, or use it in a `with`.

    moved: where a damaged file was put, or None. Raises DeployError when the file cannot be written or is of a newer
    version of this program.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, LAYOUT)

    # --- keeping --------------------------------------------------------------------------------------------------

    def add(self, record: CheckRecord, sessions: Sequence[Session], controls: Sequence[Control] = ()) -> int:
        """Keep a check with all its raw samples and its control arms, one a stage (`compare.control_arms`).

        The series get a value for each arm and statistic of `record.absolute` that has one. Returns the check's number.
        """
        table = _text(to_table(record))
        packed = [zlib.compress(session.to_json().encode(), 9) for session in sessions]
        told = [_text(control_to_table(control)) for control in controls]

        def write(base: sqlite3.Connection) -> int:
            row = (record.profile, record.device, record.started, record.verdict.outcome, table, record.machine)
            night = base.execute(
                "INSERT INTO night (profile, device, at, outcome, record, machine) VALUES (?,?,?,?,?,?)", row
            ).lastrowid
            assert night is not None
            place = (record.profile, record.device, night)
            base.executemany("INSERT INTO session VALUES (?,?,?)", [(night, *each) for each in enumerate(packed)])
            base.executemany("INSERT INTO control VALUES (?,?,?,?,?)", [(*place, *each) for each in enumerate(told)])
            base.executemany("INSERT INTO time VALUES (?,?,?,?,?,?,?,?,?)", list(_times(record, night)))
            return night

        return self.write(write)

    def amend(self, number: int, record: CheckRecord) -> None:
        """Write a check's record anew, for what is known only once it is kept; samples, controls and times stay."""
        table = _text(to_table(record))
        self.write(lambda base: base.execute("UPDATE night SET record=? WHERE id=?", (table, number)))

    # --- looking --------------------------------------------------------------------------------------------------

    def records(self, profile: str | None = None, limit: int | None = None) -> list[CheckRecord]:
        """The newest `limit` checks of a profile, or of all of them, oldest first."""
        return list(self.numbered(profile, limit).values())

    def newest(self) -> int:
        """The number of the newest check of any profile, 0 before the first."""
        return int(self.read(lambda base: base.execute("SELECT max(id) FROM night").fetchone()[0] or 0))

    def numbered(self, profile: str | None = None, limit: int | None = None) -> dict[int, CheckRecord]:
        """As `records`, by number. A record that cannot be read is left out, with a warning that names its number."""

        def read(base: sqlite3.Connection) -> list[tuple[int, str]]:
            where, values = _where(profile=profile)
            query = f"SELECT id, record FROM night {where} ORDER BY id DESC LIMIT ?"
            return base.execute(query, (*values, -1 if limit is None else limit)).fetchall()

        found: dict[int, CheckRecord] = {}
        for number, text in reversed(self.read(read)):
            try:
                found[number] = from_table(json.loads(text))
            except (DeployError, ValueError) as error:
                told = error.message if isinstance(error, DeployError) else f"{error}."
                log.warning("check %d of %s cannot be read and is left out: %s", number, self.path, told)
        return found

    def sessions(self, number: int) -> list[Session]:
        """The sessions of a check, raw samples included, in the order they were measured."""

        def read(base: sqlite3.Connection) -> list[bytes]:
            query = "SELECT zlib FROM session WHERE night=? ORDER BY position"
            return [data for (data,) in base.execute(query, (number,))]

        with _readable(f"the samples of night {number} in {self.path}"):
            return [Session.from_json(zlib.decompress(data).decode()) for data in self.read(read)]

    def controls(self, profile: str, machine: str | None) -> list[tuple[Control, ...]]:
        """The control arms of every check of a profile, oldest first: one entry a check, its stages in order.

        machine: digest of a device whatever software it runs, None for every one. Checks without a control arm are left
        out, and so is one of whose arms one cannot be read, with a warning that names its number.
        """

        def read(base: sqlite3.Connection) -> list[tuple[int, str]]:
            there = "" if machine is None else "AND night.machine=?"
            query = (
                "SELECT control.night, control.control FROM control CROSS JOIN night ON night.id=control.night "
                f"WHERE control.profile=? {there} ORDER BY control.night, control.position"
            )
            return base.execute(query, (profile,) if machine is None else (profile, machine)).fetchall()

        found: dict[int, tuple[Control, ...]] = {}
        lost: set[int] = set()
        for night, text in self.read(read):
            try:
                found[night] = (*found.get(night, ()), control_from_table(json.loads(text)))
            except (ValueError, TypeError, AttributeError) as error:
                lost.add(night)
                told = f"the control of check {night} in {self.path} cannot be read"
                log.warning("%s and is left out of the ledger: %s %s.", told, type(error).__name__, error)
        return [arms for night, arms in found.items() if night not in lost]

    def ledger(self, profile: str, machine: str | None, spec: CheckSpec) -> tuple[CheckSpec, Ledger]:
        """The tolerances that these control arms bear out (`compare.widen`), and the count. spec: the profile's own."""
        past = self.controls(profile, machine)
        widened, alarms, factor = widen(past, spec)
        return widened, Ledger(len(past), alarms, factor)

    def series(self, profile: str, device: str | None, sha: str, statistic: str) -> Series:
        """Absolute times of a network, one a night: the mean of the arms that were this network, oldest first.

        Only nights of the newest night's protocol, since others are not comparable. device: digest of a fingerprint;
        None takes the nights of every one, to see what a new kernel, driver or clock did to the same network.
        """

        def read(base: sqlite3.Connection) -> list[tuple[str, float, str]]:
            where, values = _where(profile=profile, sha256=sha, statistic=statistic, device=device)
            newest = f"SELECT protocol FROM time {where} ORDER BY night DESC LIMIT 1"
            query = (
                f"SELECT at, avg(ms), device FROM time {where} AND protocol=({newest}) GROUP BY night ORDER BY night"
            )
            return base.execute(query, (*values, *values)).fetchall()

        found = self.read(read)
        name = f"{statistic} of {sha[:12]} on {profile}"
        return Series(
            name,
            tuple(at for at, _, _ in found),
            tuple(ms for _, ms, _ in found),
            tuple(digest for _, _, digest in found),
        )

    def changes(self, profile: str, sha: str) -> tuple[Change, ...]:
        """Change points of a network's own times over all its nights, whatever else changed meanwhile; advisory."""
        return tuple(c for statistic in WATCHED for c in changes(self.series(profile, None, sha, statistic)))


def _where(**wanted: str | None) -> tuple[str, list[str]]:
    """A WHERE clause for the columns that are wanted, and its values; "" where none is."""
    asked = {column: value for column, value in wanted.items() if value is not None}
    return f"WHERE {' AND '.join(f'{column}=?' for column in asked)}" if asked else "", list(asked.values())


def _times(record: CheckRecord, night: int) -> Iterator[tuple[Any, ...]]:
    """Rows of the table `time`: the arms of a check, each with the hash of the network it was."""
    for arm, statistics in record.absolute.items():
        sha256 = (record.candidate if arm == CANDIDATE else record.baseline).sha256
        for statistic, ms in statistics.items():
            if ms is not None:
                place = (record.profile, sha256, statistic, night, arm, record.device, record.protocol)
                yield (*place, record.started, float(ms))


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except (zlib.error, UnicodeDecodeError) as error:
        raise DeployError(f"{what} are damaged: {error}.", "its record is whole: deploy history") from None
