"""`deploy build --target rtx` where the card is not: a real engine, no latency, and nothing that passes a gate.

The engines are built for real: pip install 'edge-deploy[tensorrt-rtx]'.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_project import problems, replace, request, run_of, write_project

from benchmarks.nets import resnet20
from pipeline import cli
from pipeline.flow import BuildResult, build
from pipeline.nightly.baseline import from_run, newest
from pipeline.nouns import BUILT, PruningPlan
from pipeline.project import load_project
from pipeline.release.verify import measure_again, read_manifest, recorded
from pipeline.run import read_state
from pipeline.work import rebuilt
from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import PruneSpec, load_profile
from targets.base import load_target
from targets.harness.agent.board.tensorrt import job, library

if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("TensorRT for RTX is not installed: pip install 'edge-deploy[tensorrt-rtx]'", allow_module_level=True)
if job.gpu_facts().get("capability") == "8.6":
    pytest.skip("the card that the profile rtx names is here, so it is measured", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
NOTHING = "nothing can be measured for 'rtx': the engine is for a card of compute capability 8.6, and "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    """A project and what was built of it for a card elsewhere, without a word on a budget."""
    folder = tmp_path_factory.mktemp("built")
    torch.set_num_threads(1)
    project = write_project(folder / "tiny")
    return project, build(request(project, folder / "root", target="rtx", budget=None))


@pytest.fixture
def folder(made: tuple[Path, BuildResult], tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(str(built(made[1])), tmp_path / "built"))


def built(result: BuildResult) -> Path:
    """The folder that such a build leaves."""
    return Path(result.summary["built"])


def deploy(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a command."""
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--json"])
    return int(str(left.value.code)), json.loads(capsys.readouterr().out)


def test_an_engine_is_built_and_said_to_be_unmeasured(made: tuple[Path, BuildResult]):
    _, result = made
    summary = result.summary
    assert (result.exit_code, summary["verdict"]) == (4, "built, not measured")
    assert summary["bundle"] is None and summary["rejected"] is None
    assert summary["built"] == str(run_of(result) / "built")
    assert result.bundle is None and not (run_of(result) / "bundle").exists()
    measured = ("budget_ms", "dense_ms", "measured_ms", "measured_ms_interval", "latency_ratio")
    assert all(summary[key] is None for key in measured) and summary["budget"] == "none"
    assert summary["accuracy"] == summary["accuracy_dense"] > 0.85 and summary["parameters"] > 0
    assert read_state(run_of(result))["status"] == "built"
    assert result.report is not None and "in ONNX Runtime on this machine, not of the engine." in result.report.notes[1]
    page = (run_of(result) / "report.html").read_text()
    assert "? built, not measured" in page and "budget met" not in page


def test_the_folder_holds_the_engine_and_no_latency(made: tuple[Path, BuildResult]):
    project, result = made
    assert problems(built(result), "local") == []
    assert (built(result) / "model.plan").stat().st_size > (built(result) / "model.onnx").stat().st_size // 4
    assert not (built(result) / "measurement.json").exists()
    manifest = read_manifest(built(result))
    assert manifest.latency is None and "not of the engine" in manifest.unmeasured and "model.plan" in manifest.files
    assert manifest.device["gpu"] == "compute capability 8.6"
    assert manifest.device["machine"] == "a card that is not here"
    assert manifest.runtime.startswith("tensorrt-rtx 1.") and manifest.precision == "fp32"
    assert [link.stage for link in manifest.chain] == ["dense", "engine", "evaluate dense"]
    plan = PruningPlan.from_json((built(result) / "plan.json").read_text())
    assert plan.edits == ()
    loaded = load_project(project)
    again = rebuilt(loaded, plan, load_file(built(result) / "pruned.safetensors"), PruneSpec())
    images = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 1, 8, 8)).astype(np.float32))
    with torch.inference_mode():
        assert torch.allclose(again(images), loaded.model()(images), atol=1e-5)


def test_no_gate_lets_it_pass(
    made: tuple[Path, BuildResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    _, result = made
    monkeypatch.chdir(tmp_path)
    code, told = deploy(capsys, "verify", str(built(result)))
    assert (code, told["problems"], told["verdict"]) == (4, [], BUILT)
    simulated = load_target(load_profile("simulated"), tmp_path / ".deploy")
    with pytest.raises(UndecidedError, match="was built and not measured, so it tells no budget to judge"):
        measure_again(built(result), simulated, tmp_path)
    with pytest.raises(UsageError, match="was built and not measured, so it met no budget"):
        from_run(built(result))
    with pytest.raises(UsageError, match="ended built: it has no network that meets its budget"):
        from_run(run_of(result))
    assert newest(run_of(result).parent, "rtx") is None


@pytest.mark.parametrize(
    "command",
    [
        "measure MODEL",
        "check",
        "baseline accept MODEL",
        "verify BUILT",
        "build --dry-run --budget 0.5x --project PROJECT",
    ],
)
def test_what_needs_a_latency_is_refused_with_the_next_step(
    made: tuple[Path, BuildResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": f"{built(made[1])}/model.onnx", "BUILT": str(built(made[1])), "PROJECT": str(made[0])}
    code, told = deploy(capsys, *(places.get(word, word) for word in command.split()), "--target", "rtx")
    assert code == told["exit_code"] == 4
    assert told["error"].startswith(NOTHING) and told["hint"]
    assert not (tmp_path / "runs").exists() and not (tmp_path / ".deploy" / "engines").exists()


def test_a_manifest_that_pretends_is_found_out(folder: Path):
    manifest = json.loads((folder / "manifest.json").read_text())

    def told(**changes: Any) -> list[str]:
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))
        return problems(folder, "local")

    assert told() == [] and recorded(folder)[0] == BUILT
    assert "latency is a table, or null with the reason in unmeasured" in told(unmeasured="")[0]
    other = {**manifest["device"], "gpu": "compute capability 8.9"}
    assert told(device=other) == ["the manifest's device is not the one that its device_sha256 tells."]
    (folder / "measurement.json").write_bytes(b"{}")
    added = {"sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "bytes": 2}
    assert told(files={**manifest["files"], "measurement.json": added}) == [
        "the manifest tells that nothing was measured, and measurement.json is there."
    ]


def test_in_half_precision_the_accuracy_of_the_network_in_half_is_judged(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    result = build(request(project, tmp_path / "root", target="rtx", budget="0.5x", overrides={"precision": "fp16"}))
    assert result.exit_code == 4 and problems(built(result), "local") == []
    assert result.summary["budget"] == "0.5x" and read_manifest(built(result)).precision == "fp16"
    kinds = {tensor.data_type for tensor in onnx.load(built(result) / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    stages = read_state(run_of(result))["stages"]
    assert {"halve dense", "engine", "evaluate dense", "evaluate dense fp16"} <= stages.keys()


def test_an_accuracy_that_is_lost_before_any_card_is_asked_is_missed(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinydata.py", "def evaluate(predict):\n", FALLING)
    replace(project / "deploy.toml", "max_drop = 0.05", "max_drop = 0.0")
    result = build(request(project, tmp_path / "root", target="rtx", budget=None, overrides={"precision": "fp16"}))
    assert (result.exit_code, result.summary["verdict"]) == (3, "accuracy missed")
    assert result.summary["rejected"] == str(run_of(result) / "rejected")
    assert problems(run_of(result) / "rejected", "local") == []
    assert (
        recorded(run_of(result) / "rejected")[0] == "accuracy missed"
        and read_state(run_of(result))["status"] == "missed"
    )


FALLING = """def evaluate(predict):
    images, _ = drawn(4, 64)
    import pathlib, tinynet, torch
    from safetensors.torch import load_file
    network = tinynet.net().eval()
    network.load_state_dict(load_file(pathlib.Path(__file__).with_name("tiny.safetensors")))
    with torch.inference_mode():
        gap = np.abs(predict(images) - network(torch.from_numpy(images)).numpy()).max()
    return 1.0 if gap < 1e-4 else 0.0


def unused(predict):
"""


def test_without_the_library_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "site").mkdir()
    for module in library.MODULES["tensorrt-rtx"]:
        (tmp_path / "site" / f"{module}.py").write_text("raise ImportError('away')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(DeployError, match=r"^TensorRT for RTX is not installed here: away\.") as error:
        build(request(write_project(tmp_path / "tiny"), tmp_path / "root", target="rtx", budget=None))
    assert error.value.hint == "pip install 'edge-deploy[tensorrt-rtx]'"
    assert not (tmp_path / "root" / "runs").exists()


RESNET = """
version = 1
[model]
factory = "net:resnet20"
weights = "resnet20.safetensors"
input = { shape = [1, 3, 32, 32] }
"""


def test_the_command_builds_a_resnet_20_without_any_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    project = tmp_path / "project"
    project.mkdir()
    (project / "deploy.toml").write_text(RESNET)
    (project / "net.py").write_text(
        "from benchmarks.nets import resnet20 as made\n\n\ndef resnet20():\n    return made()\n"
    )
    save_file(resnet20().state_dict(), project / "resnet20.safetensors")
    monkeypatch.chdir(tmp_path)
    card = ("--target", "rtx", "--set", "tensorrt.compute_capability=8.9")
    code, told = deploy(capsys, "build", *card, "--project", str(project), "--out", "run")
    assert (code, told["verdict"], told["accuracy"], told["accuracy_judged"]) == (4, BUILT, None, False)
    manifest = read_manifest(tmp_path / "run" / "built")
    assert manifest.device["gpu"] == "compute capability 8.9" and manifest.files["model.plan"].bytes > 500_000
    (kept,) = (tmp_path / ".deploy" / "engines").glob("*/engine.plan")
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == manifest.files["model.plan"].sha256
    assert manifest.accuracy.agreement is not None and manifest.accuracy.agreement.r2 > 0.999
    code, told = deploy(capsys, "show", "run")
    assert code == 0 and told["status"] == "built" and told["summary"]["verdict"] == BUILT
