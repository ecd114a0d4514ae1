"""Runs: their folder, their journal, their lock, and what a kill leaves."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.journal import Journal
from pipeline.run import BuildRequest, Interrupted, Run, latest_unfinished, read_state, unfinished
from pipeline.stage import Stage
from profiles.errors import DeployError, MissedError, UsageError
from profiles.schema import Profile

ROOT = Path(__file__).parents[2]
PROFILE = Profile(name="local", target="local")
MEASURE, EXPORT = Stage("measure", always=True), Stage("export")


def _request(root: Path, **changes: Any) -> BuildRequest:
    return BuildRequest(root, "local", "0.5x", root=root, console=Console(file=io.StringIO(), width=100), **changes)


def _run(root: Path, out: Path | None = None) -> Run:
    return Run.create(root, PROFILE, out=out, request=_request(root))


def test_a_run_leaves_its_profile_its_record_and_its_log(tmp_path: Path):
    with _run(tmp_path) as run:
        run.finished("capture", 0.25, "12 groups")
        logging.getLogger("targets.local").warning("one core is busy")
    state = read_state(run.path)
    assert state["status"] == "done" and state["stages"]["capture"] == {"seconds": 0.25, "detail": "12 groups"}
    assert json.loads((run.path / "profile.json").read_text())["name"] == "local"
    assert "python" in state["versions"] and state["request"]["budget"] == "0.5x"
    assert "WARNING targets.local: one core is busy" in (run.path / "log").read_text()
    assert run.path.parent == tmp_path / "runs" and run.path.name.endswith("-local")


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path):
    with _run(tmp_path) as one, _run(tmp_path) as two, _run(tmp_path) as three:
        assert len({one.path, two.path, three.path}) == 3


def test_a_finished_stage_says_one_line(tmp_path: Path):
    request = _request(tmp_path)
    with Run.create(tmp_path, PROFILE, request=request) as run:
        run.finished("tabulate", 18.23, "reused 41, measured 3")
    assert request.console.file.getvalue() == "tabulate         reused 41, measured 3                     18.2 s\n"


def test_a_stage_is_reused_by_the_next_run_and_measuring_is_not(tmp_path: Path):
    worked: list[str] = []

    def work(name: str) -> Any:
        return lambda scratch: worked.append(name) or {"value": len(worked)}

    for _ in range(2):
        with _run(tmp_path) as run:
            run.stage(EXPORT, None, {}, work("export"))
            run.stage(MEASURE, None, {}, work("measure"))
            run.stage(MEASURE, None, {}, work("measure"))
    assert worked == ["export", "measure", "measure"]
    assert run.stages["export"]["reused"] == 1 and run.stages["export"]["detail"] == "reused"
    assert [link["stage"] for link in run.chain()] == ["export", "measure"]


def test_bad_input_before_anything_was_done_leaves_no_run(tmp_path: Path):
    with pytest.raises(UsageError), _run(tmp_path):
        raise UsageError("there is no file 'deploy.toml'.")
    assert not (tmp_path / "runs").exists()


def test_an_error_after_a_measurement_keeps_the_run_for_resuming(tmp_path: Path):
    with pytest.raises(DeployError), _run(tmp_path) as run:
        run.journalled("dense", {}, lambda: 0.8)
        raise DeployError("evaluate gave NaN.")
    assert read_state(run.path)["status"] == "failed" and unfinished(tmp_path) == [run.path.resolve()]


def test_a_budget_that_nothing_meets_ends_the_run_for_good(tmp_path: Path):
    with pytest.raises(MissedError), _run(tmp_path) as run:
        run.journalled("table", {}, lambda: 0.8)
        raise MissedError("budget 0.01x cannot be met.")
    assert read_state(run.path)["status"] == "missed" and unfinished(tmp_path) == []


def test_a_bug_keeps_the_run_and_its_stack_in_the_log(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), _run(tmp_path) as run:
        run.finished("divide", 1 / 0)
    assert "ZeroDivisionError" in (run.path / "log").read_text()


def test_control_c_leaves_a_resumable_run_and_says_the_command(tmp_path: Path):
    with pytest.raises(Interrupted) as caught, _run(tmp_path) as run:
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert caught.value.message == f"interrupted; what was done is kept in '{run.path}'."
    assert caught.value.hint == f"deploy build --resume --out {run.path}"
    assert read_state(run.path)["status"] == "interrupted"


def test_a_resumed_run_replays_its_journal_and_asks_what_was_asked(tmp_path: Path):
    with pytest.raises(Interrupted), _run(tmp_path) as run:
        assert run.journalled("round", {"n": 1}, lambda: {"ms": (0.4, 0.5)}) == {"ms": [0.4, 0.5]}
        raise KeyboardInterrupt
    with Run.resume(tmp_path) as again:
        assert again.path.resolve() == run.path.resolve() and again.id == run.id
        assert again.journalled("round", {"n": 1}, lambda: pytest.fail("measured twice")) == {"ms": [0.4, 0.5]}
        assert again.journalled("round", {"n": 2}, lambda: 7) == 7
        assert again.journal.entries("round") == [{"ms": [0.4, 0.5]}, 7]
    request = BuildRequest.again(again.path, Console(stderr=True))
    assert request.resume and request.budget == "0.5x" and request.project == tmp_path.resolve()


def test_a_journalled_stage_whose_object_was_lost_is_worked_again(tmp_path: Path):
    def work(scratch: Path) -> dict[str, Any]:
        (scratch / "raw").write_bytes(b"samples")
        return {"raw": scratch / "raw"}

    with _run(tmp_path) as run:
        first = run.stage(MEASURE, None, {}, work)
        first.path("raw").unlink()
        again = run.stage(MEASURE, None, {}, work)
    assert not again.reused and again.path("raw").read_bytes() == b"samples"


def test_a_torn_last_line_of_a_journal_is_cut_off_and_the_rest_kept(tmp_path: Path):
    journal = Journal(tmp_path / "journal")
    journal.append("round", 1, 0.8)
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"key":"torn')
    again = Journal(tmp_path / "journal")
    assert again.entries("round") == [0.8]
    again.append("round", 2, 0.4)
    assert Journal(tmp_path / "journal").entries("round") == [0.8, 0.4]


def test_a_journal_that_was_damaged_in_the_middle_is_refused(tmp_path: Path):
    path = tmp_path / "journal"
    path.write_text("not json\n" + json.dumps({"name": "a", "key": "k", "value": 1}) + "\n")
    with pytest.raises(DeployError) as caught:
        Journal(path)
    assert caught.value.message == f"line 1 of the journal '{path}' is damaged."
    assert caught.value.hint == "start a new run: deploy build without --resume."


def test_no_two_runs_have_the_same_id_and_one_of_before_there_were_ids_has_its_folder(tmp_path: Path):
    ids = set()
    for _ in range(2):
        with pytest.raises(Interrupted), _run(tmp_path) as run:
            ids.add(run.id)
            run.finished("capture", 0.1)
            raise KeyboardInterrupt
    assert len(ids) == 2
    state = read_state(run.path)
    (run.path / "run.json").write_text(json.dumps({key: value for key, value in state.items() if key != "id"}))
    with Run.resume(tmp_path, run.path) as again:
        assert again.id == str(run.path.resolve())


def test_one_run_is_driven_by_one_process(tmp_path: Path):
    with _run(tmp_path) as run, pytest.raises(UsageError) as caught:
        Run.resume(tmp_path, run.path)
    assert caught.value.message == f"run '{run.path}' is being driven by process {os.getpid()}."


def test_a_finished_run_is_not_resumed(tmp_path: Path):
    with _run(tmp_path) as run:
        run.finish("missed", {"latency_ratio": 0.61})
    with pytest.raises(UsageError) as caught:
        Run.resume(tmp_path, run.path)
    assert caught.value.message == f"run '{run.path}' is finished (missed)."
    assert read_state(run.path)["summary"] == {"latency_ratio": 0.61}


def test_resuming_where_there_is_nothing_says_so(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no unfinished run in '"):
        latest_unfinished(tmp_path)


def test_a_folder_that_is_not_empty_is_not_taken_for_a_run(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError) as caught:
        _run(tmp_path, tmp_path / "out")
    assert caught.value.message == f"'{tmp_path / 'out'}' exists and is not empty."
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_folder_that_is_no_run_and_a_record_that_is_none_are_told_apart(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no run in '"):
        read_state(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UsageError, match="is not a record of a run"):
        read_state(tmp_path)


def test_gc_waits_for_no_run_but_is_refused_by_one(tmp_path: Path):
    with _run(tmp_path) as run, pytest.raises(DeployError, match="a build is using"):
        run.cache.gc(0)
    assert run.cache.gc(0).objects == 0


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from pipeline.run import Run
from profiles.schema import Profile
here = Path({here!r})
resume = {resume}
with (Run.resume(here) if resume else Run.create(here, Profile(name="local", target="local"))) as run:
    for n in range(40):
        run.journalled("round", n, lambda: n * n)
        run.finished("round", 0.0, str(n))
        print(n, flush=True)
        if not resume:
            time.sleep(0.02)
"""


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_journal(tmp_path: Path):
    def script(resume: bool) -> list[str]:
        return [sys.executable, "-c", KILLED.format(root=str(ROOT), here=str(tmp_path), resume=resume)]

    with subprocess.Popen(script(False), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout is not None
        while first.stdout.readline().strip() != "5":
            assert first.poll() is None
        time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    assert read_state(next((tmp_path / "runs").iterdir()))["status"] == "running"
    subprocess.run(script(True), check=True, capture_output=True, timeout=60)
    path = next((tmp_path / "runs").iterdir())
    assert Journal(path / "journal").entries("round") == [n * n for n in range(40)]
    assert read_state(path)["status"] == "done"
