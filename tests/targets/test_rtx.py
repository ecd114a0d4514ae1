"""A card by its compute capability: elsewhere, where engines are built for it and nothing is timed, and here.

Elsewhere the library is the real one (pip install 'edge-deploy[tensorrt-rtx]'); the card is a stand-in.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from conftest import write_conv
from engine_sites import make_site, write_relu

from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import MeasureSpec, load_profile
from targets.base import load_target
from targets.harness import building
from targets.harness import lease as leases
from targets.harness.agent.board import machine
from targets.harness.agent.board.tensorrt import job, library
from targets.local import Local
from targets.rtx import MEND, Elsewhere

INSTALLED = importlib.util.find_spec("tensorrt_rtx_bindings") is not None
only_with = pytest.mark.skipif(not INSTALLED, reason="TensorRT for RTX is not installed")
NO_CARD = "the engine is for a card of compute capability 8.6, and there is no GPU here"
SHORT = MeasureSpec(
    rank_processes=1, rank_rounds=8, block_min_ms=1.0, warmup_s=0.1, warmup_inferences=10, warmup_max_s=0.5
)


def rtx(tmp_path, capability=8.6, **keys):
    return load_target(
        load_profile("rtx", {"tensorrt": {"compute_capability": capability}, **keys}), tmp_path / ".deploy"
    )


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An RTX 30 card, and no GPU in this machine whatever there is."""
    monkeypatch.setattr(building, "facts", lambda name: {**known[name], "gpu": {"none": "hidden"}})
    known = {"tensorrt-rtx": building._work(["facts", "tensorrt-rtx"], "tensorrt-rtx", None, machine.FACTS_S)}
    return rtx(tmp_path)


@only_with
def test_an_engine_is_built_for_a_card_elsewhere_and_whoever_asks_for_more_is_told(elsewhere, tmp_path):
    assert isinstance(elsewhere, Elsewhere)
    model = write_conv(tmp_path / "net.onnx")
    plan = elsewhere.build(model, tmp_path / "net.plan")
    assert plan == tmp_path / "net.plan" and plan.stat().st_size > 1000
    verbs = (
        lambda: elsewhere.measure({"net": plan}, SHORT, "rank"),
        lambda: elsewhere.rows([model], model, 3),
        lambda: elsewhere.layers({"net": plan}, SHORT),
        lambda: elsewhere.infer(plan, [np.zeros((1, 3, 8, 8), np.float32)]),
        elsewhere.require_latency,
    )
    for verb in verbs:
        with pytest.raises(UndecidedError) as error:
            verb()
        assert (error.value.message, error.value.exit_code) == (f"nothing can be measured for 'rtx': {NO_CARD}.", 4)
        assert error.value.hint == MEND
    with pytest.raises(UndecidedError, match="cannot measure: latency is not measurable here"):
        elsewhere.preflight().require()


@only_with
def test_its_fingerprint_is_the_card_and_the_library_and_says_that_it_is_elsewhere(elsewhere, tmp_path):
    found = elsewhere.fingerprint()
    assert found.machine == "a card that is not here" and found.gpu == "compute capability 8.6"
    assert (found.runtime, found.runtime_version) == ("tensorrt-rtx", elsewhere.runtime.version())
    assert len(found.runtime_build) == 64 and found.cpu == "" and found.cores == 0
    assert rtx(tmp_path / "again").fingerprint() == found
    assert rtx(tmp_path, 8.9).fingerprint().digest() != found.digest()
    other = load_profile("rtx", {"tensorrt": {"tf32": False}})
    assert load_target(other, tmp_path / "other").fingerprint().digest() != found.digest()


@only_with
def test_its_doctor_says_what_can_be_done_here_and_what_cannot(elsewhere, tmp_path):
    doctor = {c.name: c for c in elsewhere.doctor()}
    assert doctor["runtime"].ok and doctor["engines"].ok
    assert doctor["engines"].value == "built here for compute capability 8.6"
    assert not doctor["latency"].ok and doctor["latency"].fatal
    assert (doctor["latency"].why, doctor["latency"].mend) == (NO_CARD, MEND)
    assert not doctor["outputs"].ok and "which is not the engine" in doctor["outputs"].why
    unknown = {c.name: c for c in rtx(tmp_path, 8.7).doctor()}["engines"]
    assert not unknown.ok and unknown.fatal and unknown.mend.startswith("set tensorrt.compute_capability to 7.5, 8.0, ")


def test_without_the_library_whatever_is_asked_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    for module in library.MODULES["tensorrt-rtx"]:
        (tmp_path / "site" / f"{module}.py").write_text("raise ImportError('away')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    target, install = rtx(tmp_path), "pip install 'edge-deploy[tensorrt-rtx]'"
    (condition,) = target.doctor()
    assert not condition.ok and condition.fatal and condition.mend == install
    with pytest.raises(UndecidedError) as error:
        target.require_latency()
    away = "TensorRT for RTX is not installed here: away"
    assert (error.value.message, error.value.hint) == (f"nothing can be measured for 'rtx': {away}.", install)
    with pytest.raises(DeployError, match=f"^{away}"):
        target.fingerprint()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"runtime": "ort"}, "the target 'rtx' runs engines of 'tensorrt-rtx', and the profile 'rtx' asks for 'ort'."),
        ({"capability": None}, "the profile 'rtx' does not say for which card engines are built."),
    ],
)
def test_a_profile_that_names_no_card_or_another_runtime_is_refused(keys, told, tmp_path):
    with pytest.raises(UsageError) as error:
        rtx(tmp_path, **keys)
    assert error.value.message == told and error.value.hint


# --- a card in this machine --------------------------------------------------------------------------------------


@pytest.fixture
def card(tmp_path, monkeypatch):
    """This machine has a GPU of compute capability 8.7 and a library for it."""
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")
    monkeypatch.setenv("PYTHONPATH", str(make_site(tmp_path / "site", module="tensorrt_rtx")))


def test_a_card_that_is_here_is_measured_like_any_other_target(card, tmp_path):
    target = rtx(tmp_path, 8.7)
    assert isinstance(target, Local) and target.latency().ok
    assert target.profile.name == "rtx" and target.fingerprint().gpu.startswith("Orin 8.7")
    plan = target.build(write_relu(tmp_path / "net.onnx"), tmp_path / "net.plan")
    session = target.measure({"one": plan, "two": plan}, SHORT, "rank")
    assert all(measured.p50_ms > 0.1 for measured in session.measurements.values())


def test_a_card_of_another_capability_is_named(card, tmp_path):
    target = rtx(tmp_path, 8.6)
    assert isinstance(target, Elsewhere)
    assert target.latency().why.endswith("compute capability 8.6, and the GPU here is Orin of 8.7")
    assert target.latency().mend == MEND, "its library builds for no card but the one that is there"
    target._site.known["tensorrt-rtx"]["capabilities"] = ["8.6", "8.7"]
    assert target.latency().mend == "--set tensorrt.compute_capability=8.7 takes the GPU here."


@only_with
def test_the_library_tells_for_which_cards_it_builds():
    offered = job.facts("tensorrt-rtx")["capabilities"]
    assert {"8.6", "8.9", "12.0"} <= set(offered) and offered == sorted(offered, key=float)
