"""What a user can get wrong in a project: one sentence, a hint, the right exit code, and no half-written run."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline import cli

NETS = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()
"""
DATA = """
import numpy as np

def calibration():
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(16, 3, 8, 8)).astype("float32"), rng.integers(0, 4, 16)) for _ in range(2)]

def evaluate(predict):
    return float(predict(np.zeros((2, 3, 8, 8), "float32")).shape[1])
"""
PROJECT = """
version = 1
[model]
factory = "tinynets:tiny"
weights = "tiny.safetensors"
input = { shape = [1, 3, 8, 8] }
[data]
calibration = "tinydata:calibration"
evaluate = "tinydata:evaluate"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole project, before somebody spoils it. The test stands in an empty folder beside it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tinynets.py").write_text(NETS)
    (folder / "tinydata.py").write_text(DATA)
    (folder / "deploy.toml").write_text(PROJECT)
    names: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NETS, names)
    torch.manual_seed(0)
    save_file(names["tiny"]().state_dict(), folder / "tiny.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def build(capsys: pytest.CaptureFixture[str], project: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, message and hint of a build that fails; asserts that it left no run and nothing on stdout but JSON."""
    with pytest.raises(SystemExit) as done:
        cli.main(["build", "--target", "simulated", "--project", str(project), "--budget", "0.5x", "--json", *more])
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == done.value.code
    assert told["exit_code"] == 3 or not Path("runs").exists()
    return told["exit_code"], told["error"], told["hint"]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_unknown_key_is_named_with_its_near_miss(capsys: pytest.CaptureFixture[str], project: Path):
    replace(project / "deploy.toml", "calibration =", "calibraton =")
    code, message, _ = build(capsys, project)
    assert code == 2 and "no key named 'data.calibraton'. Did you mean 'calibration'?" in message


def test_missing_weights_are_named(capsys: pytest.CaptureFixture[str], project: Path):
    (project / "tiny.safetensors").unlink()
    code, message, hint = build(capsys, project)
    assert code == 2 and message == f"there is no weights file '{project / 'tiny.safetensors'}'."
    assert hint == "set model.weights in deploy.toml to where it is."


def test_weights_that_do_not_fit_say_which_tensors(capsys: pytest.CaptureFixture[str], project: Path):
    replace(project / "tinynets.py", "nn.Linear(16, 4)", "nn.Linear(16, 5)")
    code, message, _ = build(capsys, project)
    assert code == 1 and "7.weight is [4, 16] in the file and [5, 16] in the network" in message


def test_a_pickle_that_would_run_code_is_refused_and_not_run(capsys: pytest.CaptureFixture[str], project: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.mkdir, (str(project / "owned"),)

    torch.save({"state_dict": Evil()}, project / "tiny.pt", pickle_module=pickle)
    replace(project / "deploy.toml", "tiny.safetensors", "tiny.pt")
    code, message, hint = build(capsys, project)
    assert code == 1 and "would run code" in message and "weights_only" in hint
    assert not (project / "owned").exists()


def test_an_input_shape_that_the_network_refuses_is_told(capsys: pytest.CaptureFixture[str], project: Path):
    replace(project / "deploy.toml", "[1, 3, 8, 8]", "[1, 5, 8, 8]")
    code, message, _ = build(capsys, project)
    assert code in (1, 2) and "[1, 5, 8, 8]" in message


def test_an_empty_calibration_set_is_told(capsys: pytest.CaptureFixture[str], project: Path):
    replace(project / "tinydata.py", "for _ in range(2)", "for _ in range(0)")
    code, message, _ = build(capsys, project)
    assert code in (1, 2) and "calibration" in message and "no " in message


@pytest.mark.parametrize(
    ("body", "said"), [("1 / 0", "zerodivisionerror: division by zero"), ("float('nan')", "nan")], ids=["raises", "nan"]
)
def test_an_evaluate_that_raises_or_gives_nan_is_told(
    capsys: pytest.CaptureFixture[str], project: Path, body: str, said: str
):
    replace(project / "tinydata.py", 'float(predict(np.zeros((2, 3, 8, 8), "float32")).shape[1])', body)
    code, message, _ = build(capsys, project)
    assert code == 1 and "evaluate" in message and said in message.lower()


def test_a_budget_below_the_floor_names_the_narrowest_latency(capsys: pytest.CaptureFixture[str], project: Path):
    code, message, hint = build(capsys, project, "--budget", "0.001x")
    assert code == 3 and "cannot be met: the narrowest allowed network is predicted at " in message
    assert "min_width" in hint
    [run] = Path("runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "missed" and not (run / "bundle").exists()


def test_a_full_disk_is_told(capsys: pytest.CaptureFixture[str], project: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    from pipeline import flow

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(project / "x.onnx"))

    monkeypatch.setattr(flow, "export", full)
    code, message, hint = build(capsys, project)
    assert code == 1 and message.startswith("the disk is full: '") and "deploy gc" in hint


def test_a_budget_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], project: Path):
    code, message, hint = build(capsys, project, "--budget", "0")
    assert code == 2 and message == "budget '0' is not a latency." and hint == "write it like 8ms, 0.5x or 0.5x@p90."
    code, message, _ = build(capsys, project, "--budget", "0ms")
    assert code == 2 and message == "budget '0ms' must be above zero."


def test_a_file_that_may_not_grow_is_told_and_leaves_no_run(capsys: pytest.CaptureFixture[str], project: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # run.json fits, the dense network does not
    try:
        code, message, hint = build(capsys, project)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and message.startswith("a file may not grow so large: '") and "could not be written" in message
    assert "deploy gc" in hint
    assert not list(Path(".deploy").rglob("*.tmp")) and not list(Path(".deploy").glob("scratch/*"))


def test_a_damaged_object_of_the_cache_is_told_and_made_again(capsys: pytest.CaptureFixture[str], project: Path):
    """The first build ends without a network; the second finds its objects, one of them with a byte turned over."""
    build(capsys, project, "--budget", "0.001x")
    [run] = Path("runs").iterdir()
    hash = json.loads((run / "run.json").read_text())["stages"]["dense"]["outputs"]["onnx"]
    damaged = Path(".deploy") / "objects" / hash[:2] / hash
    data = damaged.read_bytes()
    damaged.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(SystemExit) as done:
        cli.main(["build", "--target", "simulated", "--project", str(project), "--budget", "0.9x", "--json"])
    out, err = capsys.readouterr()
    assert done.value.code == 0 and Path(json.loads(out)["bundle"], "manifest.json").is_file()
    assert f"{damaged} is damaged" in err and "it will be made again" in err
    assert damaged.read_bytes() == data


def test_a_layer_to_freeze_that_is_not_there_is_named_with_its_near_miss(
    capsys: pytest.CaptureFixture[str], project: Path
):
    replace(project / "tinynets.py", "return nn.Sequential(", "return nn.Sequential(nn.Identity(),")
    replace(project / "deploy.toml", 'weights = "tiny.safetensors"\n', "")
    code, message, hint = build(capsys, project, "--set", "prune.freeze=['1.weihgt']")
    assert code == 2 and "deploy groups" in hint
    assert message == "prune.freeze names '1.weihgt', and the network has no such layer. Did you mean '1.weight'?"


@pytest.mark.parametrize("key", ["prune.seed", "measure.seed", "recover.seed", "prepare.seed"])
def test_a_seed_below_zero_is_refused_before_any_work(capsys: pytest.CaptureFixture[str], project: Path, key: str):
    code, message, _ = build(capsys, project, "--set", f"{key}=-1")
    assert code == 2 and f"{key} is -1" in message


def test_a_folder_that_cannot_be_made_or_written_is_told(
    capsys: pytest.CaptureFixture[str], project: Path, monkeypatch: pytest.MonkeyPatch
):
    (project / "file").write_text("")
    code, message, hint = build(capsys, project, "--out", str(project / "file" / "run"))
    assert code == 2 and message == f"cannot make '{project / 'file' / 'run'}': Not a directory." and "--out" in hint
    (Path(".deploy")).write_text("a file where the state folder belongs")
    code, message, hint = build(capsys, project)
    assert code == 1 and message.startswith("'.deploy") and message.endswith(" cannot be used: not a directory.")
    assert "another place" in hint


def test_a_bug_shows_its_stack_and_json_still_holds_one_object(
    capsys: pytest.CaptureFixture[str], project: Path, monkeypatch: pytest.MonkeyPatch
):
    from pipeline import flow

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(flow, "captured", broken)
    with pytest.raises(SystemExit) as done:
        cli.main(["build", "--target", "simulated", "--project", str(project), "--budget", "0.5x", "--json"])
    out, err = capsys.readouterr()
    assert done.value.code == 1 and json.loads(out)["error"] == "ZeroDivisionError: no such thing"
    assert "Traceback" in err and "in broken" in err
