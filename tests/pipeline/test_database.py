"""Our SQLite files: brought to their version step by step, and never lost to an error that is not damage."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from pipeline.database import Database, Layout
from profiles.errors import DeployError

FIRST = "CREATE TABLE thing (name TEXT NOT NULL UNIQUE);"
SECOND = "ALTER TABLE thing ADD COLUMN ms REAL NOT NULL DEFAULT 1.5;"
OLD, NEW = Layout((FIRST,), lost="things are made again"), Layout((FIRST, SECOND), lost="things are made again")


def _add(file: Database, name: str) -> None:
    file.write(lambda base: base.execute("INSERT INTO thing (name) VALUES (?)", (name,)))


def test_an_older_file_takes_the_steps_it_lacks_and_keeps_what_it_holds(tmp_path: Path):
    file = Database(tmp_path / "things.sqlite", OLD)
    _add(file, "a")
    file.close()
    file = Database(tmp_path / "things.sqlite", NEW)
    assert file.read(lambda base: base.execute("SELECT name, ms FROM thing").fetchall()) == [("a", 1.5)]
    assert file.read(lambda base: base.execute("PRAGMA user_version").fetchone()) == (2,)
    file.close()
    with pytest.raises(DeployError, match=r"newer version \(schema 2, this one knows 1\)"):
        Database(tmp_path / "things.sqlite", OLD)


def test_a_step_that_fails_leaves_the_file_at_the_version_it_had(tmp_path: Path):
    broken = Layout((FIRST, f"{SECOND} CREATE TABLE thing (x);"), lost="")
    file = Database(tmp_path / "things.sqlite", OLD)
    _add(file, "a")
    file.close()
    with pytest.raises(DeployError, match=r"things\.sqlite cannot be used: table thing already exists\."):
        Database(tmp_path / "things.sqlite", broken)
    file = Database(tmp_path / "things.sqlite", NEW)
    assert file.read(lambda base: base.execute("SELECT name, ms FROM thing").fetchall()) == [("a", 1.5)]
    file.close()


def test_a_transaction_that_fails_leaves_nothing_of_itself(tmp_path: Path):
    file = Database(tmp_path / "things.sqlite", NEW)

    def twice(base: sqlite3.Connection) -> None:
        base.execute("INSERT INTO thing (name) VALUES ('b')")
        base.execute("INSERT INTO thing (name, missing) VALUES ('c', 1)")

    with pytest.raises(DeployError, match="has no column named missing"):
        file.write(twice)
    assert file.read(lambda base: base.execute("SELECT count(*) FROM thing").fetchone()) == (0,)
    file.close()


def test_a_bug_in_a_statement_is_not_taken_for_damage(tmp_path: Path):
    file = Database(tmp_path / "things.sqlite", NEW)
    _add(file, "a")
    with pytest.raises(sqlite3.IntegrityError):
        _add(file, "a")
    assert file.moved is None
    assert file.read(lambda base: base.execute("SELECT name FROM thing").fetchall()) == [("a",)]
    file.close()


def test_a_damaged_file_is_moved_aside_together_with_its_log(tmp_path: Path):
    path = tmp_path / "things.sqlite"
    path.write_bytes(b"no database" * 100)
    (tmp_path / "things.sqlite-wal").write_bytes(b"the last night")
    file = Database(path, NEW)
    _add(file, "a")
    assert file.moved == tmp_path / "things.sqlite.damaged-1"
    assert (tmp_path / "things.sqlite.damaged-1").read_bytes() == b"no database" * 100
    file.close()


def test_a_second_damaged_file_does_not_replace_the_first(tmp_path: Path):
    path = tmp_path / "things.sqlite"
    for text in (b"first" * 200, b"second" * 200):
        path.write_bytes(text)
        Database(path, NEW).close()
    assert [(tmp_path / f"things.sqlite.damaged-{n}").read_bytes()[:6] for n in (1, 2)] == [b"firstf", b"second"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(DeployError, match=r"things\.sqlite cannot be used: .*(File exists|Not a directory)"):
        Database(tmp_path / "state" / "things.sqlite", NEW)


def test_a_file_may_be_read_while_another_process_writes_it(tmp_path: Path):
    file, other = Database(tmp_path / "things.sqlite", NEW), Database(tmp_path / "things.sqlite", NEW)

    def look(base: sqlite3.Connection) -> int:
        base.execute("INSERT INTO thing (name) VALUES ('a')")
        return int(other.read(lambda there: there.execute("SELECT count(*) FROM thing").fetchone())[0])

    assert file.write(look) == 0
    assert other.read(lambda base: base.execute("SELECT count(*) FROM thing").fetchone()) == (1,)
    file.close()
    other.close()
    assert sorted(os.listdir(tmp_path)) == ["things.sqlite", "things.sqlite.setup.lock"]
