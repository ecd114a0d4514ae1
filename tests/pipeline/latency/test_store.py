"""The file of measurements: what goes in comes out, in several processes at once, and damage is survived."""

from __future__ import annotations

import logging
import multiprocessing
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from pipeline.latency.store import Store
from profiles.errors import DeployError


def test_a_row_is_a_low_ratio_to_its_reference_and_keeps_its_raw_times(tmp_path):
    reference, times = np.array([1.0, 2.0, 4.0]), np.array([2.0, 9.0, 8.0])
    with Store(tmp_path / "latency.sqlite") as store:
        store.add_rows("device", "rows/1", reference, {"aa": times})
        row = store.rows("device", "rows/1", ["aa", "bb"])["aa"]
        assert row.ratio == 2.0
        assert row.ms.tolist() == times.tolist()
        assert store.reference_ms("device", "rows/1") == 2.0


def test_rows_of_another_device_or_protocol_are_not_found(tmp_path):
    with Store(tmp_path / "latency.sqlite") as store:
        store.add_rows("device", "rows/1", np.ones(3), {"aa": np.ones(3)})
        assert store.rows("other", "rows/1", ["aa"]) == {}
        assert store.rows("device", "rows/2", ["aa"]) == {}
        assert store.reference_ms("other", "rows/1") is None


def test_the_first_measurement_of_a_row_stays(tmp_path):
    with Store(tmp_path / "latency.sqlite") as store:
        store.add_rows("device", "rows/1", np.ones(3), {"aa": np.full(3, 2.0)})
        store.add_rows("device", "rows/1", np.ones(3), {"aa": np.full(3, 9.0), "bb": np.full(3, 4.0)})
        ratios = {key: row.ratio for key, row in store.rows("device", "rows/1", ["aa", "bb"]).items()}
        assert ratios == {"aa": 2.0, "bb": 4.0}
        assert store.learn("device", "rows/1", "grid", {"step": 16}) == {"step": 16}
        assert store.learn("device", "rows/1", "grid", {"step": 8}) == {"step": 16}


def test_more_rows_than_one_query_may_name_are_found(tmp_path):
    hashes = [f"{i:04x}" for i in range(1700)]
    with Store(tmp_path / "latency.sqlite") as store:
        store.add_rows("device", "rows/1", np.ones(3), {key: np.ones(3) for key in hashes})
        assert len(store.rows("device", "rows/1", hashes)) == 1700


def test_rows_and_sessions_survive_a_new_process(tmp_path):
    path = tmp_path / "latency.sqlite"
    with Store(path) as store:
        store.add_rows("device", "rows/1", np.ones(3), {"aa": np.ones(3)})
        store.add_measurement("run-1", "device", '{"raw": [1, 2]}')
        store.add_measurement("run-2", "device", '{"raw": [3]}')
    with Store(path) as store:
        assert "aa" in store.rows("device", "rows/1", ["aa"])
        assert [m.session for m in store.measurements("run-1")] == ['{"raw": [1, 2]}']
        assert [m.run for m in store.measurements()] == ["run-1", "run-2"]


def write_many(path: Path, name: int) -> None:
    with Store(path) as store:
        for i in range(20):
            store.add_rows("device", "rows/1", np.ones(2), {f"{name}-{i}": np.ones(2), f"shared-{i}": np.ones(2)})


def test_four_processes_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "latency.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(path, name)) for name in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    wanted = [f"{name}-{i}" for name in [*range(4), "shared"] for i in range(20)]
    with Store(path) as store:
        assert set(store.rows("device", "rows/1", wanted)) == set(wanted)


def test_a_file_that_is_no_database_is_moved_aside_with_a_warning(tmp_path, caplog):
    path = tmp_path / "latency.sqlite"
    path.write_bytes(b"this is not a database, it is a long enough text to be read as a header" * 40)
    with caplog.at_level(logging.WARNING), Store(path) as store:
        store.add_rows("device", "rows/1", np.ones(3), {"aa": np.ones(3)})
        assert store.moved == tmp_path / "latency.sqlite.damaged-1"
        assert store.moved.read_bytes().startswith(b"this is not a database")
    assert "latency.sqlite is damaged (file is not a database): moved to latency.sqlite.damaged-1" in caplog.text


def test_pages_that_are_damaged_later_are_survived_too(tmp_path):
    path = tmp_path / "latency.sqlite"
    with Store(path) as store:
        store.add_rows("device", "rows/1", np.ones(30), {f"{i:064x}": np.ones(30) for i in range(400)})
    raw = bytearray(path.read_bytes())
    raw[8192:] = b"\xa5" * (len(raw) - 8192)
    path.write_bytes(bytes(raw))
    with Store(path) as store:
        assert store.rows("device", "rows/1", [f"{i:064x}" for i in range(400)]) == {}
        assert store.moved is not None
        store.add_rows("device", "rows/1", np.ones(3), {"aa": np.ones(3)})
        assert "aa" in store.rows("device", "rows/1", ["aa"])


def test_a_file_of_a_newer_version_is_left_alone(tmp_path):
    path = tmp_path / "latency.sqlite"
    base = sqlite3.connect(path)
    base.execute("PRAGMA user_version=7")
    base.close()
    with pytest.raises(DeployError) as caught:
        Store(path)
    assert str(caught.value) == (
        f"{path} was written by a newer version (schema 7, this one knows 1).\n"
        "update edge-deploy, or move latency.sqlite away."
    )


def test_a_file_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "latency.sqlite").mkdir()
    with pytest.raises(DeployError, match=r"latency\.sqlite cannot be used: unable to open database file\."):
        Store(tmp_path / "latency.sqlite")
