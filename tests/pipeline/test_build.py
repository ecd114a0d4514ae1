"""`deploy build` end to end: a tiny project, a device whose truth is known, and what lies in the run's folder after."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_project import GRID, problems, replace, request, run_of, write_project

from pipeline import flow
from pipeline.flow import BuildResult, build
from pipeline.journal import Journal
from pipeline.nouns import PruningPlan
from pipeline.project import load_project
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups
from pipeline.prune.surgery import prune, restore
from pipeline.release.verify import measure_again, read_manifest, recorded
from pipeline.run import Run, read_state
from pipeline.work import AGAIN, DENSE
from profiles.errors import DeployError, MissedError, ScarceError
from profiles.schema import RecoverSpec, load_profile
from targets.base import Progress, load_target
from targets.harness.measurement import Session
from targets.simulated import Simulated

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
PROMISED = {
    "bundle", "budget_ms", "dense_ms", "measured_ms", "latency_ratio", "accuracy_dense", "accuracy", "rounds",
    "seconds",
}  # fmt: skip
FAR_FROM_DENSE = """

def evaluate(predict):
    import pathlib, tinynet, torch
    from safetensors.torch import load_file
    network = tinynet.net().eval()
    network.load_state_dict(load_file(pathlib.Path(__file__).with_name("tiny.safetensors")))
    images, _ = drawn(4, 64)
    with torch.inference_mode():
        return -float(np.abs(predict(images) - network(torch.from_numpy(images)).numpy()).mean().round(3))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "tiny")


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    """A project and its build that met the budget."""
    folder = tmp_path_factory.mktemp("met")
    torch.set_num_threads(1)
    project = write_project(folder / "tiny")
    return project, build(request(project, folder / "root"))


def network_of(project: Path) -> Network:
    loaded = load_project(project)
    return find_groups(capture(loaded.model(), loaded.example()))


def test_a_build_ends_with_a_bundle_that_verifies_and_keeps_budget_and_accuracy(met: tuple[Path, BuildResult]):
    _, result = met
    summary = result.summary
    assert result.exit_code == 0 and summary["verdict"] == "met"
    assert result.bundle == Path(summary["bundle"]) == run_of(result) / "bundle"
    assert problems(result.bundle) == []
    assert 0.1 < summary["latency_ratio"] <= summary["latency_ratio_interval"][1] <= 0.6
    assert summary["accuracy"] >= summary["accuracy_dense"] - 0.05 > 0.85
    assert summary["parameters"] < summary["parameters_dense"] and summary["macs"] < summary["macs_dense"]
    assert read_state(run_of(result))["status"] == "done"


def test_the_summary_holds_what_is_promised_as_plain_json(met: tuple[Path, BuildResult]):
    _, result = met
    assert set(result.summary) >= PROMISED and all(result.summary[key] is not None for key in PROMISED)
    assert json.loads(json.dumps(dict(result.summary), allow_nan=False)) == dict(result.summary)
    state = read_state(run_of(result))
    assert state["summary"] == dict(result.summary)
    sessions = [json.loads(line)["name"] for line in (run_of(result) / "journal").read_text().splitlines()]
    assert result.summary["rounds"] == sum(name.startswith("session round") for name in sessions)


def test_the_released_latency_is_the_devices_truth(met: tuple[Path, BuildResult]):
    _, result = met
    assert result.bundle is not None
    target: Any = load_target(load_profile("simulated"), result.bundle.parent)
    truth = target.true_ms(result.bundle / "model.onnx") / target.true_ms(result.bundle / "dense.onnx")
    assert result.summary["latency_ratio"] == pytest.approx(truth, rel=0.01)
    assert read_manifest(result.bundle).latency.ratio == result.summary["latency_ratio"]


def test_widths_are_on_the_grid_of_the_device(met: tuple[Path, BuildResult]):
    project, result = met
    assert result.bundle is not None
    plan = PruningPlan.from_json((result.bundle / "plan.json").read_text())
    assert plan.edits
    widths = plan.widths(network_of(project).topology.offered)
    assert len(widths) == 3
    assert all(width % GRID == 0 and width >= GRID for width in widths.values())


def test_plan_and_weights_reload_to_the_network_that_ships(met: tuple[Path, BuildResult]):
    project, result = met
    assert result.bundle is not None
    network = network_of(project)
    plan = PruningPlan.from_json((result.bundle / "plan.json").read_text())
    again = restore(prune(network, plan), load_file(result.bundle / "pruned.safetensors"), "the bundle").eval()
    images = np.random.default_rng(5).normal(size=(1, 1, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(result.bundle / "model.onnx", providers=["CPUExecutionProvider"])
    (shipped,) = session.run(None, {session.get_inputs()[0].name: images})
    with torch.inference_mode():
        np.testing.assert_allclose(again(torch.from_numpy(images)).numpy(), shipped, atol=1e-4)
        assert not np.allclose(network.graph(torch.from_numpy(images)).numpy(), shipped, atol=1e-2)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"learning_rate": 1e30}, "the recovery diverged at the learning rates 1e+30 and 5e+29, so "),
        ({"max_minutes": 1e-6}, "recover.max_minutes is 1e-06, too short for a step of recovery"),
    ],
)
def test_a_recovery_that_another_setting_would_have_served_is_told(
    project: Path, tmp_path: Path, asked: dict[str, float], said: str
):
    console = Console(file=io.StringIO(), width=200)
    result = build(request(project, tmp_path / "root", overrides={"recover": asked}, console=console))
    assert result.report is not None and any(note.startswith(said) for note in result.report.notes)
    assert f"note: {said}" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("history", "kept", "said"),
    [
        ([[0, 0.4, 0.86, 0.1], [0, 0.3, 0.88, 0.01]], 1, "a learning rate of 0.01 (0.8800; 0.8600 with 0.1)"),
        ([[0, 0.4, None, 0.1], [0, 0.3, 0.88, 0.05]], 1, "a learning rate of 0.05 (0.8800; not finite with 0.1)"),
        ([[0, 0.3, 0.88, 0.05]], 0, "a learning rate of 0.05 (0.8800; 0.1 diverged)"),
        ([[0, 0.4, 0.88, 0.1], [0, 0.3, 0.86, 0.01]], 0, None),
        ([[0, 0.4, 0.84, 0.1], [0, 0.3, 0.85, 0.01]], None, None),
        ([], None, None),
    ],
)
def test_a_smaller_learning_rate_that_did_better_is_told(history: list[Any], kept: int | None, said: str | None):
    done = {"history": history, "stopped": "finished", "kept": kept, "from": 0.85, "to": 0.88}
    notes = flow._on_recovery(done, RecoverSpec(learning_rate=0.1))
    assert len(notes) == (said is not None)
    if said is not None:
        rate = said.split(" (")[0].rsplit(" ", 1)[1]
        assert notes[0] == f"the recovery did best with {said}: --set recover.learning_rate={rate} takes it alone."


def test_without_training_data_the_repaired_network_ships(project: Path, tmp_path: Path):
    replace(project / "deploy.toml", 'train = "tinydata:train"\n', "")
    result = build(request(project, tmp_path / "root"))
    assert result.exit_code == 0 and result.bundle is not None and problems(result.bundle) == []
    stages = read_state(run_of(result))["stages"]
    assert "recover" not in stages
    hash = stages["repair"]["outputs"]["weights"]
    repaired = load_file(tmp_path / "root" / ".deploy" / "objects" / hash[:2] / hash)
    shipped = load_file(result.bundle / "pruned.safetensors")
    assert repaired.keys() == shipped.keys() and all(torch.equal(repaired[k], shipped[k]) for k in shipped)


def test_accuracy_that_cannot_hold_leaves_the_nearest_point_and_no_bundle(project: Path, tmp_path: Path):
    with (project / "tinydata.py").open("a") as file:
        file.write(FAR_FROM_DENSE)
    replace(project / "deploy.toml", "max_drop = 0.05", "max_drop = 0.0")
    result = build(request(project, tmp_path / "root"))
    run = run_of(result)
    assert result.exit_code == 3 and result.summary["verdict"] == "accuracy missed"
    assert result.summary["accuracy_dense"] == 0 > result.summary["accuracy"]
    assert result.bundle is None and result.summary["bundle"] is None and not (run / "bundle").exists()
    assert result.summary["rejected"] == str(run / "rejected") and problems(run / "rejected") == []
    assert read_state(run)["status"] == "missed"
    assert result.report is not None and "allowed drop 0" in result.report.reason
    assert any("accuracy on `validate`" in note for note in result.report.notes)


def test_a_percentile_that_too_few_inferences_can_bound_is_undecided(project: Path, tmp_path: Path):
    """After all the work there is no number at the budget's percentile: no verdict, and everything else is kept."""
    few = {"measure": {"accept_processes": 2, "accept_rounds": 3}}
    result = build(request(project, tmp_path / "root", budget="0.6x@p99", overrides=few))
    run = run_of(result)
    assert result.report is not None and result.summary["verdict"] == "undecided"
    assert result.exit_code == 4 and result.bundle is None
    assert result.summary["budget_ms"] is None and result.summary["measured_ms"] is None
    assert result.summary["latency_ratio_interval"] == [0.0, None] and 0 < result.summary["latency_ratio"] < 1
    assert problems(run / "rejected") == [] and recorded(run / "rejected")[0] == "undecided"
    latency = read_manifest(run / "rejected").latency
    assert latency.budget_ms is None and latency.ratio_interval == (0.0, None)
    assert "p99 needs 4096 inferences, there are " in result.report.reason
    assert (run / "log").read_text().count("recover finished") == 1  # a tighter plan could not change that
    assert "not measured" in (run / "report.html").read_text()


def test_a_budget_below_the_floor_says_what_the_narrowest_network_takes(project: Path, tmp_path: Path):
    with pytest.raises(MissedError) as caught:
        build(request(project, tmp_path / "root", budget="0.001x"))
    assert "cannot be met: the narrowest allowed network is predicted at " in caught.value.message
    assert caught.value.exit_code == 3 and "min_width" in caught.value.hint
    [run] = (tmp_path / "root" / "runs").iterdir()
    assert read_state(run)["status"] == "missed" and not (run / "bundle").exists()


def test_a_dry_run_gives_groups_and_a_plan_and_trains_nothing(project: Path, tmp_path: Path):
    replace(project / "tinydata.py", "def train(epoch, seed):\n", "def train(epoch, seed):\n    1 / 0\n")
    result = build(request(project, tmp_path / "root", dry_run=True))
    summary = result.summary
    assert (result.exit_code, result.bundle, summary["bundle"], summary["grid"]) == (0, None, None, GRID)
    offered = [row for row in summary["groups"].values() if row["frozen"] is None]
    assert sorted(row["width"] for row in offered) == [16, 24, 24]
    assert any(row["kept"] < row["width"] for row in offered)
    assert 0 < summary["predicted_ratio"] <= summary["budget_ratio"] == 0.6 and summary["table_rows"] > 10
    state = read_state(run_of(result))
    assert state["status"] == "done" and not {"repair", "recover", "export", "accept"} & set(state["stages"])


def test_an_absolute_budget_is_kept_in_milliseconds(met: tuple[Path, BuildResult], tmp_path: Path):
    project, before = met
    limit = 0.7 * before.summary["dense_ms"]
    result = build(request(project, tmp_path / "root", budget=f"{limit}ms"))
    assert result.exit_code == 0 and result.summary["measured_ms_interval"][1] <= limit
    assert result.summary["budget_ms"] == pytest.approx(limit)


def test_a_second_build_reuses_what_the_first_one_made_and_measures_again(project: Path, tmp_path: Path):
    first, second = (build(request(project, tmp_path / "root")) for _ in range(2))
    stages = read_state(run_of(second))["stages"]
    reused = {name for name, row in stages.items() if row.get("reused")}
    assert {"dense", "rank", "values", "evaluate dense", "repair", "recover", "export"} <= reused
    sessions = [line for line in (run_of(second) / "journal").read_text().splitlines() if '"session accept"' in line]
    assert len(sessions) == 1
    assert first.bundle and second.bundle
    for name in ("model.onnx", "plan.json", "pruned.safetensors"):
        assert (first.bundle / name).read_bytes() == (second.bundle / name).read_bytes()
    [before], [after] = (Journal(run_of(result) / "journal").entries("known") for result in (first, second))
    assert before == [] and after, "what the first one measured is believed by the second"


DATA_STAGES = {"evaluate dense", "evaluate pruned", "repair", "recover"}
"""What depends on data that no other stage has in its key."""


def reused(result: BuildResult) -> set[str]:
    return {name for name, row in read_state(run_of(result))["stages"].items() if row.get("reused")}


@pytest.mark.parametrize("named", [True, False])
def test_what_was_judged_on_other_data_is_judged_again(project: Path, tmp_path: Path, named: bool):
    """The test images change beside code, weights and calibration samples that do not."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "share").write_text("1.0")
    replace(project / "deploy.toml", "files = []\n", f'files = ["{images}"]\n' if named else "")
    replace(
        project / "tinydata.py", "    return accuracy(predict, 4)",
        f"    return accuracy(predict, 4) * float(np.loadtxt({str(images / 'share')!r}))",
    )  # fmt: skip
    first, same = (build(request(project, tmp_path / "root")) for _ in range(2))
    (images / "share").write_text("0.75")
    other = build(request(project, tmp_path / "root"))
    before, after = first.summary["accuracy_dense"], other.summary["accuracy_dense"]
    assert before > 0.5 and after == pytest.approx(0.75 * before)
    assert reused(same) & DATA_STAGES == (DATA_STAGES if named else set())
    assert not reused(other) & DATA_STAGES and {"dense", "rank", "values"} <= reused(other)


def test_a_run_that_goes_on_believes_what_it_judged_itself(project: Path, tmp_path: Path):
    """Though nobody names the files: a run begins and ends with the same data."""
    replace(project / "deploy.toml", "files = []\n", "")
    failing = "def train(epoch, seed):\n    epoch and open('/nowhere')\n"
    replace(project / "tinydata.py", "def train(epoch, seed):\n", failing)
    root = tmp_path / "root"
    with pytest.raises(DeployError, match="nowhere"):
        build(request(project, root))
    [run] = (root / "runs").iterdir()
    assert read_state(run)["stages"]["evaluate dense"]["reused"] == 0
    with pytest.raises(DeployError, match="nowhere"):
        build(request(project, root, resume=run))
    assert read_state(run)["stages"]["evaluate dense"]["reused"] == 1


class Bars:
    """What was told to the bars of runs, by their text; asked: paths that were built with a bar."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: dict[str, list[float]] = {}
        self.asked: list[str] = []
        share, make = Run.share, Simulated.build_each

        @contextmanager
        def spied(run: Run, text: str) -> Iterator[Callable[[float], None]]:
            with share(run, text) as advance:
                yield lambda done: (self.told.setdefault(text, []).append(done), advance(done))[1]

        def built(device: Simulated, models: Mapping[Path, Path], progress: Progress | None = None) -> list[Path]:
            if progress is not None:
                self.asked += [out.name for out in models.values()]
            return make(device, models, progress)

        monkeypatch.setattr(Run, "share", spied)
        monkeypatch.setattr(Simulated, "build_each", built)


def test_a_table_a_session_and_an_engine_have_a_bar(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of engines take a board an hour."""
    bars = Bars(monkeypatch)
    result = build(request(project, tmp_path / "root"))
    entries = map(json.loads, (run_of(result) / "journal").read_text().splitlines())
    sessions = {e["name"].removeprefix("session ") for e in entries if e["name"].startswith("session ")}
    assert "accept" in sessions and {"table", *sessions} <= set(bars.told)
    assert all(told == sorted(told) and told[-1] == 1.0 for told in bars.told.values())
    assert bars.asked == ["sample.artifact"], "the simulated device has no engines"
    told: list[float] = []
    assert result.bundle is not None
    device = load_target(load_profile("simulated"), tmp_path / "root" / ".deploy")
    judged, _ = measure_again(result.bundle, device, tmp_path, told.append)
    assert judged.verdict == "met" and told[-1] == 1.0 and len(bars.asked) == 3


def test_a_device_that_cannot_hold_all_candidates_at_once_measures_them_in_parts(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held, measure = [], Simulated.measure

    def scarce(device: Simulated, artifacts: Mapping[str, Path], *asked: Any) -> Session:
        if len(artifacts) > 3:
            raise ScarceError("not enough memory to measure 'candidate-2': out of memory.")
        held.append(list(artifacts))
        return measure(device, artifacts, *asked)

    monkeypatch.setattr(Simulated, "measure", scarce)
    result = build(request(project, tmp_path / "root"))
    assert result.summary["verdict"] == "met"
    ranked = [names for names in held if "candidate-1" in names]
    assert len(ranked) > 1 and all(names == [DENSE, AGAIN, "candidate-1"] for names in ranked)


def test_what_a_run_asks_of_its_device_is_found_again_under_its_id(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, rows = [], Simulated.rows

    @contextmanager
    def resumable(device: Simulated, name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append("end")

    monkeypatch.setattr(Simulated, "resumable", resumable)
    monkeypatch.setattr(Simulated, "rows", lambda *asked: (seen.append("rows"), rows(*asked))[1])
    result = build(request(project, tmp_path / "root", dry_run=True))
    assert list(dict.fromkeys(seen)) == [read_state(run_of(result))["id"], "rows", "end"] and seen[-1] == "end"


@pytest.mark.slow
def test_a_build_on_this_machine_measures_this_machine(project: Path, tmp_path: Path):
    """Few rounds on a busy machine: the verdict may be any, but it has to agree with the samples and the files."""
    short = {
        "rank_processes": 1, "rank_rounds": 5, "accept_processes": 3, "accept_rounds": 10, "warmup_s": 0.05,
        "warmup_inferences": 5, "warmup_max_s": 0.2, "steady": 0.9, "block_min_ms": 0.5,
    }  # fmt: skip
    overrides = {"measure": short, "prune": {"rounds": 2, "grid": 8, "min_width": 16}}
    result = build(request(project, tmp_path / "root", target="local", budget="0.85x", overrides=overrides))
    summary, run = result.summary, run_of(result)
    assert result.exit_code == {"met": 0, "missed": 3, "accuracy missed": 3, "undecided": 4}[summary["verdict"]]
    assert (run / "bundle").exists() == (result.exit_code == 0)
    ended = result.bundle or run / "rejected"
    if not ended.exists():
        assert "the nearest network is" in result.report.reason  # type: ignore[union-attr]
        return
    session = Session.from_json((ended / "measurement.json").read_text())
    assert not session.simulated and set(session.measurements) == {"dense", "dense-again", "pruned"}
    assert summary["latency_ratio"] == pytest.approx(session.ratio("pruned", "dense", "p50").center)
    assert problems(ended, "local") == []
    model = hashlib.sha256((ended / "model.onnx").read_bytes()).hexdigest()
    assert session.measurements["pruned"].sha256 == model
