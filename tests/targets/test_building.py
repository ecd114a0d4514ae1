"""The host's side of building: a process of its own, what it reports, what is left behind, and boards' old Pythons."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_conv
from test_trtexec import stand_in  # noqa: F401  a fixture

from profiles.errors import DeployError, UsageError
from profiles.schema import TensorRTSpec, load_profile
from targets.harness import building, pack
from targets.harness.agent.board.tensorrt import engine
from targets.runtimes.base import load_runtime
from targets.runtimes.tensorrt import TensorRT, builder_options, running_options

BOARD = Path(engine.__file__).parent
OPTIONS = builder_options(TensorRTSpec())
WITHOUT = importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_bindings") is None
only_without = pytest.mark.skipif(not WITHOUT, reason="TensorRT's Python module is installed here")


def python_of(version):
    """An interpreter of this version, by name or from pyenv; skipped where there is none."""
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for path in filter(None, [shutil.which(f"python{version}"), *map(str, kept)]):
        if not subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
            return path
    return pytest.skip(f"no Python {version} here")


@only_without
def test_a_missing_library_says_how_to_get_it(tmp_path):
    with pytest.raises(DeployError) as error:
        building.build(write_conv(tmp_path / "a.onnx"), tmp_path / "a.plan", "tensorrt", OPTIONS, tmp_path / ".deploy")
    assert error.value.message.startswith("TensorRT is not installed here: No module named 'tensorrt'")
    assert error.value.hint == building.INSTALL["tensorrt"]
    with pytest.raises(DeployError) as error:
        load_runtime("tensorrt").version()
    assert error.value.message.startswith("TensorRT is not installed here: ")


@only_without
def test_an_unused_dla_is_warned_of(stand_in, tmp_path, monkeypatch, caplog):  # noqa: F811
    binary = stand_in(last="echo '[x] [I] [TRT] [GpuLayer] CONVOLUTION: conv'")
    monkeypatch.setenv("PATH", str(Path(binary.path).parent), prepend=":")
    runtime = TensorRT("tensorrt", TensorRTSpec(workspace_mib=128, dla_core=0), tmp_path / ".deploy")
    runtime.built(write_conv(tmp_path / "a.onnx"), tmp_path / "e.plan")
    said = [record.getMessage() for record in caplog.records if record.name == building.__name__]
    assert len(said) == 1 and said[0].startswith("nothing runs on the DLA core 0 but everything on the GPU, since ")
    assert said[0].endswith('a DLA computes in float16 and int8: precision = "fp16" (1 of 1 engines).')


@only_without
def test_where_only_trtexec_is_there_the_engine_is_built_through_it(stand_in, tmp_path, monkeypatch):  # noqa: F811
    binary = stand_in()
    monkeypatch.setenv("PATH", str(Path(binary.path).parent), prepend=":")
    runtime = TensorRT("tensorrt", TensorRTSpec(workspace_mib=128), tmp_path / ".deploy")
    path = write_conv(tmp_path / "a.onnx")
    built = runtime.built(path, tmp_path / "e.plan")
    assert built.record["way"] == "trtexec" and built.record["title"] == "trtexec of TensorRT 10.3.0"
    assert built.record["workspace_mib"] == 128 and (tmp_path / "e.plan").read_text() == "plan\n"
    assert built.record["model"] == {"": hashlib.sha256(path.read_bytes()).hexdigest()}, "what gc keeps baselines' by"
    runs = len((tmp_path / "runs").read_text().splitlines())
    assert runtime.built(path, tmp_path / "again.plan").reused
    assert len((tmp_path / "runs").read_text().splitlines()) == runs + 1, "only asked for its help"
    assert not list((tmp_path / ".deploy").glob("build-*"))


@pytest.mark.parametrize(
    ("code", "text", "told"),
    [
        (-9, "", "the building process was killed, as a system does that runs out of memory."),
        (-11, "", "the building process crashed by signal 11 (SIGSEGV)."),
        (3, "a\nlast words\n", "the building process ended with code 3: last words."),
        (-99, "", "the building process crashed by signal 99 (unknown)."),
    ],
)
def test_a_process_that_ends_without_a_word_is_told_by_how_it_ended(code, text, told):
    assert building.died(code, text).message == told


def test_a_crash_of_the_builder_leaves_no_folder_and_says_so(tmp_path, monkeypatch):
    path = write_conv(tmp_path / "a.onnx")
    here = {"library": {"name": "tensorrt", "version": "9", "build": ""}, "gpu": {}}
    monkeypatch.setattr(building, "facts", lambda name: here)
    monkeypatch.setattr(building, "sys", type("S", (), {"executable": str(tmp_path / "crash")}))
    (tmp_path / "crash").write_text("#!/bin/sh\nkill -SEGV $$\n", encoding="utf-8")
    (tmp_path / "crash").chmod(0o755)
    with pytest.raises(DeployError, match=r"the building process crashed by signal 11 \(SIGSEGV\)\."):
        building.build(path, tmp_path / "a.plan", "tensorrt", OPTIONS, tmp_path / ".deploy")
    assert list((tmp_path / ".deploy").iterdir()) == []


@pytest.mark.parametrize("closes", ["", "exec 1>&-; "])
@pytest.mark.parametrize("verb", ["facts", "build"])
def test_a_builder_that_hangs_is_ended_after_its_time(tmp_path, monkeypatch, verb, closes):
    """As where the driver does, whatever it has said before."""
    path, event = write_conv(tmp_path / "a.onnx"), '{"event": "progress", "done": 0.1}'
    monkeypatch.setattr(building, "sys", type("S", (), {"executable": str(tmp_path / "hang")}))
    text = f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho '{event}'\n{closes}exec sleep 60\n"
    (tmp_path / "hang").write_text(text, encoding="utf-8")
    (tmp_path / "hang").chmod(0o755)
    monkeypatch.setattr(building.machine, "FACTS_S", 1.0)
    monkeypatch.setattr(building, "BUILD_LIMIT_S", 1.0)
    if verb == "build":
        here = {"library": {"name": "tensorrt", "version": "9", "build": ""}, "gpu": {}}
        monkeypatch.setattr(building, "facts", lambda name: here)
    begin = time.monotonic()
    with pytest.raises(DeployError) as error:
        building.build(path, tmp_path / "a.plan", "tensorrt", OPTIONS, tmp_path / ".deploy")
    what = {"facts": "tensorrt did not load", "build": "the building process did not end"}[verb]
    assert (error.value.message, error.value.hint) == (f"{what} within 1 s.", building.HUNG_HINT)
    assert 1.0 <= time.monotonic() - begin < 30.0
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert not list((tmp_path / ".deploy").glob("build-*"))


@pytest.mark.parametrize(
    ("event", "hint"),
    [
        ({"kind": "library", "message": "m"}, building.INSTALL["tensorrt-rtx"]),
        ({"kind": "model", "message": "m"}, building.BUILD_HINT),
        ({"kind": "model", "message": "m", "hint": "own."}, "own."),
        ({"kind": "disk", "message": "m"}, "free space or choose another folder."),
        ({"kind": "memory", "message": "m", "hint": "less."}, "less."),
    ],
)
def test_what_is_reported_becomes_one_sentence_and_the_next_step(event, hint):
    error = building.refused(event, "tensorrt-rtx")
    assert (error.message, error.hint, error.exit_code) == ("m.", hint, 1)


def test_a_state_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(building, "facts", lambda name: {"library": {}, "gpu": {}})
    path = write_conv(tmp_path / "a.onnx")
    with pytest.raises(DeployError, match=r"cannot make a folder in '.*file/state': Not a directory"):
        building.build(path, tmp_path / "e", "tensorrt", OPTIONS, tmp_path / "file" / "state")


def test_a_misspelt_key_of_the_table_names_its_near_miss():
    with pytest.raises(UsageError, match=r"no key named 'tensorrt\.cuda_grph'\. Did you mean 'cuda_graph'\?"):
        load_profile("local", {"tensorrt": {"cuda_grph": True}})
    for wrong in ({"compute_capability": "sm86"}, {"workspace_mib": 0}, {"optimization_level": 6}, {"dla_core": -1}):
        with pytest.raises(UsageError):
            load_profile("local", {"tensorrt": wrong})


@pytest.mark.parametrize(
    ("written", "read"), [("8.6", "8.6"), (8.6, "8.6"), (12, "12.0"), (12.0, "12.0"), (None, None)]
)
def test_a_compute_capability_is_text_or_a_number(written, read):
    spec = load_profile("local", {"tensorrt": {"compute_capability": written}}).tensorrt
    assert spec.compute_capability == read


@pytest.mark.parametrize("wrong", [8.65, True, "sm86", [8.6]])
def test_what_is_no_compute_capability_is_refused_with_its_key(wrong):
    with pytest.raises(UsageError, match=r"^the command line: tensorrt\.compute_capability is "):
        load_profile("local", {"tensorrt": {"compute_capability": wrong}})


def test_every_key_of_the_table_is_for_building_running_or_the_cache():
    spec = TensorRTSpec()
    assert set(builder_options(spec)) | set(running_options(spec)) | {"timing_cache"} == set(TensorRTSpec.model_fields)


# --- what lies on the board --------------------------------------------------------------------------------------


def test_the_boards_modules_need_nothing_but_the_standard_library_and_one_another():
    for path in sorted(BOARD.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 6))
        named = [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        named += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
        foreign = {name.partition(".")[0] for name in named}
        assert foreign - {"numpy"} <= sys.stdlib_module_names, path.name
        assert "from __future__ import annotations" not in path.read_text(encoding="utf-8"), "Python 3.6 has none"


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.10", "3.13"])
def test_they_work_under_every_python_of_a_board(version, stand_in, tmp_path):  # noqa: F811
    python = python_of(version)
    (tmp_path / pack.NAME).write_bytes(pack.packed())
    models = [{"onnx": str(write_conv(tmp_path / "a.onnx")), "out": str(tmp_path / name)} for name in "ef"]
    job = {"models": models, "library": "tensorrt-rtx"}
    (tmp_path / "job.json").write_text(json.dumps({**job, "options": {}}), encoding="utf-8")
    command = [python, pack.NAME, "engine", "build", "job.json", "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    event = json.loads(done.stdout)
    assert done.returncode == 1 and event["kind"] == "library" and "tensorrt_rtx" in event["message"]
    code = f"import sys; sys.path.insert(0, '{pack.NAME}'); from board.tensorrt import onnxfile; "
    code += "print(onnxfile.read('a.onnx').opset)"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path).stdout == "17\n"
    binary = stand_in()
    (tmp_path / "job.json").write_text(json.dumps({**job, "library": "tensorrt", "options": {}}), encoding="utf-8")
    path = os.pathsep.join((str(Path(binary.path).parent), os.environ["PATH"]))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": path}, check=False
    )
    shares = [json.loads(line)["done"] for line in done.stdout.splitlines()[:-1]]
    assert done.returncode == 0 and shares[0] < 0.01 and 0.5 in shares and shares[-1] == 1.0
    assert [made["bytes"] for made in json.loads((tmp_path / "out.json").read_text())] == 2 * [len("plan\n")]
    usage = subprocess.run([python, pack.NAME, "engine"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert usage.returncode == 2 and "agent engine build JOB.json OUT.json" in usage.stderr
