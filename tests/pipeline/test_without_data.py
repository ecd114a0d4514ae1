"""Builds of projects without `[data]`, or with a part of it: what works runs, what was not judged is said to be so."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_project import problems, replace, request, write_project

from pipeline import demands
from pipeline.demands import DATA_FREE
from pipeline.flow import BuildResult, build
from pipeline.nouns import PruningPlan
from pipeline.outcome import agreement
from pipeline.project import load_project
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.surgery import prune
from pipeline.release.verify import read_manifest
from pipeline.report import text
from pipeline.run import read_state
from profiles.errors import UsageError
from profiles.schema import load_profile
from targets.base import load_target

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
NO_DATA = "the project has no [data]"
SHORT = {"prune": {"value_widths": 1}}


def bare(folder: Path, data: str = "") -> Path:
    """The tiny project with this in the place of its `[data]`, and without a limit on the accuracy."""
    project = write_project(folder)
    toml = (project / "deploy.toml").read_text()
    (project / "deploy.toml").write_text(toml.split("[data]")[0] + data)
    return project


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult, str]:
    """A project without data, its build that met the budget, and what the console said."""
    folder = tmp_path_factory.mktemp("bare")
    torch.set_num_threads(1)
    project, console = bare(folder / "tiny"), Console(file=io.StringIO(), width=200)
    result = build(request(project, folder / "root", console=console))
    return project, result, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_project_without_data_is_built_and_its_bundle_is_whole(built: tuple[Path, BuildResult, str]):
    _, result, _ = built
    assert result.exit_code == 0 and result.summary["verdict"] == "met" and result.bundle is not None
    assert result.summary["latency_ratio_interval"][1] <= 0.6
    assert result.summary["parameters"] < result.summary["parameters_dense"]
    assert problems(result.bundle) == []


def test_an_accuracy_that_nobody_judged_is_no_number_anywhere(built: tuple[Path, BuildResult, str]):
    _, result, _ = built
    assert result.bundle is not None and result.report is not None
    summary, accuracy = result.summary, read_manifest(result.bundle).accuracy
    assert summary["accuracy_dense"] is summary["accuracy"] is None and summary["accuracy_judged"] is False
    assert (accuracy.dense, accuracy.pruned, accuracy.unjudged) == (None, None, NO_DATA)
    assert f"accuracy not judged: {NO_DATA}; " in result.report.reason
    page, shown = (result.bundle / "report.html").read_text(), Console(file=io.StringIO(), width=200)
    text.show(result.report, shown)
    lines = [line.split() for line in shown.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["accuracy", "not", "judged", "not", "judged"] in lines
    assert "budget met, accuracy not judged" in page and f"accuracy not judged: {NO_DATA}" in page
    assert "Loss on noise" in page and "calibration loss" not in page.lower()
    assert "evaluate dense" not in read_state(Path(summary["run"]))["stages"]


def test_what_was_decided_for_the_user_is_told_before_the_work_and_in_the_report(built: tuple[Path, BuildResult, str]):
    _, result, said = built
    ways = f"ranked by '{DATA_FREE['criterion']}' and repaired by '{DATA_FREE['repair']}', which need none"
    note = (
        f"{NO_DATA}: channels are {ways}; losses are measured on noise; nothing is trained after the repair; "
        "the accuracy is not judged."
    )
    assert said.splitlines()[0] == f"note: {note}"
    assert result.report is not None and note in result.report.notes
    assert result.report.settings["criterion"] == DATA_FREE["criterion"]
    run = Path(result.summary["run"])
    assert note in (run / "log").read_text() and note in (run / "report.html").read_text().replace("&#39;", "'")
    assert json.loads((run / "profile.json").read_text())["prune"]["repair"] == DATA_FREE["repair"]


def test_agreement_on_noise_is_reported_as_what_it_is(built: tuple[Path, BuildResult, str]):
    project, result, _ = built
    assert result.bundle is not None
    told = result.summary["agreement"]
    assert told["on"] == "noise" and told["samples"] == 256
    assert read_manifest(result.bundle).accuracy.agreement.model_dump() == told  # type: ignore[union-attr]
    noise = torch.cat([x for (x,) in load_project(project).noise(256).inputs]).numpy()
    target = load_target(load_profile("simulated"), result.bundle.parent)
    dense, pruned = (target.infer(result.bundle / f"{name}.onnx", [noise])[0] for name in ("dense", "model"))
    assert told["argmax"] == pytest.approx((dense.argmax(1) == pruned.argmax(1)).mean())
    assert told["constant"] == pytest.approx(np.bincount(dense.argmax(1)).max() / 256)
    assert told["r2"] == pytest.approx(1 - np.square(dense - pruned).sum() / np.square(dense - dense.mean(0)).sum())
    said = f"equal argmax on {100 * told['argmax']:.1f} % (one class always: {100 * told['constant']:.1f} %)"
    assert result.report is not None and said in result.report.reason


def test_noise_changes_no_weight(built: tuple[Path, BuildResult, str]):
    """`magnitude` names no twins: what ships is a slice of the dense weights, statistics included."""
    project, _, _ = built
    loaded = load_project(project)
    network = find_groups(capture(loaded.model(), loaded.example()))
    given = {"prune": {**SHORT["prune"], "criterion": "magnitude"}}
    again = build(request(project, project.parent / "plain", overrides=given))
    assert again.bundle is not None
    plan = PruningPlan.from_json((again.bundle / "plan.json").read_text())
    sliced, shipped = prune(network, plan).state_dict(), load_file(again.bundle / "pruned.safetensors")
    assert plan.edits and shipped.keys() == sliced.keys()
    assert all(torch.equal(sliced[name], value) for name, value in shipped.items())


def test_a_bundle_whose_accuracy_was_taken_out_without_a_reason_is_refused(built: tuple[Path, BuildResult, str]):
    _, result, _ = built
    assert result.bundle is not None
    manifest = json.loads((result.bundle / "manifest.json").read_text())
    changed = result.bundle.parent / "changed"
    changed.mkdir()
    for accuracy in ({"unjudged": ""}, {"dense": 0.9, "pruned": 0.9}, {"dense": 0.9}):
        text = json.dumps({**manifest, "accuracy": {**manifest["accuracy"], **accuracy}})
        (changed / "manifest.json").write_text(text)
        assert problems(changed) == [
            "manifest.json: accuracy.dense and pruned are numbers, or null with the reason in unjudged."
        ]


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ({"criterion": "taylor"}, "the criterion 'taylor' needs", f"--criterion {DATA_FREE['criterion']}."),
        ({"repair": "bn"}, "the repair 'bn' needs", f"--repair {DATA_FREE['repair']}."),
        ({"criterion": "fisher", "repair": "least-squares"},
         "the criterion 'fisher' and the repair 'least-squares' need",
         f"--criterion {DATA_FREE['criterion']} --repair {DATA_FREE['repair']}."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["flags", "deploy.toml"])
def test_what_needs_samples_is_refused_before_any_work(
    tmp_path: Path, place: str, asked: dict[str, str], message: str, hint: str
):
    table = "".join(f'{key} = "{value}"\n' for key, value in asked.items())
    project = bare(tmp_path / "tiny", f"[prune]\n{table}" if place == "deploy.toml" else "")
    replace(project / "tinynet.py", "def net():\n", "def net():\n    1 / 0\n")
    with pytest.raises(UsageError) as caught:
        build(request(project, tmp_path / "root", overrides={"prune": asked} if place == "flags" else {}))
    assert caught.value.message == f"{message} calibration inputs, and {NO_DATA}."
    assert caught.value.hint == f"add data.calibration to deploy.toml, or {hint}"
    assert not (tmp_path / "root" / "runs").exists()


def test_what_was_asked_for_and_works_is_kept(tmp_path: Path):
    project = bare(tmp_path / "tiny", '[prune]\ncriterion = "random"\n')
    given = {"prune": {**SHORT["prune"], "repair": "none"}}
    result = build(request(project, tmp_path / "root", overrides=given, dry_run=True))
    assert result.exit_code == 0 and 0 < result.summary["predicted_ratio"] <= 0.6
    assert result.summary["notes"][0].startswith(f"{NO_DATA}: channels are ranked by 'random' and repaired by 'none'")
    assert read_state(Path(result.summary["run"]))["stages"]["rank"]["detail"] == "random"


@pytest.mark.parametrize("criterion", ["magnitude", "random", "red"])
def test_a_repair_that_has_nothing_to_hand_over_is_not_called_one(tmp_path: Path, criterion: str):
    project = load_project(bare(tmp_path / "tiny", f'[prune]\ncriterion = "{criterion}"\n'))
    profile, notes = demands.kept(project, load_profile("local", project.overrides))
    assert profile.prune.repair == "merge"
    idle = f"channels are ranked by '{criterion}', which needs none and names no stand-ins, so that nothing is repaired"
    assert (idle in notes[0]) == (criterion != "red")


def test_with_calibration_alone_everything_works_but_the_judgement(tmp_path: Path):
    project = bare(tmp_path / "tiny", '[data]\ncalibration = "tinydata:calibration"\n')
    result = build(request(project, tmp_path / "root", overrides=SHORT))
    assert result.exit_code == 0 and result.bundle is not None and problems(result.bundle) == []
    assert result.report is not None and result.report.loss_name == "calibration loss"
    assert result.report.settings["criterion"] == "obs" and result.report.settings["repair"] == "least-squares"
    assert result.report.unjudged == "the project has no data.evaluate"
    assert result.report.notes[:2] == (
        "the project has no data.train: nothing is trained after the repair.",
        "the project has no data.evaluate: the accuracy is not judged.",
    )
    assert result.summary["agreement"]["on"] == "calibration samples" and result.summary["agreement"]["samples"] == 128
    assert result.summary["agreement"]["argmax"] > 0.9 and result.summary["agreement"]["r2"] > 0.8


def test_with_a_metric_alone_what_needs_no_data_is_judged_by_it(tmp_path: Path):
    project = bare(tmp_path / "tiny", '[data]\nevaluate = "tinydata:evaluate"\n[accuracy]\nmax_drop = 0.5\n')
    result = build(request(project, tmp_path / "root", overrides=SHORT))
    assert result.report is not None and result.report.settings["criterion"] == DATA_FREE["criterion"]
    assert result.exit_code == 0 and "allowed drop 0.5" in result.report.reason
    assert result.summary["accuracy"] > 0.5 and result.summary["accuracy_dense"] > 0.9
    assert result.summary["accuracy_judged"] and result.summary["agreement"] is None
    assert result.report.loss_name == "loss on noise"


def test_labels_that_a_criterion_needs_are_missed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.prune.criteria import obs

    monkeypatch.setattr(obs, "NEEDS", ("inputs", "targets"))
    project = write_project(tmp_path / "tiny")
    replace(project / "tinydata.py", "        yield images[start : start + 32], labels[start : start + 32]",
            "        yield images[start : start + 32]")  # fmt: skip
    with pytest.raises(UsageError) as caught:
        build(request(project, tmp_path / "root"))
    assert caught.value.message == "the criterion 'obs' needs labels, and data.calibration gives none."
    assert not (tmp_path / "root" / "runs").exists()


def test_the_same_project_gives_the_same_network_twice(built: tuple[Path, BuildResult, str], tmp_path: Path):
    project, first, _ = built
    second = build(request(project, tmp_path / "root"))
    assert first.bundle is not None and second.bundle is not None
    hashes = [
        [hashlib.sha256((b / f).read_bytes()).hexdigest() for f in ("model.onnx", "plan.json", "sample.safetensors")]
        for b in (first.bundle, second.bundle)
    ]
    assert hashes[0] == hashes[1]


def test_agreement_is_an_r_squared_and_of_logits_a_share_of_equal_classes():
    dense = np.array([[2, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1]], dtype=np.float32)
    found = agreement([dense], [dense + np.array([[0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])], 4, "noise")
    assert (found.argmax, found.constant, found.samples) == (0.75, 0.5, 4)
    maps = np.random.default_rng(0).normal(size=(50, 2, 4, 4)).astype(np.float32)
    found = agreement([maps], [maps + 0.5], 50, "noise")
    spread = float(np.square(maps - maps.mean(0)).sum())
    assert found.argmax is None and found.r2 == pytest.approx(1 - 0.25 * maps.size / spread)
    assert agreement([maps], [maps], 50, "noise").r2 == agreement([dense], [dense], 4, "noise").argmax == 1.0
    assert agreement([maps[:, 0, 0, :1]], [maps[:, 0, 0, :1]], 50, "noise").constant is None


def test_of_several_outputs_the_one_that_agrees_least_is_told():
    rng = np.random.default_rng(0)
    boxes, scores, anchors = (
        rng.normal(size=(50, 8)),
        rng.normal(size=(50, 3)),
        np.tile(rng.normal(size=(1, 6)), (2, 1)),
    )
    found = agreement([boxes, scores, anchors], [boxes, scores + 0.5, anchors * (1 + 1e-7)], 50, "noise")
    alone = agreement([scores[:, :, None]], [scores[:, :, None] + 0.5], 50, "noise")
    assert found.r2 == alone.r2 < 0.9 and found.argmax is None and found.samples == 50
    assert agreement([boxes, anchors], [boxes, anchors * (1 + 1e-7)], 50, "noise").r2 > 0.999, "rounding is no error"
    assert agreement([boxes, anchors], [boxes, anchors + 1.0], 50, "noise").r2 < 0
