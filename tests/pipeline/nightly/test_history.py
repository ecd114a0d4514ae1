"""The history of the nights: whole checks in, whole checks out, in the order they were added, whatever happens."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from check_samples import DEVICE, arms, control, record

from pipeline.database import Database, Layout
from pipeline.nightly.baseline import machine_of
from pipeline.nightly.changes import changes
from pipeline.nightly.history import LAYOUT, NIGHTS, Nights
from pipeline.nightly.records import control_from_table, control_to_table, from_table, to_table
from pipeline.nouns import CheckRecord, Ledger
from profiles.errors import DeployError
from profiles.schema import CheckSpec
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE

D1, D2 = DEVICE.digest(), replace(DEVICE, kernel="6.8").digest()
M1, M2 = machine_of(DEVICE), machine_of(replace(DEVICE, cores=4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".deploy" / "nights.sqlite"


# --- records as plain data -----------------------------------------------------------------------------------------


def test_a_record_comes_back_equal_with_its_infinities_and_types():
    made = record()
    text = json.dumps(to_table(made), allow_nan=False)
    again = from_table(json.loads(text))
    assert again == made
    assert _types(again) == _types(made)
    assert again.candidate.name == "inf" and again.conditions[1] == "nan", "only numbers are read as numbers"


def test_a_number_that_is_none_comes_back_as_none():
    again = from_table(to_table(record(nan=True)))
    assert math.isnan(again.verdict.stages[0].tails[0].interval.sd)


def test_every_field_of_every_noun_of_a_record_is_written():
    table = to_table(record())
    assert set(table) == {field.name for field in fields(CheckRecord)} | {"version"}
    stage = record().verdict.stages[0]
    assert set(table["verdict"]["stages"][0]) == {field.name for field in fields(stage)}
    assert set(table["spec"]) == set(CheckSpec.model_fields)


def test_a_table_that_is_no_record_is_refused():
    table = to_table(record())
    with pytest.raises(DeployError, match="the check record has version 2, this tool reads version 1"):
        from_table(table | {"version": 2})
    for wrong in ({}, table | {"seconds": "soon"}, table | {"layers": [{}]}, table | {"spec": {"fial": 1}}):
        with pytest.raises(DeployError, match="not a check record"):
            from_table(wrong)


def test_a_control_arm_comes_back_equal():
    for arm in (control(0.01), replace(control(), mean_low=None, p99_low=0.02)):
        assert control_from_table(json.loads(json.dumps(control_to_table(arm), allow_nan=False))) == arm


def _types(value: Any) -> Any:
    """The types of everything in a noun, for what `==` does not tell apart: a list from a tuple in Any fields."""
    if is_dataclass(value):
        return {field.name: _types(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _types(entry) for name, entry in value.items()}
    return (type(value), [_types(entry) for entry in value]) if isinstance(value, list | tuple) else type(value)


# --- nights --------------------------------------------------------------------------------------------------------


def test_a_night_keeps_its_record_and_every_raw_sample(path: Path, tmp_path: Path):
    sessions = [arms(tmp_path, seed) for seed in (1, 2)]
    with Nights(path) as nights:
        number = nights.add(record(), sessions, [control()])
    with Nights(path) as nights:
        assert nights.numbered() == {number: record()}
        assert [session.to_json() for session in nights.sessions(number)] == [s.to_json() for s in sessions]
        assert nights.sessions(number + 1) == []
    assert path.stat().st_size < sum(len(session.to_json()) for session in sessions)


def test_nights_come_in_the_order_they_were_added_though_the_clock_jumped(path: Path):
    times = ["2026-11-20T02:00:00Z", "1970-01-01T00:00:07Z", "2026-11-21T02:00:00Z", "2019-05-05T02:00:00Z"]
    with Nights(path) as nights:
        for i, at in enumerate(times):
            nights.add(record(started=at, absolute={CANDIDATE: {"p50": 1.0 + i}}), [], [control(i / 1000)])
        assert [each.started for each in nights.records("jetson-orin-nano")] == times
        assert [each.started for each in nights.records("jetson-orin-nano", 2)] == times[2:]
        series = nights.series("jetson-orin-nano", D1, "c" * 64, "p50")
        assert series.at == tuple(times) and series.ms == (1.0, 2.0, 3.0, 4.0)
        assert [arm.center for (arm,) in nights.controls("jetson-orin-nano", M1)] == [0.0, 0.001, 0.002, 0.003]


def test_profiles_do_not_see_each_others_nights(path: Path):
    with Nights(path) as nights:
        nights.add(record(profile="a"), [], [control()])
        nights.add(record(profile="b"), [], [control()])
        assert [each.profile for each in nights.records("b")] == ["b"]
        assert [each.profile for each in nights.records()] == ["a", "b"]
        assert nights.records("c") == [] and nights.records("a", 0) == []
        assert len(nights.controls("a", M1)) == 1 and nights.controls("a", M2) == []
        assert nights.series("c", D1, "a" * 64, "p50").ms == ()


def test_a_series_has_one_value_a_night_of_one_network_on_one_device_measured_one_way(path: Path):
    with Nights(path) as nights:
        for night, (device, protocol) in enumerate([(D1, "old"), (D1, "new"), (D2, "new"), (D1, "new")]):
            times = {BASELINE: {"p50": 1.0 + night, "p99": None}, AGAIN: {"p50": 3.0 + night}, CANDIDATE: {"p50": 9.0}}
            nights.add(record(absolute=times, device=device, protocol=protocol), [])
        profile = record().profile
        assert nights.series(profile, D1, "a" * 64, "p50").ms == (3.0, 5.0)
        assert nights.series(profile, D1, "c" * 64, "p50").ms == (9.0, 9.0)
        assert nights.series(profile, D1, "a" * 64, "p99").ms == ()
        crossing = nights.series(profile, None, "a" * 64, "p50")
        assert crossing.ms == (3.0, 4.0, 5.0) and crossing.devices == (D1, D2, D1)


def test_equal_networks_in_all_arms_are_one_series(path: Path):
    with Nights(path) as nights:
        same = replace(record(), candidate=replace(record().candidate, sha256="a" * 64))
        times = {BASELINE: {"p50": 1.0}, AGAIN: {"p50": 2.0}, CANDIDATE: {"p50": 6.0}}
        nights.add(replace(same, absolute=times), [])
        assert nights.series(same.profile, D1, "a" * 64, "p50").ms == (3.0,)


# --- the ledger ----------------------------------------------------------------------------------------------------


def test_control_arms_come_back_check_by_check_and_fill_the_ledger(path: Path):
    checks = [(control(0.0),), (control(0.03), control(0.03)), (), *[(control(0.0),)] * 30]
    with Nights(path) as nights:
        for arms_of_check in checks:
            nights.add(record(), [], arms_of_check)
        assert nights.controls(record().profile, M1) == [arms for arms in checks if arms]
        spec, ledger = nights.ledger(record().profile, M1, CheckSpec())
        assert ledger == Ledger(32, 1, ledger.widened)
        assert nights.ledger(record().profile, M2, CheckSpec()) == (CheckSpec(), Ledger(0, 0, 1.0))
        assert spec.fail == pytest.approx(CheckSpec().fail * ledger.widened)


@pytest.mark.parametrize("text", ["{", "[]", '{"center": 0.0}', "null", "more"])
def test_a_control_that_cannot_be_read_costs_its_check_and_no_other(path: Path, caplog, text: str):
    more = json.dumps({**control_to_table(control()), "humidity": 0.4})
    with Nights(path) as nights:
        for _ in range(3):
            nights.add(record(), [], [control(), control()])
    base = sqlite3.connect(path)
    base.execute("UPDATE control SET control=? WHERE night=2 AND position=1", (more if text == "more" else text,))
    base.commit()
    base.close()
    with Nights(path) as nights:
        assert nights.ledger(record().profile, M1, CheckSpec())[1] == Ledger(2, 0, 1.0)
        assert nights.add(record(), [], [control()]) == 4
    assert "the control of check 2 in" in caplog.text and "left out of the ledger" in caplog.text


def test_a_new_kernel_or_runtime_does_not_empty_the_ledger(path: Path):
    new = replace(DEVICE, kernel="6.8", python="3.12.1", runtime_version="1.24.0", cpu_flags="0" * 64)
    with Nights(path) as nights:
        for device in (DEVICE, new, replace(DEVICE, cores=4)):
            nights.add(record(device=device.digest(), machine=machine_of(device)), [], [control()])
        assert nights.ledger(record().profile, machine_of(new), CheckSpec())[1].controls == 2


def test_a_ledger_of_many_alarms_widens_the_tolerances(path: Path):
    with Nights(path) as nights:
        for i in range(40):
            nights.add(record(), [], [control(0.03 if i % 4 == 0 else 0.0)] * 2)
        spec, ledger = nights.ledger(record().profile, None, CheckSpec())
    assert ledger.alarms == 10 and ledger.widened > 1.0
    assert spec.fail > CheckSpec().fail


# --- change points -------------------------------------------------------------------------------------------------


def test_the_change_points_are_those_of_every_night_of_a_network(path: Path):
    with Nights(path) as nights:
        for night in range(20):
            for profile, step in (("a", 1.0 + 0.2 * (night >= 12)), ("b", 1.0)):
                ms = step * (1.0 + 0.002 * (night % 3))
                nights.add(record(profile=profile, started=f"night {night}", absolute={BASELINE: {"p50": ms}}), [])
        (found,) = nights.changes("a", "a" * 64)
        assert found.at == "night 12" and found.series == f"p50 of {'a' * 12} on a"
        assert nights.changes("b", "a" * 64) == ()


def test_what_is_known_later_is_written_into_the_record_and_nothing_else(path: Path):
    with Nights(path) as nights:
        number = nights.add(record(), [], [control()])
        nights.amend(number, record(changes=()))
        assert nights.numbered() == {number: record(changes=())}
        assert len(nights.controls(record().profile, M1)) == 1


# --- what goes wrong -----------------------------------------------------------------------------------------------


def _add_many(path: Path, name: str, count: int) -> None:
    with Nights(path) as nights:
        for _ in range(count):
            nights.add(record(profile=name), [], [control()])


def test_two_processes_add_at_once_and_nothing_is_lost(path: Path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_many, args=(path, name, 25)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    with Nights(path) as nights:
        assert [len(nights.records(name)) for name in ("a", "b")] == [25, 25]
        assert list(nights.numbered()) == list(range(1, 51))
        assert len(nights.series("a", D1, "a" * 64, "p50").ms) == 25


def test_a_kill_in_the_middle_of_a_night_leaves_it_whole_or_not_at_all(path: Path, tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=_add_many, args=(path, "a", 100_000))
    writer.start()
    assert writer.pid is not None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and _count(path, "night") >= 20:
            break
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    nights, controls = _count(path, "night"), _count(path, "control")
    assert nights >= 20 and controls == nights
    with Nights(path) as again:
        assert again.add(record(profile="a"), [], [control()]) == nights + 1


def _count(path: Path, table: str) -> int:
    base = sqlite3.connect(path)
    try:
        return int(base.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        base.close()


def test_a_full_disk_is_a_sentence_and_nothing_is_half_written(tmp_path: Path):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        session, added = arms(tmp_path), 0
        with Nights(mount / "nights.sqlite") as nights:
            with pytest.raises(DeployError, match=r"nights\.sqlite cannot be used: .*full") as caught:
                while added < 1000:
                    nights.add(record(), [session] * 3, [control()])
                    added += 1
            assert caught.value.hint == "free disk space, or make the folder writable."
            assert added > 0
            assert len(nights.records()) == added == len(nights.controls(record().profile, M1))
            assert len(nights.sessions(added)) == 3 and nights.sessions(added + 1) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_damaged_file_is_moved_aside_with_its_log_and_a_new_one_begun(path: Path, caplog: pytest.LogCaptureFixture):
    path.parent.mkdir()
    path.write_bytes(b"this is not a database, it is a long enough text to be read as a header" * 40)
    with caplog.at_level(logging.WARNING), Nights(path) as nights:
        assert nights.add(record(), [], []) == 1
        assert nights.moved == path.with_name("nights.sqlite.damaged-1")
        assert nights.moved.read_bytes().startswith(b"this is not a database")
    assert "moved to nights.sqlite.damaged-1; nights from now on are kept in a new file." in caplog.text


def test_a_record_that_cannot_be_read_is_left_out_by_its_number(path: Path, caplog: pytest.LogCaptureFixture):
    with Nights(path) as nights:
        assert nights.newest() == 0
        numbers = [nights.add(record(profile=name), [], []) for name in ("a", "b", "a", "a")]
    base = sqlite3.connect(path)
    base.execute("UPDATE night SET record='{torn' WHERE id=?", (numbers[1],))
    base.execute("UPDATE night SET record=json_set(record, '$.spec.fial', 1) WHERE id=?", (numbers[2],))
    base.commit()
    base.close()
    with caplog.at_level(logging.WARNING), Nights(path) as nights:
        assert list(nights.numbered()) == [numbers[0], numbers[3]] and nights.newest() == numbers[3]
    said = [entry.getMessage() for entry in caplog.records]
    assert [f"check {number} of {path} cannot be read and is left out" in " ".join(said) for number in numbers] == [
        False, True, True, False,
    ]  # fmt: skip


def test_a_file_of_the_first_version_is_brought_up_and_keeps_its_nights(path: Path):
    old = Database(path, Layout((NIGHTS,), lost=""))
    old.write(lambda base: base.execute("INSERT INTO night VALUES (7, 'a', 'd', 'at', 'fail', ?)",
                                        (json.dumps(to_table(record())),)))  # fmt: skip
    old.close()
    with Nights(path) as nights:
        assert nights.numbered() == {7: record()} and nights.add(record(), [], [control()]) == 8
    assert LAYOUT.version == 2


def test_a_file_of_a_newer_version_is_left_alone(path: Path):
    with Nights(path) as nights:
        nights.add(record(), [], [])
    base = sqlite3.connect(path)
    base.execute("PRAGMA user_version=5")
    base.close()
    before = path.read_bytes()
    with pytest.raises(DeployError) as caught:
        Nights(path)
    assert caught.value.message == f"{path} was written by a newer version (schema 5, this one knows 2)."
    assert path.read_bytes() == before


def test_samples_that_rotted_are_a_sentence_and_the_record_stays(path: Path, tmp_path: Path):
    with Nights(path) as nights:
        number = nights.add(record(), [arms(tmp_path)], [])
    base = sqlite3.connect(path)
    base.execute("UPDATE session SET zlib=substr(zlib, 1, 100)")
    base.commit()
    base.close()
    with Nights(path) as nights:
        with pytest.raises(DeployError, match=f"the samples of night {number} in .* are damaged"):
            nights.sessions(number)
        assert nights.records() == [record()]


COPIES = """
BEGIN;
CREATE TEMP TABLE step AS WITH RECURSIVE more(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM more WHERE n < 3000)
    SELECT n, (1.0 + (n % 7) * 0.003) * CASE WHEN n > 2500 THEN 1.1 ELSE 1.0 END AS scale FROM more;
INSERT INTO night SELECT n, profile, device, 'night ' || n, outcome, record, machine FROM step, night WHERE id = 1;
INSERT INTO control SELECT profile, device, n, position, control FROM step, control WHERE night = 1;
INSERT INTO time SELECT profile, sha256, statistic, n, arm, device, protocol, 'night ' || n, ms * scale
    FROM step, time WHERE night = 1;
COMMIT;
"""


def test_thousands_of_nights_are_looked_at_in_a_moment(path: Path):
    times = {arm: {"p50": 1.0, "p90": 1.2} for arm in (BASELINE, AGAIN, CANDIDATE)}
    with Nights(path) as nights:
        nights.add(record(absolute=times), [], [control()])
    base = sqlite3.connect(path)
    base.executescript(COPIES)
    base.close()
    with Nights(path) as nights:
        begun = time.process_time()
        series = nights.series(record().profile, D1, "a" * 64, "p50")
        found = changes(series)
        assert len(nights.controls(record().profile, M1)) == 3000
        assert len(nights.records(record().profile, 30)) == 30
        assert time.process_time() - begun < 3.0
    assert len(series.ms) == 3000
    assert [change.at for change in found] == ["night 2501"]
