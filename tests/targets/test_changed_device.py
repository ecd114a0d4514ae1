"""A device that becomes another one while it is worked on: nothing of it is kept as the first one's."""

from __future__ import annotations

import pytest
from engine_sites import installed, make_site, write_relu
from test_jetson import Shown, orin  # noqa: F401  a fixture

from pipeline.latency.store import Store
from pipeline.latency.timing import PROTOCOL, Clock, key
from profiles.errors import UndecidedError
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness import bench, building
from targets.harness import lease as leases
from targets.harness.agent.board import machine

HINT = "set it back, or run it again: rows and engines are then made for the device as it is now."


@pytest.fixture
def here(tmp_path, monkeypatch):
    """This machine, which never measures; what its facts say can be changed."""
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")
    found = {**machine.facts("onnxruntime"), "power": "performance", "gpu": "Orin 8.7"}
    monkeypatch.setattr(machine, "asked_facts", lambda *asked: dict(found))
    monkeypatch.setattr(machine, "state", lambda folder: {})
    return found


def test_rows_and_layers_of_a_changed_machine_are_not_begun(here, conv, tmp_path, monkeypatch):
    begun: list[str] = []
    result = {"rows": [[1, 1]], "reference": [[[1, 1]]], "group": [0], "again": [], "layers": {"net": []}}
    monkeypatch.setattr(bench, "run_agent", lambda verb, *rest: begun.append(verb) or result)
    target = load_target(load_profile("local"), tmp_path)
    spec = target.profile.measure
    target.fingerprint()
    target.rows([conv()], conv(), 2)
    target.layers({"net": conv()}, spec)
    assert begun == ["rows", "layers"]
    here.update(power="powersave", runtime_build="0" * 64)
    for verb in (lambda: target.rows([conv()], conv(), 2), lambda: target.layers({"net": conv()}, spec)):
        with pytest.raises(UndecidedError) as error:
            verb()
        assert error.value.message == ("the device has changed: power was performance, is powersave, runtime build.")
        assert error.value.hint == HINT and leases.holder("local") is None
    assert begun == ["rows", "layers"]


def test_what_moves_between_two_runs_changes_no_device(here, conv, tmp_path, monkeypatch):
    result = {"rows": [[1, 1]], "reference": [[[1, 1]]], "group": [0], "again": []}
    monkeypatch.setattr(bench, "run_agent", lambda *arguments: result)
    target = load_target(load_profile("local"), tmp_path)
    target.fingerprint()
    here.update(load=7.5, power_modes=["15W"], no_outputs={"why": "none", "mend": ""})
    assert target.rows([conv()], conv(), 2).ms.shape == (1, 2)


def test_an_engine_of_a_changed_machine_is_not_built(here, tmp_path, monkeypatch):
    library = {"name": "tensorrt", "version": "10.3.0", "build": "1"}
    monkeypatch.setattr(building, "facts", lambda name: {"library": library, "gpu": {}, "capabilities": []})
    built: list[list[str]] = []

    def work(arguments, name, progress, limit_s):
        built.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(building, "_work", work)
    target = load_target(load_profile("local", {"runtime": "tensorrt"}), tmp_path)
    target.fingerprint()
    with pytest.raises(InterruptedError):
        target.build(write_relu(tmp_path / "a.onnx"), tmp_path / "a.plan")
    here["gpu"] = "Orin 8.6"
    with pytest.raises(UndecidedError, match=r"the device has changed: gpu was Orin 8\.7, is Orin 8\.6\."):
        target.build(write_relu(tmp_path / "a.onnx"), tmp_path / "a.plan")
    assert len(built) == 1


def test_rows_of_another_power_mode_are_not_kept_as_those_of_the_first(orin: Shown, conv, tmp_path):  # noqa: F811
    file = orin.board.file("orin", 'runtime = "ort"', "jetson = { telemetry_ms = 0 }", extends="jetson-orin-nano")
    target = load_target(load_profile(str(file)), tmp_path / ".deploy")
    (tmp_path / ".deploy").mkdir()
    data = conv("row", size=8).read_bytes()
    try:
        with Store(tmp_path / "latency.sqlite") as store:
            clock = Clock(target, store)
            (orin.place / "mode").write_text("1\n")
            with pytest.raises(UndecidedError, match=r"the device has changed: power mode was 15W, is 25W\."):
                clock.ratios({key(data): data})
            assert store.rows(clock.device, PROTOCOL, [key(data)]) == {} and orin.board.jobs() == []
            (orin.place / "mode").write_text("0\n")
            assert set(clock.ratios({key(data): data})) == {key(data)}
    finally:
        target.board.close()


def test_another_board_of_the_same_model_is_another_device(orin: Shown, conv, tmp_path):  # noqa: F811
    """A module that is swapped on its carrier keeps the address, and everything else that is told of it."""
    serial = orin.place / "firmware/devicetree/base/serial-number"
    file = orin.board.file("orin", 'runtime = "ort"', "jetson = { telemetry_ms = 0 }", extends="jetson-orin-nano")
    target = load_target(load_profile(str(file)), tmp_path / ".deploy")
    try:
        serial.write_bytes(b"1423423019999\0")
        first = target.fingerprint()
        assert first.serial == "1423423019999" and first.to_table()["serial"] == first.serial
        serial.write_bytes(b"1423423020000\0")
        with pytest.raises(UndecidedError, match="device has changed: serial was 1423423019999, is 1423423020000"):
            target.rows([conv()], conv(), 2)
    finally:
        serial.unlink(missing_ok=True)
        target.board.close()


def test_engines_of_another_power_mode_are_not_kept_as_those_of_the_first(orin: Shown, tmp_path):  # noqa: F811
    with installed(orin.board, make_site(tmp_path / "site")):
        file = orin.board.file("trt", 'runtime = "tensorrt"', "jetson = { telemetry_ms = 0 }",
                               extends="jetson-orin-nano")  # fmt: skip
        target = load_target(load_profile(str(file)), tmp_path / ".deploy")
        net = write_relu(tmp_path / "net.onnx")
        try:
            target.fingerprint()
            (orin.place / "mode").write_text("1\n")
            with pytest.raises(UndecidedError, match=r"the device has changed: power mode was 15W, is 25W\."):
                target.build(net, tmp_path / "net.plan")
            assert not list((tmp_path / ".deploy").glob("engines/*")) and not (tmp_path / "net.plan").exists()
            (orin.place / "mode").write_text("0\n")
            assert target.build(net, tmp_path / "net.plan").stat().st_size > 0
        finally:
            (orin.place / "mode").write_text("0\n")
            target.board.close()
