"""Before a recovery the chosen plan is measured by the accepting protocol: no training is spent on a missed budget."""

from __future__ import annotations

import io
import json
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_project import replace, request, run_of, write_project

from pipeline import flow, ondevice
from pipeline.flow import BuildResult, build
from pipeline.journal import Journal
from pipeline.latency.feedback import corrected
from pipeline.run import BuildRequest
from pipeline.search import Measured, Search
from profiles.errors import MissedError

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
WIDE, NARROW = 1.5, 1.0 + 1e-9


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "tiny")


def sessions(result: BuildResult, name: str) -> int:
    return len(Journal(run_of(result) / "journal").entries(f"session {name}"))


def recoveries(result: BuildResult) -> int:
    return (run_of(result) / "log").read_text().count("recover finished")


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the search's short measurements say: `center` times the truth, bounds `wide` times that."""
    told, measured = {"center": 1.0, "wide": WIDE}, ondevice.measure_plans

    def measure(*asked: Any) -> list[Any]:
        made = []
        for each in measured(*asked):
            ratio = each.ratio * told["center"]
            made.append(changed(each, ratio=ratio, low=ratio / told["wide"], high=ratio * told["wide"]))
        return made

    monkeypatch.setattr(ondevice, "measure_plans", measure)
    return told


def test_a_plan_that_the_search_flattered_is_given_up_before_anything_is_trained(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_measurements: dict[str, float]
):
    """The first search believes all plans to be a third faster than they are; the second sees them as they are."""
    short_measurements["center"] = 0.7
    accept_plan, run, judged, known = ondevice.accept_plan, Search.run, [], []

    def accepted(*asked: Any) -> Any:
        found = accept_plan(*asked)
        judged.append(found[1])
        short_measurements["center"] = 1.0
        return found

    def searched(self: Search) -> Any:
        known.append([ratio for _, _, ratio in self.known])
        return run(self)

    monkeypatch.setattr(ondevice, "accept_plan", accepted)
    monkeypatch.setattr(Search, "run", searched)
    result = build(request(project, tmp_path / "root"))
    assert [each.verdict for each in judged] == ["missed", "met"]
    assert known[0] == [] and known[1][-1] == pytest.approx(judged[0].value) and max(known[1][:-1]) < judged[0].value
    assert result.exit_code == 0 and result.summary["latency_ratio"] <= 0.6
    assert recoveries(result) == 1 and sessions(result, "accept plan") == 2 and sessions(result, "accept") == 1


def test_a_short_session_that_was_disturbed_is_taken_again_and_the_second_one_counts(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measure, together, believed = ondevice.measure, ondevice._measure_together, []

    def disturbed(work: Any, name: str, *asked: Any) -> Any:
        session = measure(work, name, *asked)
        return changed(session, telemetry={"overcurrent_events": 1.0}) if name == "round 1" else session

    def told(work: Any, dense: Any, name: str, plans: Any) -> Any:
        made = together(work, dense, name, plans)
        believed.extend(each.device for each in made)
        return made

    monkeypatch.setattr(ondevice, "measure", disturbed)
    monkeypatch.setattr(ondevice, "_measure_together", told)
    result = build(request(project, tmp_path / "root"))
    assert sessions(result, "round 1") == sessions(result, "round 1 again") == 1
    assert sessions(result, "confirm 1 again") == 0 and believed and None not in believed


def test_where_the_search_leaves_nothing_open_the_plan_is_not_accepted_first(
    project: Path, tmp_path: Path, short_measurements: dict[str, float]
):
    short_measurements["wide"] = NARROW
    result = build(request(project, tmp_path / "root"))
    assert result.exit_code == 0 and recoveries(result) == 1 and sessions(result, "accept plan") == 0


def test_without_a_recovery_the_accepting_measurement_is_the_only_one(
    project: Path, tmp_path: Path, short_measurements: dict[str, float]
):
    result = build(request(project, tmp_path / "root", overrides={"recover": {"epochs": 0}}))
    assert result.exit_code == 0 and sessions(result, "accept plan") == 0 and sessions(result, "accept") == 1


@pytest.mark.parametrize("refused", [False, True])
def test_where_nothing_tighter_is_found_the_plan_that_was_not_accepted_is_carried_out(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_measurements: dict[str, float],
    refused: bool,
):
    """Its network, accuracy and latency are what the user wants to see of a budget that could not be kept.

    refused: the tighter budget is below the narrowest network.
    """
    short_measurements["center"] = 0.7
    run, searches = Search.run, []

    def searched(self: Search) -> Any:
        searches.append(self.ratio)
        if refused and len(searches) > 1:
            raise MissedError("the budget cannot be met.")
        found = run(self)
        return found if len(searches) == 1 else changed(found, chosen=None)

    monkeypatch.setattr(Search, "run", searched)
    replace(project / "deploy.toml", "max_drop = 0.05", "max_drop = 1.0")
    result = build(request(project, tmp_path / "root"))
    assert len(searches) == 2 and searches[1] < searches[0] == 0.6
    assert result.exit_code == 3 and result.summary["verdict"] == "missed" and result.summary["latency_ratio"] > 0.6
    assert (run_of(result) / "rejected" / "model.onnx").is_file() and result.summary["accuracy"] > 0.5
    assert recoveries(result) == 1 and sessions(result, "accept plan") == sessions(result, "accept") == 1


def test_a_trained_network_is_not_given_up_for_a_plan_that_was_not_accepted(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_measurements: dict[str, float]
):
    """The first plan leaves no doubt and is trained, the second is not accepted, and nothing tighter is found."""
    short_measurements |= {"center": 0.7, "wide": NARROW}
    run, plans = Search.run, []

    def searched(self: Search) -> Any:
        if len(plans) == 2:
            raise MissedError("the budget cannot be met.")
        found = run(self)
        assert found.chosen is not None
        plans.append(found.chosen.plan)
        if len(plans) == 2:  # the first once more, and in doubt
            doubtful = changed(found.chosen, measured=Measured(0.6, 0.5, 0.7, 1.0))
            return changed(found, chosen=doubtful)
        return found

    def turned_down(work: Any, dense: Any, base: Any, plan: Any) -> Any:
        return ondevice.accept(work, dense, base.path("onnx"), "accept plan")  # the dense network itself

    monkeypatch.setattr(Search, "run", searched)
    monkeypatch.setattr(ondevice, "accept_plan", turned_down)
    result = build(request(project, tmp_path / "root"))
    assert len(plans) == 2 and recoveries(result) == 1 and sessions(result, "accept plan") == 1
    shipped = json.loads((run_of(result) / "rejected" / "plan.json").read_text())
    assert result.exit_code == 3 and shipped == json.loads(plans[0].to_json())


def test_a_budget_in_milliseconds_is_in_doubt_whatever_the_ratio_says(
    project: Path, tmp_path: Path, short_measurements: dict[str, float]
):
    """It is judged by other numbers: the slowest process against the limit."""
    short_measurements["wide"] = NARROW
    first = build(request(project, tmp_path / "first", overrides={"recover": {"epochs": 0}}))
    limit = 0.6 * first.summary["dense_ms"]
    result = build(request(project, tmp_path / "second", budget=f"{limit:.4f}ms"))
    assert result.exit_code == 0 and sessions(result, "accept plan") == 1 and recoveries(result) == 1


def test_where_rewrites_are_still_to_be_tried_the_plan_is_not_accepted_first(
    project: Path, tmp_path: Path, short_measurements: dict[str, float]
):
    result = build(request(project, tmp_path / "root", overrides={"graph": {"candidates": ["uneven-depthwise"]}}))
    assert sessions(result, "accept plan") == 0 and sessions(result, "accept") == 1


def test_a_build_killed_after_its_plan_was_accepted_does_not_measure_it_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_measurements: dict[str, float]
):
    with monkeypatch.context() as patched:
        patched.setattr(flow, "_repair", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(request(project, tmp_path / "root"))
    [run] = (tmp_path / "root" / "runs").iterdir()
    assert len(Journal(run / "journal").entries("session accept plan")) == 1
    result = build(BuildRequest.again(run, Console(file=io.StringIO(), width=200)))
    assert result.exit_code == 0 and sessions(result, "accept plan") == 1 and recoveries(result) == 1


def test_a_plan_is_known_by_what_the_accepting_protocol_said_of_it_and_not_by_what_was_said_before():
    flattering, other = ({"g": 8, "h": 16}, ("b", "a"), 0.4), ({"g": 8, "h": 8}, ("a", "b"), 0.3)
    now = {"h": 16, "g": 8}, frozenset({"a", "b"}), 0.5
    assert corrected([flattering, other, flattering], now) == [other, now]
