"""Engines on a target, from building to outputs: here and on a board, over stand-ins for TensorRT and CUDA.

The stand-ins are other processes' Python modules and a compiled library, so everything between them and the caller is
what a Jetson would run: the agent in its zip, the worker, the link, jobs, the engine that is fetched.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from boards import TestBoard
from engine_sites import make_site, write_relu

from profiles.errors import DeployError
from profiles.schema import MeasureSpec, load_profile
from targets.base import load_target
from targets.harness import lease as leases

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
    version = Path(sysconfig.get_path("purelib")).parent.name
    place = board.folder / "home" / "env" / "lib" / version / "site-packages"
    before = set(place.iterdir())
    made = make_site(tmp_path / "site")
    for path in made.iterdir():
        shutil.move(path, place / path.name)
    file = board.file("engines", 'runtime = "tensorrt"', "tensorrt = { cuda_graph = true }")
    target = load_target(load_profile(str(file)), state)
    yield target
    target.board.close()
    for path in set(place.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_an_engine_is_built_where_it_runs_measured_and_asked(target, tmp_path):
    one, two = (write_relu(tmp_path / f"{name}.onnx", name) for name in ("one", "two"))
    built = [target.build(path, tmp_path / f"{path.stem}.plan") for path in (one, two)]
    assert built[0].read_bytes() != built[1].read_bytes()
    again = target.build(one, tmp_path / "again.plan")
    assert again.read_bytes() == built[0].read_bytes()

    fingerprint = target.fingerprint()
    assert (fingerprint.runtime, fingerprint.runtime_version) == ("tensorrt", "10.3.0")
    assert fingerprint.gpu == "Orin 8.7, CUDA 12.6, driver 12.8" and fingerprint.providers == (PROTOCOL,)

    session = target.measure(dict(zip(("one", "two"), built, strict=True)), SHORT, "rank")
    assert session.fingerprint == fingerprint and session.protocol.startswith(f"{PROTOCOL} rank ")
    assert all(KERNEL_MS <= m.p50_ms < 20 * KERNEL_MS for m in session.measurements.values())

    rows = target.rows([one, two], one, 3)
    assert rows.ms.shape == (2, 3) and (rows.ms >= KERNEL_MS).all() and (rows.reference_ms >= KERNEL_MS).all()


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
