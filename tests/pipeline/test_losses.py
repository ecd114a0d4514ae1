"""What plans lose after a short recovery, and what rankings and losses are remembered by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_project import write_project

from pipeline import flow, losses, outcome, prepare
from pipeline.nouns import KeepUnits, LatencyTable, PruningPlan, Ranking, Sensitivity
from pipeline.project import load_project
from pipeline.prune import repair as repair_module
from pipeline.prune import sensitivity
from pipeline.prune.evidence import Samples, divergence
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune
from pipeline.prune.taps import DenseTaps
from pipeline.recover.train import RecoverData, recover
from pipeline.run import Run
from pipeline.stage import code_digest
from pipeline.work import Work, captured
from profiles.schema import Budget, load_profile
from targets.base import load_target

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    project, profile = load_project(write_project(tmp_path / "tiny")), load_profile("simulated")
    network, batches = captured(project, project.model(), profile.prune).network, project.calibration(96)
    target = load_target(profile, tmp_path / ".deploy")
    with Run.create(tmp_path, profile) as run:
        samples = Samples(batches.inputs, batches.targets)
        yield Work(run, profile, Budget.parse("0.6x"), target, project, network, samples)


def halved(work: Work, keep: int = 2) -> PruningPlan:
    return PruningPlan(tuple(KeepUnits(g.id, tuple(range(g.size // keep))) for g in work.topology.offered))


def test_a_short_recovery_is_judged_on_samples_that_the_repair_did_not_learn_from(work: Work):
    plan, train = halved(work), work.project.train
    fitted, judged = work.samples.first(64), tuple(x[64:] for x in work.samples.joined())
    fixed = repair(prune(work.network, plan), work.network, plan, fitted)
    data = RecoverData(lambda *asked: islice(train(*asked), losses.SHORT_STEPS), work.project.loss, None)
    spec = work.profile.recover.model_copy(update={"epochs": 1, "hooks": ()})
    done = recover(fixed, work.network.graph, data, spec, work.scratch("other.checkpoint"))
    with torch.no_grad():
        expected = float(divergence((done.module(*judged),), (work.network.graph(*judged),)).mean())
    assert losses.after_recovery(work, losses.probe(work))(plan) == pytest.approx(expected, rel=1e-4)


def test_short_recoveries_share_what_does_not_depend_on_the_plan(work: Work, monkeypatch: pytest.MonkeyPatch):
    made = []

    class Counted(DenseTaps):
        def __init__(self, *given: object) -> None:
            made.append(given)
            super().__init__(*given)

    monkeypatch.setattr(sensitivity, "DenseTaps", Counted)
    monkeypatch.setattr(repair_module, "DenseTaps", Counted)
    loss = losses.after_recovery(work, losses.probe(work))
    assert 0 < loss(halved(work)) < loss(halved(work, 8)) and len(made) == 1


# --- losses that are infinite ---------------------------------------------------------------------------------------


class Overflowing:
    """A probe of a network that overflows after every cut of more than half of a group, and without any block."""

    def __init__(self, work: Work) -> None:
        self.network = work.network

    def loss(self, plan: PruningPlan) -> float:
        sizes = {group.id: group.size for group in self.network.topology.groups}
        ruined = plan.dropped or any(2 * len(kept) < sizes[id] for id, kept in plan.kept.items())
        return math.inf if ruined else 0.125


def test_infinite_values_of_single_cuts_are_kept_and_known_again(work: Work):
    flow._rank(work)
    offered = [group for group in work.topology.offered if group.size >= 4]
    choices = {group.id: (group.size // 4, group.size // 2, group.size) for group in offered}
    table = LatencyTable((), choices, 1, 1.0)
    first, again = (losses.values(work, lambda: Overflowing(work), table) for _ in range(2))
    assert offered and first == again and work.run.stages["values"]["reused"]
    for group in offered:
        assert list(first.groups[group.id].values()) == [math.inf, 0.125, 0.0]
    assert set(first.blocks.values()) <= {math.inf}


def test_a_dry_run_whose_plan_ruins_the_network_says_so(work: Work, monkeypatch: pytest.MonkeyPatch):
    def ruined(probe: object, rankings: dict[str, Ranking], *_: object, **__: object) -> Sensitivity:
        sizes = {group.id: group.size for group in work.topology.offered}
        return Sensitivity({id: {1: math.inf, sizes[id] - 1: math.inf, sizes[id]: 0.0} for id in rankings}, {})

    monkeypatch.setattr(losses, "measure", ruined)
    told = flow._dry(work).summary
    assert told["loss"] is None and json.loads(json.dumps(told, allow_nan=False))["loss"] is None
    assert flow.RUINED in told["notes"] and f"note: {flow.RUINED}" in (work.run.path / "log").read_text()


def test_a_way_of_repairing_that_ruins_the_network_is_told_as_infinite(work: Work, monkeypatch: pytest.MonkeyPatch):
    flow._rank(work)
    monkeypatch.setattr(flow, "mean_divergence", lambda *_: math.inf)
    flow._repair(work, halved(work))
    assert {row.loss for row in outcome._repairs(work)} == {math.inf}


# --- what is remembered ---------------------------------------------------------------------------------------------


def ranked(work: Work) -> tuple[dict[str, Ranking], bool]:
    fresh = replace(work, rankings={})
    flow._rank(fresh)
    return fresh.rankings, bool(fresh.run.stages["rank"]["reused"])


def test_other_calibration_samples_of_the_same_count_are_ranked_again_and_the_same_ones_are_not(work: Work):
    first, reused = ranked(work)
    assert not reused and ranked(work) == (first, True)
    turned = Samples([tuple(x.flip(2) for x in batch) for batch in work.samples.inputs], work.samples.targets)
    other, reused = ranked(replace(work, samples=turned))
    assert not reused and other != first
    relabelled = replace(work.samples, targets=work.samples.targets.flip(0))
    assert not ranked(replace(work, samples=relabelled))[1]
    assert ranked(work) == (first, True)


def test_rankings_of_other_code_are_made_again(work: Work, monkeypatch: pytest.MonkeyPatch):
    ranked(work)
    keys = work.sampled
    monkeypatch.setattr("pipeline.work.code_digest", lambda package: f"another {package}")
    assert replace(work).sampled["code"] != keys["code"] == code_digest("pipeline.prune")
    assert not ranked(replace(work))[1]


def test_what_other_code_trained_is_trained_again(work: Work, monkeypatch: pytest.MonkeyPatch):
    plan = halved(work)
    fixed = repair(prune(work.network, plan), work.network, plan, work.samples)

    def reused(training: str) -> list[bool]:
        digests = {"pipeline.recover": training, "pipeline.prune": "the same"}
        monkeypatch.setattr("pipeline.work.code_digest", digests.__getitem__)
        fresh = replace(work)
        flow._recover(fresh, plan, fixed)
        prepare.trained(fresh, prepare.Grown(work.network))
        return [bool(fresh.run.stages[name]["reused"]) for name in ("recover", "prepare")]

    assert [reused("one"), reused("one"), reused("two")] == [[False] * 2, [True] * 2, [False] * 2]


def test_losses_after_a_recovery_by_other_code_are_measured_again(work: Work, monkeypatch: pytest.MonkeyPatch):
    found: list[int] = []

    def loss(training: str) -> float:
        digests = {"pipeline.recover": training, "pipeline.prune": "the same"}
        monkeypatch.setattr("pipeline.work.code_digest", digests.__getitem__)
        return losses.remembered(
            replace(work), "loss", {}, halved(work), lambda: found.append(0) or len(found), trained=True
        )

    assert [loss("one"), loss("one"), loss("two")] == [1, 1, 2]


def test_the_digest_of_code_is_of_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "digested").mkdir()
    for name in ("__init__", "one"):
        (tmp_path / "digested" / f"{name}.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("digested")
    before = code_digest.__wrapped__("digested")
    assert code_digest.__wrapped__("digested") == before
    (tmp_path / "digested" / "one.py").write_text("x = 2\n")
    changed = code_digest.__wrapped__("digested")
    (tmp_path / "digested" / "one.py").rename(tmp_path / "digested" / "two.py")
    assert len({before, changed, code_digest.__wrapped__("digested")}) == 3
