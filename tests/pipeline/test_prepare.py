"""What is done to the dense network before it is pruned: trained with hooks, grown by what fits, and all of it kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from test_resume import ENVIRONMENT, files, resume, start, stop
from tiny_project import PROJECT, problems, replace, request, run_of, stages, write_project

from pipeline import flow, prepare
from pipeline.flow import BuildResult, build
from pipeline.nouns import AddBranch, Dim, LatencyTable, PruningPlan, Sensitivity, Site, SiteCost, Widen
from pipeline.prepare import Proposal, chosen, propose
from pipeline.project import load_project
from pipeline.prune.evidence import Samples
from pipeline.release.verify import read_manifest
from pipeline.run import Run, read_state
from pipeline.work import Work, captured, rebuilt
from profiles.errors import ScarceError, UsageError
from profiles.schema import Budget, PrepareSpec, Profile, PruneSpec, load_profile
from targets.base import load_target
from targets.harness.measurement import Session
from targets.simulated import Simulated

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
INCEPTION = """
import torch
from torch import nn


def conv(into, out, size=3):
    return nn.Sequential(nn.Conv2d(into, out, size, padding=size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Unit(nn.Module):
    def __init__(self, into, width):
        super().__init__()
        self.one, self.three = conv(into, width, 1), nn.Sequential(conv(into, width, 1), conv(width, width))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x)], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.units = conv(1, 16), nn.Sequential(Unit(16, 16), Unit(32, 16))
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(self.units(self.stem(x)), 2).flatten(1))


def net():
    return Net()
"""
PUSHED = {"prepare": {"epochs": 2, "hooks": ["push"]}, "prune": {"rounds": 2}}
GROWN = {"prepare": {"epochs": 2, "hooks": ["push"], "grow": True}, "prune": {"rounds": 2}}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult, list[dict[str, np.ndarray[Any, Any]]]]:
    """A project, its build with a push before pruning, and the weights of the teacher of every training."""
    torch.set_num_threads(1)
    folder, teachers = tmp_path_factory.mktemp("pushed"), []

    def watched(inner):
        def recover(student, teacher, *rest, **named):
            teachers.append({name: value.numpy().copy() for name, value in teacher.state_dict().items()})
            return inner(student, teacher, *rest, **named)

        return recover

    with pytest.MonkeyPatch.context() as patch:
        for module in (flow, prepare):
            patch.setattr(module, "recover", watched(module.recover))
        project = write_project(folder / "tiny")
        return project, build(request(project, folder / "root", overrides=PUSHED)), teachers


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    """An untrained network of concatenations, and its build with more time than it takes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("grown")
    project = inception(folder / "tiny")
    over = {**GROWN, "prepare": {**GROWN["prepare"], "epochs": 4, "grow_to": 1.45}}
    return project, build(request(project, folder / "root", overrides=over, budget="1.2x"))


def inception(folder: Path) -> Path:
    project = write_project(folder)
    (project / "tinynet.py").write_text(INCEPTION)
    replace(project / "deploy.toml", 'weights = "tiny.safetensors"\n', "")
    return project


def bundle_of(result: BuildResult) -> Path:
    assert result.bundle is not None, result.summary
    return result.bundle


def infer(model: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])


def images(count: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(count, 1, 8, 8)).astype(np.float32)


def truth(bundle: Path) -> float:
    target: Any = load_target(load_profile("simulated"), bundle.parent)
    return float(target.true_ms(bundle / "model.onnx") / target.true_ms(bundle / "dense.onnx"))


# --- training before pruning -----------------------------------------------------------------------------------------


def test_without_being_asked_for_nothing_is_prepared(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    result = build(request(project, tmp_path / "root", overrides={"prune": {"rounds": 1}}))
    assert not {"prepare", "prepared", "grow"} & stages(result).keys()


def test_a_pushed_network_is_pruned_and_released_and_judged_against_the_given_one(pushed):
    project, result, _ = pushed
    bundle = bundle_of(result)
    assert result.exit_code == 0 and problems(bundle) == []
    given = load_project(project).model()
    with torch.inference_mode():
        want = given(torch.from_numpy(images())).numpy()
    assert np.allclose(infer(bundle / "dense.onnx", images()), want, atol=1e-4), "dense.onnx is the user's own network"
    assert result.summary["latency_ratio"] == pytest.approx(truth(bundle), rel=0.01)
    plan = PruningPlan.from_json((bundle / "plan.json").read_text())
    assert plan.growth == () and plan.edits
    spec = Profile.model_validate_json((run_of(result) / "profile.json").read_text()).prune
    again = rebuilt(load_project(project), plan, load_file(bundle / "pruned.safetensors"), spec)
    with torch.inference_mode():
        assert np.allclose(infer(bundle / "model.onnx", images()), again(torch.from_numpy(images())).numpy(), atol=1e-4)


def test_the_accuracy_reference_is_that_of_a_build_without(pushed, tmp_path: Path):
    project, result, _ = pushed
    plain = build(request(project, tmp_path / "root", overrides={"prune": {"rounds": 1}}))
    assert result.summary["accuracy_dense"] == plain.summary["accuracy_dense"]
    assert result.summary["parameters_dense"] == plain.summary["parameters_dense"]


def test_every_training_follows_the_users_own_network(pushed):
    project, _, teachers = pushed
    own = load_project(project).model().state_dict()
    assert len(teachers) == 2, "the preparation and the recovery"
    for teacher in teachers:
        assert all(np.array_equal(teacher[name], value.numpy()) for name, value in own.items())


def test_what_is_pruned_was_trained_and_the_report_says_so(pushed):
    project, result, _ = pushed
    done = stages(result)["prepare"]
    root = run_of(result).parents[1]
    made = list((root / ".deploy" / "objects").rglob(f"{done['outputs']['weights']}*"))
    assert len(made) == 1
    prepared, own = load_arrays(made[0]), load_project(project).model().state_dict()
    assert prepared.keys() == own.keys()
    assert not np.allclose(prepared["head.weight"], own["head.weight"].numpy(), atol=1e-3)
    assert result.report is not None
    assert any("trained for 2 epochs with push" in note for note in result.report.notes)
    assert list(stages(result)).index("prepare") < list(stages(result)).index("rank")


def test_a_preparation_is_worked_once_for_the_same_settings_only(pushed, tmp_path: Path):
    project, result, _ = pushed
    root = run_of(result).parents[1]
    again = build(request(project, root, overrides=PUSHED, out=tmp_path / "again"))
    assert stages(again)["prepare"]["reused"] == 1
    assert stages(again)["rank"]["reused"] == 1, "what follows is known too"
    other = {**PUSHED, "prepare": {"epochs": 1, "hooks": ["push"]}}
    other_run = build(request(project, root, overrides=other, out=tmp_path / "other"))
    assert stages(other_run)["prepare"]["reused"] == 0
    assert stages(other_run)["rank"]["key"] != stages(again)["rank"]["key"]


def test_the_tables_of_both_files_are_one(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    replace(project / "deploy.toml", "[recover]\n", '[prepare]\nhooks = ["push"]\n[recover]\n')
    result = build(request(project, tmp_path / "root", overrides={"prepare": {"epochs": 1}, "prune": {"rounds": 1}}))
    settings = json.loads((run_of(result) / "profile.json").read_text())["prepare"]
    assert settings["hooks"] == ["push"] and settings["epochs"] == 1 and settings["grow"] is False


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 2}, "prepare.epochs is 2, which needs training data, and the project has no data.train."),
        ({"grow": True}, "prepare.grow needs training, and prepare.epochs is 0."),
        ({"hooks": ["push"]}, "prepare.hooks (push) needs training, and prepare.epochs is 0."),
        ({"epochs": 1, "hooks": ["pushh"]}, "no hook"),
    ],
)
def test_what_cannot_be_prepared_is_said_before_any_work(tmp_path: Path, settings: dict[str, Any], said: str):
    project = write_project(tmp_path / "tiny")
    if "pushh" not in settings.get("hooks", ()):
        replace(project / "deploy.toml", 'train = "tinydata:train"\n', "")
    with pytest.raises(UsageError) as told:
        build(request(project, tmp_path / "root", overrides={"prepare": settings}))
    assert said in told.value.message
    assert not (tmp_path / "root" / "runs").exists() and not (tmp_path / "root" / ".deploy" / "keys").exists()


@pytest.mark.parametrize("table", ["prepare", "recover"])
def test_a_misspelt_hook_is_told_by_the_command_line_at_once(table: str, tmp_path: Path):
    asked = ["build", "--target", "simulated", "--project", str(tmp_path), "--budget", "0.5x"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *asked, "--set", f"{table}.hooks=['pusch']"],
        cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "pusch" in done.stderr and "push" in done.stderr.replace("pusch", "")


def test_a_dry_run_trains_nothing_and_says_so(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    asked = request(project, tmp_path / "root", overrides=PUSHED, dry_run=True)
    result = build(asked)
    assert "prepare" not in stages(result)
    assert "note: a dry run trains nothing" in (run_of(result) / "log").read_text()


def test_a_build_killed_while_preparing_ends_with_the_same_bundle(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    (project / "deploy.toml").write_text(PROJECT + '[prepare]\nepochs = 12\nhooks = ["push"]\n')
    settings = {"recover": {"epochs": 8, "patience": 8}}
    whole = build(request(project, tmp_path / "whole", overrides=settings))
    run = tmp_path / "run"
    process = start(project, tmp_path / "root", run)
    stop(process, signal.SIGKILL, lambda: (run / "work" / "prepare.checkpoint").exists())
    assert "prepare" not in read_state(run)["stages"], "it was killed inside of it"
    result = resume(run)
    one, two = files(bundle_of(whole)), files(bundle_of(result))
    for name in ("model.onnx", "plan.json", "pruned.safetensors"):
        assert one[name] == two[name], name


# --- growing ---------------------------------------------------------------------------------------------------------


def test_a_network_grows_into_the_slack_and_its_bundle_keeps_the_budget(grown):
    _, result = grown
    bundle = bundle_of(result)
    assert result.exit_code == 0 and problems(bundle) == []
    plan = PruningPlan.from_json((bundle / "plan.json").read_text())
    kinds = {type(edit) for edit in plan.growth}
    assert kinds == {Widen, AddBranch} and plan.kept, "it grew by both, and was pruned afterwards"
    assert list(plan.edits[: len(plan.growth)]) == list(plan.growth)
    assert 1.0 < truth(bundle) <= 1.2
    assert result.summary["latency_ratio"] == pytest.approx(truth(bundle), rel=0.01)
    assert result.summary["accuracy"] > result.summary["accuracy_dense"] + 0.3
    assert any(note.startswith("the network grew by ") for note in result.report.notes)


def test_a_grown_network_is_built_again_from_factory_plan_and_weights(grown):
    project, result = grown
    bundle = bundle_of(result)
    plan = PruningPlan.from_json((bundle / "plan.json").read_text())
    spec = Profile.model_validate_json((run_of(result) / "profile.json").read_text()).prune
    again = rebuilt(load_project(project), plan, load_file(bundle / "pruned.safetensors"), spec)
    with torch.inference_mode():
        assert np.allclose(infer(bundle / "model.onnx", images()), again(torch.from_numpy(images())).numpy(), atol=1e-4)


def test_figures_of_a_grown_network_are_counted_from_the_given_one(grown):
    project, result = grown
    own = load_project(project).model()
    assert result.summary["parameters_dense"] == sum(p.numel() for p in own.parameters())
    report = result.report
    assert report is not None and report.pruned.predicted_ms is not None and report.pruned.measured_ms is not None
    assert report.pruned.predicted_ms == pytest.approx(report.pruned.measured_ms, rel=0.1)
    shipped = [point for point in report.points if point.shipped]
    assert shipped and shipped[0].latency_ms == pytest.approx(report.pruned.measured_ms, rel=0.1)
    assert read_manifest(bundle_of(result)).sources == {"project": load_project(project).digest()}


def test_what_it_grew_by_was_measured_together_and_keeps_the_limit(grown):
    _, result = grown
    run, limit = run_of(result), 1.45 * 1.2
    entries = [json.loads(line) for line in (run / "journal").read_text().splitlines()]
    sessions = {entry["name"]: entry["value"] for entry in entries if entry["name"].startswith("session growth")}
    assert sorted(sessions) == ["session growth", "session growth together"]
    session = Session.from_json(sessions["session growth together"])
    highs = {
        name: max(session.ratio(name, each).high for each in ("dense", "dense-again"))
        for name in session.measurements if name.startswith("grown-")
    }  # fmt: skip
    count = len(PruningPlan.from_json((bundle_of(result) / "plan.json").read_text()).growth)
    assert f"grown-{count}" == max(name for name, high in highs.items() if high <= limit)
    target: Any = load_target(load_profile("simulated"), run)
    took = target.true_ms(run / "work" / f"grown-{count}.onnx") / target.true_ms(bundle_of(result) / "dense.onnx")
    assert 1.2 < took <= limit


def test_the_seed_of_the_preparation_draws_the_weights_that_the_network_grows_by(tmp_path: Path):
    project, given = load_project(inception(tmp_path / "tiny")), load_profile("simulated")
    torch.manual_seed(0)
    network, samples = captured(project, project.model(), given.prune).network, project.calibration(8)
    wider = next(group for group in network.topology.offered if group.name == "units.0.one.0")
    growth = (Widen(wider.id, wider.size + 8), AddBranch("cat", 8))

    def grown(work: Work) -> tuple[dict[str, torch.Tensor], str]:
        found = prepare._regrown(work, growth)
        prepare.trained(work, prepare.Grown(found, growth))
        return found.graph.state_dict(), str(work.run.stages["prepare"]["key"])

    with Run.create(tmp_path, given) as run:
        target, known = load_target(given, tmp_path / ".deploy"), Samples(samples.inputs, samples.targets)
        profiles = [given.model_copy(update={"prepare": PrepareSpec(seed=seed)}) for seed in (3, 3, 4)]
        works = [Work(run, each, Budget.parse("1.2x"), target, project, network, known) for each in profiles]
        (first, key), (again, same), (other, another) = (grown(work) for work in works)
    assert all(torch.equal(value, again[name]) for name, value in first.items()) and key == same != another
    changed = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert changed == {"units.0.one.0.weight", "cat_branch.0.weight", "cat_branch.3.weight"}


def test_where_nothing_fits_the_network_stays_and_the_build_goes_on(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    over = {**GROWN, "prepare": {**GROWN["prepare"], "grow_to": 1.001}}
    result = build(request(project, tmp_path / "root", overrides=over))
    assert result.exit_code == 0
    assert PruningPlan.from_json((bundle_of(result) / "plan.json").read_text()).growth == ()
    (note,) = (note for note in result.report.notes if note.startswith("the network did not grow"))
    assert "the limit is 1.001x" in note


def test_a_device_that_cannot_hold_all_that_may_grow_measures_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held, measure = [], Simulated.measure

    def scarce(device: Simulated, artifacts: Mapping[str, Path], *asked: Any) -> Session:
        if len(artifacts) > 3:
            raise ScarceError("not enough memory to measure 'growth-2': out of memory.")
        held.append(list(artifacts)[-1])
        return measure(device, artifacts, *asked)

    monkeypatch.setattr(Simulated, "measure", scarce)
    over = {"prepare": {"epochs": 1, "grow": True}, "prune": {"rounds": 1}}
    result = build(request(inception(tmp_path / "tiny"), tmp_path / "root", overrides=over, budget="1.2x"))
    assert {"growth-1", "growth-2", "grown-1"} <= set(held)
    assert any(note.startswith("the network grew by ") for note in result.report.notes)
    assert not (run_of(result) / "work" / "grown-1.onnx").exists(), "it is what was built to be measured alone"


# --- what to grow by -------------------------------------------------------------------------------------------------


def test_proposals_come_by_what_their_cuts_lose_per_millisecond(tmp_path: Path):
    project = load_project(inception(tmp_path / "tiny"))
    network = captured(project, project.model(), PruneSpec()).network
    groups = network.topology.offered
    sites = tuple(SiteCost(Site(g.id, "conv", (Dim(((g.id, 1),)),), ()), {(8,): 1.0, (16,): 2.0}) for g in groups)
    table = LatencyTable(sites, {g.id: (8, 16) for g in groups}, 8, 2.0 * len(groups))
    losses = {g.id: {8: float(place), 16: 0.0} for place, g in enumerate(groups)}
    found = propose(network, table, Sensitivity(losses, {}), 1.25)
    wider = [each for each in found if isinstance(each.edit, Widen)]
    assert [each.edit.group for each in wider] == [g.id for g in reversed(groups)][: len(wider)]
    assert len(wider) == len(groups) - 1, "a group that loses nothing does not grow"
    assert all(each.edit.width == 24 and each.ms == pytest.approx(1.0) for each in wider)
    assert wider[0].worth == pytest.approx(len(groups) - 1)
    branches = {each.edit.where: each for each in found if isinstance(each.edit, AddBranch)}
    assert sorted(branches) == ["cat", "cat_1"] and {each.edit.channels for each in branches.values()} == {16}
    by_name = {g.name: losses[g.id][8] for g in groups}
    beside = (by_name["units.0.one.0"] + by_name["units.0.three.1.0"]) / 2
    assert branches["cat"].worth == pytest.approx(16 / 8 * beside)
    more = propose(network, table, Sensitivity(losses, {}), 9.0)
    assert [each.edit.width for each in more if isinstance(each.edit, Widen)] == [48] * len(wider) + [24] * len(wider)


def test_a_group_grows_by_as_much_as_the_limit_allows_it_alone_and_by_a_step_at_least(tmp_path: Path):
    project = load_project(inception(tmp_path / "tiny"))
    network = captured(project, project.model(), PruneSpec()).network
    groups = network.topology.offered
    sites = tuple(SiteCost(Site(g.id, "conv", (Dim(((g.id, 1),)),), ()), {(8,): 1.0, (16,): 2.0}) for g in groups)
    table = LatencyTable(sites, {g.id: (8, 16) for g in groups}, 2, 2.0 * len(groups))
    values = Sensitivity({g.id: {8: 1.0, 16: 0.0} for g in groups}, {})

    def widths(ms: float) -> list[int]:
        found = propose(network, table, values, 1 + ms / table.dense_ms)
        return [each.edit.width for each in found if isinstance(each.edit, Widen)]

    count = len(groups)
    assert widths(1.1) == [24] * count + [20] * count + [18] * count
    assert widths(0.6) == [20] * count + [18] * count
    assert widths(0.3) == [18] * count and widths(0.1) == [18] * count, "the table may be wrong: it is measured"


def test_what_is_taken_has_most_worth_for_its_measured_cost_and_fits_together():
    def offered(name: str, worth: float, ratio: float) -> tuple[Proposal, float]:
        return Proposal(Widen(name, 8), name, worth, 1.0), ratio

    dear, good = offered("dear", 1.0, 1.2), offered("good", 1.0, 1.05)
    measured = [dear, good, offered("poor", 0.1, 1.04), offered("free", 0.1, 0.99)]
    assert [each.name for each in chosen(measured, 1.1)] == ["free", "good", "poor"]
    assert [each.name for each in chosen(measured, 1.05)] == ["free", "good"]
    assert [each.name for each in chosen(measured, 1.3)] == ["free", "good", "dear", "poor"]
    assert chosen([dear], 1.1) == ()


def test_of_one_place_the_widest_that_fits_is_taken_and_no_other():
    def offered(width: int, ratio: float) -> tuple[Proposal, float]:
        return Proposal(Widen("one", width), f"one {width}", float(width), 1.0), ratio

    other = (Proposal(Widen("other", 8), "other", 1.0, 1.0), 1.05)
    measured = [offered(20, 1.05), offered(24, 1.2), offered(32, 1.4), other]
    for limit, widest in [(1.11, 20), (1.26, 24), (1.5, 32)]:
        assert [each.name for each in chosen(measured, limit)] == [f"one {widest}", "other"]
    assert chosen(measured, 1.04) == ()
