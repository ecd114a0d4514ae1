"""What every target and every runtime does, run over the whole folder."""

from __future__ import annotations

import inspect
import shutil

import numpy as np
import onnx
import pytest

from profiles import plugins
from profiles.errors import DeployError, UsageError
from profiles.schema import load_profile, profile_names
from targets.base import LayerTime, Target, load_target
from targets.harness import lease as leases
from targets.harness.measurement import Session
from targets.runtimes.base import Runtime, load_runtime

TARGETS = plugins.names("targets")
ABSENT = ("rtx",)
"""Targets of a device that need not be here: test_rtx.py is about them, here and elsewhere."""
TIMED = [name for name in TARGETS if name not in ABSENT]
BOARDS = {"ssh": "board", "jetson": "whole_jetson"}
"""Fixtures of the boards that stand behind a target's link."""


@pytest.fixture
def target(request, tmp_path, monkeypatch):
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")
    if request.param not in BOARDS:
        name = request.param if request.param in ABSENT else "local"
        yield load_target(load_profile(name, {"target": request.param}), tmp_path / ".deploy")
        return
    file = request.getfixturevalue(BOARDS[request.param]).file("contract", 'runtime = "ort"', extends=request.param)
    target = load_target(load_profile(str(file)), tmp_path / ".deploy")
    (tmp_path / ".deploy").mkdir()
    yield target
    target.board.close()


def test_the_folder_lists_its_targets():
    assert {"local", "simulated"} <= set(TARGETS)


@pytest.mark.parametrize("target", TIMED, indirect=True)
def test_every_target_measures_interleaved_and_says_who_it_is(target, conv, quick):
    assert isinstance(target, Target)
    artifact = target.build(conv("net"), target.state / "model.onnx")
    session = target.measure({"a": artifact, "b": artifact}, quick, "rank")
    assert list(session.measurements) == ["a", "b"]
    now = target.fingerprint()
    assert session.fingerprint.differs(now) == {} and session.fingerprint.digest() == now.digest()
    assert Session.from_json(session.to_json()).ratio("a", "b") == session.ratio("a", "b")


@pytest.mark.parametrize("target", TIMED, indirect=True)
def test_every_target_times_rows_and_infers(target, conv):
    times = target.rows([conv("net"), conv("net")], conv("net"), 4)
    assert times.ms.shape == (2, 4) and (times.ms > 0).all() and (times.reference_ms > 0).all()
    (out,) = target.infer(conv("net", size=8), [np.zeros((3, 3, 8, 8), np.float32)])
    assert out.shape == (3, 16)


@pytest.mark.parametrize("target", TIMED, indirect=True)
def test_every_target_builds_one_file_of_a_network_that_keeps_its_weights_beside_it(target, conv, tmp_path):
    whole, parted = conv("whole", size=8), tmp_path / "parted" / "net.onnx"
    parted.parent.mkdir()
    onnx.save(onnx.load(whole), parted, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    built = target.build(parted, tmp_path / "built" / "net.artifact")
    shutil.rmtree(parted.parent)
    batch = [np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)]
    for found, wanted in zip(target.infer(built, batch), target.infer(whole, batch), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("target", TIMED, indirect=True)
def test_every_target_names_layers_with_their_times(target, conv, quick):
    found = target.layers({"a": conv("net"), "b": conv("net")}, quick)
    assert list(found) == ["a", "b"]
    assert [(x.name, x.op) for x in found["a"]] == [(x.name, x.op) for x in found["b"]]
    assert found["a"] and all(isinstance(layer, LayerTime) and layer.ms >= 0 for layer in found["a"])


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_every_target_explains_what_is_not_as_it_should_be(target):
    conditions = target.doctor()
    assert conditions
    assert all(c.why and c.mend for c in conditions if not c.ok)


@pytest.mark.parametrize("target", TIMED, indirect=True)
def test_every_target_whose_device_is_there_can_be_timed(target):
    assert target.latency().ok
    target.require_latency()


@pytest.mark.parametrize("name", plugins.names("targets.runtimes"))
def test_every_runtime_says_its_name_and_version(name):
    runtime = load_runtime(name)
    assert isinstance(runtime, Runtime) and runtime.name and runtime.suffix.startswith(".")
    try:
        assert runtime.version()
    except DeployError as error:
        assert "is not installed here" in error.message and error.hint
        pytest.skip(error.message)


@pytest.mark.parametrize("name", plugins.names("targets.runtimes"))
def test_every_runtime_takes_a_profile(name, tmp_path):
    assert load_runtime(name).fitted(load_profile("local"), tmp_path).name == load_runtime(name).name


@pytest.mark.parametrize("name", [*TARGETS, *(f"runtimes.{r}" for r in plugins.names("targets.runtimes"))])
def test_every_plug_in_says_in_one_line_what_it_is(name):
    package, _, stem = f"targets.{name}".rpartition(".")
    assert 20 < len(plugins.summary(package, stem)) <= 120


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_names_a_target_and_a_runtime_that_exist(name):
    profile = load_profile(name)
    assert profile.target in TARGETS
    assert profile.runtime in plugins.names("targets.runtimes")


def test_an_unknown_target_names_its_near_miss(tmp_path):
    with pytest.raises(UsageError) as error:
        load_target(load_profile("local", {"target": "locl"}), tmp_path)
    assert str(error.value) == "no target named 'locl'. Did you mean 'local'?\ndeploy list targets"


def test_the_abstract_verbs_are_documented():
    for name in Target.__abstractmethods__:
        assert inspect.getdoc(getattr(Target, name))
