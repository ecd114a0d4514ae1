"""Before a recovery the chosen plan is measured by the accepting protocol: no training is spent on a missed budget."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
from tiny_project import replace, request, run_of, write_project

from pipeline import ondevice
from pipeline.flow import BuildResult, build
from pipeline.journal import Journal
from pipeline.search import Search

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
    """The first search believes all plans to be a fifth faster than they are; the second sees them as they are."""
    short_measurements["center"] = 0.8
    confirm, run, judged, known = ondevice.confirm, Search.run, [], []

    def confirmed(*asked: Any) -> Any:
        found = confirm(*asked)
        judged.append(found[1])
        short_measurements["center"] = 1.0
        return found

    def searched(self: Search) -> Any:
        known.append([ratio for _, _, ratio in self.known])
        return run(self)

    monkeypatch.setattr(ondevice, "confirm", confirmed)
    monkeypatch.setattr(Search, "run", searched)
    result = build(request(project, tmp_path / "root"))
    assert [each.verdict for each in judged] == ["missed", "met"]
    assert known[0] == [] and known[1][0] == pytest.approx(judged[0].value) and max(known[1][1:]) < judged[0].value
    assert result.exit_code == 0 and result.summary["latency_ratio"] <= 0.6
    assert recoveries(result) == 1 and sessions(result, "confirm") == 2 and sessions(result, "accept") == 1


def test_where_the_search_leaves_nothing_open_nothing_is_confirmed(
    project: Path, tmp_path: Path, short_measurements: dict[str, float]
):
    short_measurements["wide"] = NARROW
    result = build(request(project, tmp_path / "root"))
    assert result.exit_code == 0 and recoveries(result) == 1 and sessions(result, "confirm") == 0


def test_without_a_recovery_the_accepting_measurement_is_the_only_one(
    project: Path, tmp_path: Path, short_measurements: dict[str, float]
):
    result = build(request(project, tmp_path / "root", overrides={"recover": {"epochs": 0}}))
    assert result.exit_code == 0 and sessions(result, "confirm") == 0 and sessions(result, "accept") == 1


def test_where_nothing_tighter_is_found_the_plan_that_was_not_confirmed_is_carried_out(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_measurements: dict[str, float]
):
    """Its network, accuracy and latency are what the user wants to see of a budget that could not be kept."""
    short_measurements["center"] = 0.8
    run, searches = Search.run, []

    def searched(self: Search) -> Any:
        searches.append(self.ratio)
        found = run(self)
        return found if len(searches) == 1 else changed(found, chosen=None)

    monkeypatch.setattr(Search, "run", searched)
    replace(project / "deploy.toml", "max_drop = 0.05", "max_drop = 1.0")
    result = build(request(project, tmp_path / "root"))
    assert len(searches) == 2 and searches[1] < searches[0] == 0.6
    assert result.exit_code == 3 and result.summary["verdict"] == "missed" and result.summary["latency_ratio"] > 0.6
    assert (run_of(result) / "rejected" / "model.onnx").is_file() and result.summary["accuracy"] > 0.5
    assert recoveries(result) == 1 and sessions(result, "confirm") == sessions(result, "accept") == 1
