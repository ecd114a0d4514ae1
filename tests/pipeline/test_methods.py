"""Methods compose: any criterion with any solver, any repair and any hook, in whole builds on the simulated device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_project import problems, request, run_of, write_project

from pipeline.flow import build
from pipeline.prune.criteria.base import PACKAGE as CRITERIA
from pipeline.prune.repair import MODES
from pipeline.recover.train import HOOKS
from pipeline.run import read_state
from profiles import plugins

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")


SOLVERS = plugins.names("pipeline.latency.solvers")
NAMES = plugins.names(CRITERIA)


@pytest.mark.parametrize("turn", range(max(len(NAMES), len(SOLVERS))), ids=lambda turn: NAMES[turn % len(NAMES)])
def test_every_criterion_solver_repair_and_hook_comes_through_a_build_with_others(tmp_path: Path, turn: int):
    """Each file of the four folders at least once."""
    hooks = plugins.names(HOOKS)
    prune = {
        "criterion": NAMES[turn % len(NAMES)], "solver": SOLVERS[turn % len(SOLVERS)],
        "repair": MODES[turn % len(MODES)], "rounds": 1, "calibration": 96,
    }  # fmt: skip
    recover = {"epochs": 1, "hooks": [hooks[turn % len(hooks)]]}
    result = build(
        request(write_project(tmp_path / "tiny"), tmp_path / "root", overrides={"prune": prune, "recover": recover})
    )
    summary = result.summary
    assert summary["verdict"] in ("met", "accuracy missed"), summary
    assert 0 < summary["latency_ratio"] <= summary["latency_ratio_interval"][1] <= 0.6
    assert problems(run_of(result) / ("bundle" if summary["verdict"] == "met" else "rejected")) == []


@pytest.mark.parametrize(
    ("prune", "hooks"),
    [
        ({"criterion": "qsfm-psnr", "solver": "beam", "repair": "merge"}, ["ccm"]),
        ({"criterion": "obs", "solver": "netadapt", "repair": "layerwise"}, []),
        ({"criterion": "lda-deconv", "solver": "threshold", "normalise": "ms", "repair": "bn"}, ["push"]),
        ({"criterion": "red", "solver": "genetic", "repair": "least-squares"}, ["l2-start"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "+".join(value) or "no hook",
)
def test_a_build_with_other_methods_keeps_the_budget_and_leaves_a_bundle_that_verifies(
    tmp_path: Path, prune: dict[str, Any], hooks: list[str]
):
    project = write_project(tmp_path / "tiny")
    overrides = {"prune": {**prune, "rounds": 2}, "recover": {"hooks": hooks}}
    result = build(request(project, tmp_path / "root", overrides=overrides))
    summary = result.summary
    folder = run_of(result)
    assert summary["verdict"] in ("met", "accuracy missed"), summary
    assert 0 < summary["latency_ratio"] <= summary["latency_ratio_interval"][1] <= 0.6
    bundle = folder / ("bundle" if summary["verdict"] == "met" else "rejected")
    assert problems(bundle) == []
    assert prune["repair"] in {row.name for row in result.report.repairs} if result.report else False
    assert read_state(folder)["status"] == ("done" if summary["verdict"] == "met" else "missed")
