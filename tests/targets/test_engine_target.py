"""Engines on a target, from building to outputs: here and on a board, over stand-ins for TensorRT and CUDA.

The stand-ins are other processes' Python modules and a compiled library, so everything between them and the caller is
what a Jetson would run: the agent in its zip, the worker, the link, jobs, the engine that is fetched.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from boards import TestBoard
from engine_sites import installed, make_site, write_relu, write_scaled
from test_building import only_without
from test_jetson import Shown, orin  # noqa: F401  a fixture
from test_trtexec import RECORDED, stand_in  # noqa: F401  a fixture

from pipeline import flow
from profiles.errors import DeployError, UndecidedError
from profiles.schema import MeasureSpec, load_profile
from targets import local as local_target
from targets.base import load_target
from targets.harness import lease as leases
from targets.harness.measurement import Session

SHORT = MeasureSpec(
    rank_processes=1, rank_rounds=8, block_min_ms=1.0, warmup_s=0.1, warmup_inferences=10, warmup_max_s=0.5
)
PROTOCOL = "tensorrt-python-1/clock=wall/cuda_graph=1/spin=0/copies=1"
KERNEL_MS = 0.2


@pytest.fixture(params=["here", "on a board"])
def target(request, tmp_path, monkeypatch):
    """This machine, or a board, that has TensorRT and a GPU."""
    state = tmp_path / ".deploy"
    state.mkdir()
    if request.param == "here":
        (tmp_path / "lock").mkdir()
        monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")
        monkeypatch.setenv("PYTHONPATH", str(make_site(tmp_path / "site")))
        yield load_target(load_profile("local", {"runtime": "tensorrt", "tensorrt": {"cuda_graph": True}}), state)
        return
    board: TestBoard = request.getfixturevalue("board")
    with installed(board, make_site(tmp_path / "site")):
        file = board.file("engines", 'runtime = "tensorrt"', "tensorrt = { cuda_graph = true }")
        target = load_target(load_profile(str(file)), state)
        yield target
        target.board.close()


def test_an_engine_is_built_where_it_runs_measured_and_asked(target, tmp_path):
    one, two = (write_relu(tmp_path / f"{name}.onnx", name) for name in ("one", "two"))
    built = [target.build(path, tmp_path / f"{path.stem}.plan") for path in (one, two)]
    assert built[0].read_bytes() != built[1].read_bytes()
    again = target.build(one, tmp_path / "again.plan")
    assert again.read_bytes() == built[0].read_bytes()

    fingerprint = target.fingerprint()
    assert (fingerprint.runtime, fingerprint.runtime_version) == ("tensorrt", "10.3.0")
    assert fingerprint.gpu.startswith("Orin 8.7, CUDA 12.6, driver 12.8") and fingerprint.providers == (PROTOCOL,)

    session = target.measure(dict(zip(("one", "two"), built, strict=True)), SHORT, "rank")
    assert session.fingerprint == fingerprint and session.protocol.startswith(f"{PROTOCOL} rank ")
    assert all(KERNEL_MS <= m.p50_ms < 20 * KERNEL_MS for m in session.measurements.values())
    for measured in Session.from_json(session.to_json()).measurements.values():
        assert measured.on_gpu is not None and 0.95 * KERNEL_MS <= measured.on_gpu.p50_ms < measured.p50_ms
        assert all((block.gpu_ns < block.ns).all() and block.gpu_ns.min() > 0 for block in measured.processes)

    rows = target.rows([one, two], one, 3)
    assert rows.ms.shape == (2, 3) and (rows.ms >= KERNEL_MS).all() and (rows.reference_ms >= KERNEL_MS).all()


def test_weights_beside_a_network_reach_the_builder(target, tmp_path):
    """Two files that are equal byte for byte, with other weights beside them, give two engines."""
    one, two = (write_scaled(tmp_path / str(factor) / "net.onnx", factor) for factor in (2.0, 3.0))
    assert one.read_bytes() == two.read_bytes()
    places = {path: path.with_suffix(".plan") for path in (one, two)}
    target.build_each(places)
    engines = [json.loads(place.read_bytes())["model"] for place in places.values()]
    whole = [onnx.shape_inference.infer_shapes(onnx.load(path)).SerializeToString() for path in (one, two)]
    assert engines == [hashlib.sha256(each).hexdigest() for each in whole] and engines[0] != engines[1]


def here(tmp_path, monkeypatch, engine_mib):
    """This machine with a GPU of 3000 MiB, of which an open engine takes so many."""
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")
    monkeypatch.setenv("PYTHONPATH", str(make_site(tmp_path / "site", engine_mib)))
    return load_target(load_profile("local", {"runtime": "tensorrt"}), tmp_path / ".deploy")


def test_an_engine_is_built_here_while_nobody_else_measures(tmp_path, monkeypatch):
    """A builder takes the whole GPU. One that is kept from before is taken at once."""
    target = here(tmp_path, monkeypatch, 0)
    models = [write_relu(tmp_path / f"{name}.onnx", name) for name in ("one", "two")]
    monkeypatch.setattr(local_target, "lease", functools.partial(leases.lease, wait_s=0.0))
    with leases.lease("local", 60), pytest.raises(UndecidedError, match="the device 'local' is in use by "):
        target.build(models[0], tmp_path / "one.plan")
    assert not list((tmp_path / ".deploy").glob("engines/*")) and not list((tmp_path / ".deploy").glob("build-*"))
    built = target.build(models[0], tmp_path / "one.plan").read_bytes()
    with leases.lease("local", 60):
        assert target.build(models[0], tmp_path / "again.plan").read_bytes() == built
        with pytest.raises(UndecidedError):
            target.build(models[1], tmp_path / "two.plan")


def test_rows_that_do_not_fit_at_once_are_measured_in_groups_each_beside_the_reference(tmp_path, monkeypatch):
    """The reference's five sessions leave 1500 MiB; a group takes half of them. All at once would take 3600."""
    target = here(tmp_path, monkeypatch, 300)
    models = [write_relu(tmp_path / f"{number}.onnx", f"net{number}") for number in range(7)]
    told: list[float] = []
    times = target.rows(models, models[0], 3, told.append)
    assert times.group.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert times.ms.shape == (7, 3) and times.reference_ms.shape == (3, 3) and (times.ms >= KERNEL_MS).all()
    ratios = np.median(times.ms / times.reference_ms[times.group], axis=1)
    assert (ratios > 0.5).all() and (ratios < 2.0).all()
    assert told == sorted(told) and told[0] < 0.2 and told[-1] == 1.0
    assert not list((tmp_path / ".deploy").glob("engines/*")), "rows are kept by their times, not as engines"


def test_a_row_that_turns_out_not_to_fit_waits_for_the_next_group(tmp_path, monkeypatch):
    """Ten sessions of one model take the 2000 MiB that the reference leaves, so it cannot share them."""
    target = here(tmp_path, monkeypatch, 200)
    small, large = (write_relu(tmp_path / f"{name}.onnx", name) for name in ("small", "large"))
    assert target.rows([small, *[large] * 10], small, 2).group.tolist() == [0] + [1] * 10
    with pytest.raises(DeployError, match="the GPU has no memory left for cudaStreamCreateWithFlags"):
        target.rows([large] * 11, small, 2)


def test_rows_whose_engines_cannot_be_built_say_why(tmp_path, monkeypatch):
    target = here(tmp_path, monkeypatch, 0)
    model = write_relu(tmp_path / "net.onnx")
    monkeypatch.setenv("FAKE_CRASH", "1")
    with pytest.raises(DeployError) as error:
        target.rows([model], model, 2)
    killed = "the building process was killed by signal 9, as a system does that runs out of memory."
    assert error.value.message == killed and error.value.hint.startswith("lower tensorrt.workspace_mib")
    monkeypatch.delenv("FAKE_CRASH")
    asking = load_profile("local", {"runtime": "tensorrt", "tensorrt": {"dla_core": 3}})
    with pytest.raises(DeployError, match=r"the DLA core 3 was asked for, TensorRT 10\.3\.0 finds 0 here\."):
        load_target(asking, target.state).rows([model], model, 2)


def test_a_jetson_is_set_up_once_for_all_rows_and_once_for_all_engines(orin: Shown, tmp_path):  # noqa: F811
    once = ["nvpmodel 1", "lock", "restore", "nvpmodel 0", "restore"]
    wish = 'jetson = { power_mode = "25W", clocks = "locked", telemetry_ms = 0 }'
    with installed(orin.board, make_site(tmp_path / "site")):
        file = orin.board.file("trt", 'runtime = "tensorrt"', wish, extends="jetson-orin-nano")
        target = load_target(load_profile(str(file)), tmp_path / ".deploy")
        models = [write_relu(tmp_path / f"{number}.onnx", f"net{number}") for number in range(3)]
        target.fingerprint()
        assert orin.done == once
        assert target.rows(models, models[0], 2).ms.shape == (3, 2) and orin.done == once * 2
        places = {model: tmp_path / f"{model.stem}.plan" for model in models}
        assert target.build_each(places) == list(places.values()) and orin.done == once * 3
        assert len({path.read_bytes() for path in places.values()}) == 3
        target.build_each(places)
        assert orin.done == once * 3, "they are kept"
        target.board.close()


NO_OUTPUTS = {
    "outputs": "cannot be read: trtexec gives none",
    "mend": "install TensorRT's Python module there: apt-get install python3-libnvinfer.",
}


@only_without
@pytest.mark.usefixtures("leave_no_project_behind")
def test_where_only_trtexec_is_there_a_build_is_refused_at_its_start(stand_in, tmp_path, monkeypatch):  # noqa: F811
    """Its outputs could not be judged. What only times is not refused."""
    monkeypatch.setenv("PATH", str(Path(stand_in().path).parent), prepend=":")
    target = load_target(load_profile("local", {"runtime": "tensorrt"}), tmp_path / ".deploy")
    found = {condition.name: condition for condition in target.doctor()}
    assert found["runtime"].ok and found["runtime"].value == "trtexec 10.3.0"
    assert not found["outputs"].ok and not found["outputs"].fatal
    assert (found["outputs"].value, found["outputs"].mend) == tuple(NO_OUTPUTS.values())
    project = shutil.copytree(Path(__file__).parents[2] / "examples" / "digits", tmp_path / "project")
    (project / "digits.safetensors").touch()
    overrides = {"runtime": "tensorrt"}
    request = flow.BuildRequest(project, "local", "0.5x", overrides=overrides, root=tmp_path / "work")
    with pytest.raises(DeployError) as error:
        flow.build(request)
    assert error.value.message == f"nothing can be built for 'local': its outputs {NO_OUTPUTS['outputs']}."
    assert error.value.hint == NO_OUTPUTS["mend"] and not (tmp_path / "work" / "runs").exists()


@only_without
def test_what_trtexec_times_is_filed_under_its_own_protocol(stand_in, tmp_path, monkeypatch):  # noqa: F811
    """Its clock is that of CUDA events, in the fingerprint too, by which rows and engines are kept."""
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")
    monkeypatch.setenv("PATH", str(Path(stand_in(times=400).path).parent), prepend=":")
    target = load_target(load_profile("local", {"runtime": "tensorrt"}), tmp_path / ".deploy")
    fingerprint = target.fingerprint()
    assert fingerprint.runtime == "trtexec"
    assert fingerprint.providers == ("tensorrt-trtexec-1/clock=event/cuda_graph=0/spin=0/copies=1",)
    built = target.build(write_relu(tmp_path / "net.onnx"), tmp_path / "net.plan")
    session = target.measure({"net": built}, SHORT, "rank")
    assert session.fingerprint == fingerprint and session.protocol.split()[0] == fingerprint.providers[0]
    python = target.runtime.manner((), SHORT, {"runtime": "tensorrt"})
    assert python == ("tensorrt-python-1/clock=wall/cuda_graph=0/spin=0/copies=1",)


def test_the_doctor_of_a_board_says_that_trtexec_gives_no_outputs(orin: Shown, tmp_path):  # noqa: F811
    bin = orin.place / "bin"
    shutil.copy(RECORDED / "help-10.txt", bin)
    (bin / "trtexec").write_text('#!/bin/sh\ncat "$(dirname "$0")/help-10.txt"\n')
    (bin / "trtexec").chmod(0o755)
    try:
        file = orin.board.file("only", 'runtime = "tensorrt"', extends="jetson-orin-nano")
        target = load_target(load_profile(str(file)), tmp_path / ".deploy")
        found = {condition.name: condition for condition in target.doctor()}
        target.board.close()
    finally:
        (bin / "trtexec").unlink()
    assert found["runtime"].value == "trtexec 10.3.0"
    assert (found["outputs"].value, found["outputs"].mend) == tuple(NO_OUTPUTS.values())


def test_a_library_that_is_not_there_is_one_sentence(tmp_path):
    target = load_target(load_profile("local", {"runtime": "tensorrt-rtx"}), tmp_path / ".deploy")
    if (doctor := {c.name: c for c in target.doctor()})["runtime"].ok:
        assert doctor["outputs"].ok
        return
    with pytest.raises(DeployError, match="TensorRT for RTX is not installed here"):
        target.fingerprint()


def test_the_doctor_of_a_machine_says_whether_engines_can_run_on_it(tmp_path, monkeypatch):
    target = here(tmp_path, monkeypatch, 0)
    doctor = {condition.name: condition for condition in target.doctor()}
    assert doctor["gpu"].ok and doctor["gpu"].value == "Orin 8.7, CUDA 12.6, driver 12.8"
    monkeypatch.setenv("FAKE_STATUS", "100")
    doctor = {condition.name: condition for condition in target.doctor()}
    assert doctor["runtime"].ok and doctor["gpu"].value == "none"
    assert doctor["gpu"].fatal and not doctor["gpu"].ok and "--target rtx" in doctor["gpu"].mend


def test_what_a_builder_has_not_is_one_sentence_with_the_key(target, tmp_path):
    object.__setattr__(target.runtime.spec, "dla_core", 3)
    with pytest.raises(DeployError) as error:
        target.build(write_relu(tmp_path / "net.onnx"), tmp_path / "net.plan")
    assert "DLA" in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("target", ["on a board"], indirect=True)
def test_outputs_are_those_of_the_engine(target, tmp_path):
    """The stand-in's GPU doubles its input, whatever the network says. Here it would stay loaded in this process."""
    artifact = target.build(write_relu(tmp_path / "net.onnx"), tmp_path / "net.plan")
    batch = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
    assert np.array_equal(target.infer(artifact, [batch])[0], 2 * batch)
