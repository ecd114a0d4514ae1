"""The key of an engine: two networks share one only where everything that an engine depends on is the same."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import onnx
import pytest
from conftest import write_conv
from onnx import numpy_helper
from test_onnxfile import mixed

from profiles.errors import DeployError
from targets.harness import engines
from targets.harness.agent.board.tensorrt import engine

LIBRARY = {"name": "tensorrt", "version": "10.3.0", "build": "ab"}
GPU = {"capability": "8.7", "cuda": "12.6", "driver": "12.6"}


def key(onnx_path, library=LIBRARY, device=GPU, **options):
    return engines.engine_key(onnx_path, {**engine.OPTIONS, **options}, library, device)


def other_weights(source, target):
    """The same network in every name and shape, with one weight moved by its last bit."""
    model = onnx.load(source)
    weight = model.graph.initializer[0]
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] = np.nextafter(array.flat[0], np.float32(9))
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, target)
    return target


def test_two_networks_of_one_structure_never_share_an_engine(tmp_path):
    first = write_conv(tmp_path / "a.onnx")
    second = other_weights(first, tmp_path / "b.onnx")
    assert first.stat().st_size == second.stat().st_size
    assert key(first) != key(second)
    store = engines.Engines(tmp_path / ".deploy")
    for path, plan in ((first, b"one"), (second, b"two")):
        (tmp_path / "e.plan").write_bytes(plan)
        store.keep(key(path), tmp_path / "e.plan", {"title": "t"})
    assert store.find(key(first))[0].read_bytes() == b"one"
    assert store.find(key(second))[0].read_bytes() == b"two"


def test_the_same_network_under_another_name_has_the_same_key(tmp_path):
    first = write_conv(tmp_path / "a.onnx")
    (tmp_path / "elsewhere").mkdir()
    again = write_conv(tmp_path / "elsewhere" / "b.onnx")
    assert key(first) == key(again) and len(key(first)) == 64


def test_weights_beside_the_file_are_part_of_the_key(tmp_path):
    path = mixed(tmp_path / "m.onnx", external=True)
    before = key(path)
    weights = bytearray((tmp_path / "weights.bin").read_bytes())
    weights[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(weights)
    assert key(path) != before
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(DeployError, match=r"weights\.bin', with weights of '.*m\.onnx', cannot be read"):
        key(path)


def test_weights_outside_the_folder_are_refused(tmp_path):
    path = mixed(tmp_path / "m.onnx", external=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"weights.bin", b"../../s.bin"))
    with pytest.raises(DeployError, match="keeps weights outside its folder"):
        key(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"library": {**LIBRARY, "version": "10.7.0"}},
        {"library": {**LIBRARY, "build": "ac"}},
        {"library": {**LIBRARY, "name": "tensorrt-rtx"}},
        {"device": {**GPU, "capability": "8.6"}},
        {"device": "f" * 64},
        *({name: value} for name, value in {
            "workspace_mib": 64, "workspace_share": 0.25, "version_compatible": True, "hardware_compatible": "ampere+",
            "dla_core": 0, "compute_capability": "8.6", "optimization_level": 5, "tf32": False,
        }.items()),
    ],
    ids=str,
)  # fmt: skip
def test_whatever_an_engine_depends_on_changes_the_key(changed, tmp_path):
    path = write_conv(tmp_path / "a.onnx")
    assert key(path, **changed) != key(path)


def test_every_option_of_the_builder_was_tried_above():
    tried = test_whatever_an_engine_depends_on_changes_the_key.pytestmark[0].args[1]
    assert {name for changed in tried for name in changed} - {"library", "device"} == set(engine.OPTIONS)


def test_shapes_and_precision_change_the_key(tmp_path):
    sizes = [write_conv(tmp_path / f"{n}.onnx", size=n) for n in (16, 8)]
    assert key(sizes[0]) != key(sizes[1])


def test_a_damaged_engine_is_dropped_and_none_is_none(tmp_path):
    store, plan = engines.Engines(tmp_path / ".deploy"), tmp_path / "e.plan"
    assert store.find("ab" * 32) is None
    plan.write_bytes(b"engine")
    kept = store.keep("ab" * 32, plan, {"title": "t"})
    assert json.loads((kept.parent / "record.json").read_text())["key"] == "ab" * 32
    kept.write_bytes(b"enginX")
    assert store.find("ab" * 32) is None and not kept.parent.exists()
    assert [path.name for path in kept.parent.parent.iterdir()] == []


def test_an_engine_that_is_used_stays_young(tmp_path):
    store, plan = engines.Engines(tmp_path / ".deploy"), tmp_path / "e.plan"
    plan.write_bytes(b"engine")
    folder = store.keep("k", plan, {}).parent
    os.utime(folder, (1, 1))
    store.find("k")
    assert folder.stat().st_mtime > time.time() - 60


def test_of_two_builds_of_one_key_the_first_stays(tmp_path):
    store, plan = engines.Engines(tmp_path / ".deploy"), tmp_path / "e.plan"
    for data in (b"one", b"two"):
        plan.write_bytes(data)
        store.keep("k", plan, {})
    assert store.find("k")[0].read_bytes() == b"one"
    assert [path.name for path in (tmp_path / ".deploy" / "engines").iterdir()] == ["k"]


def test_an_engine_that_cannot_be_kept_leaves_nothing(tmp_path, monkeypatch):
    def full(*ignored):
        raise OSError(28, "No space left on device")

    (tmp_path / "e.plan").write_bytes(b"engine")
    monkeypatch.setattr(engines.os, "replace", full)
    with pytest.raises(DeployError, match=r"cannot keep an engine in '.*': No space left on device"):
        engines.Engines(tmp_path / ".deploy").keep("k", tmp_path / "e.plan", {})
    assert list((tmp_path / ".deploy" / "engines").iterdir()) == []


def test_what_was_timed_belongs_to_a_library_and_a_device():
    names = {
        engines.timing_name(lib, device)
        for lib in (LIBRARY, {**LIBRARY, "version": "11"}) for device in (GPU, {**GPU, "capability": "7.2"})
    }  # fmt: skip
    assert len(names) == 4
