"""Who a device is, and what could spoil a measurement on it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.errors import UndecidedError
from profiles.schema import MeasureSpec
from targets.harness import device
from targets.harness.agent.board import machine
from targets.harness.device import Fingerprint, Preflight, preflight

CALM = {
    "load": 0.1,
    "cores": 4,
    "runnable": 0,
    "steal_percent": 0.0,
    "cpu_quota": None,
    "power": "performance",
    "clocks": "locked",
    "temperatures": {"soc 0": 45.0, "gpu 1": 50.0},
    "clocks_khz": [1_728_000, 1_728_000],
    "throttle": {"oc1": 0},
    "throttle_moved": 0,
    "busy": [],
    "memory_free_mib": 4000,
    "disk_free_mib": 9000,
    "folder": "/data",
}


def fingerprint(**changes) -> Fingerprint:
    return replace(
        device.fingerprint(machine.facts("onnxruntime"), ("CPUExecutionProvider",), MeasureSpec()), **changes
    )


def spoilt(spec: MeasureSpec | None = None, **changes):
    return {c.name: c for c in preflight(spec or MeasureSpec(), {**CALM, **changes}).spoilt}


def test_a_fingerprint_is_the_same_when_it_is_read_again():
    assert fingerprint() == fingerprint()
    assert fingerprint().digest() == fingerprint().digest()


def test_a_fingerprint_names_the_runtime_that_is_installed():
    import onnxruntime

    made = fingerprint()
    assert (made.runtime, made.runtime_version) == ("onnxruntime", onnxruntime.__version__)
    assert len(made.runtime_build) == len(made.cpu_flags) == 64
    assert made.cores >= 1 and made.memory_mib > 0 and made.cpu and made.machine and made.kernel


@pytest.mark.parametrize(
    "change",
    [{"runtime_version": "0.0"}, {"threads": 7}, {"spin": True}, {"power": "x"}, {"kernel": "x"}, {"cores": 99}],
)
def test_whatever_a_latency_depends_on_changes_the_digest(change):
    assert fingerprint(**change).digest() != fingerprint().digest()
    assert list(fingerprint(**change).differs(fingerprint())) == list(change)


def test_a_fingerprint_comes_back_from_its_table():
    assert Fingerprint.from_table(fingerprint().to_table()) == fingerprint()


def test_a_calm_device_spoils_nothing():
    assert spoilt() == {}
    preflight(MeasureSpec(spin=True), CALM).require()


def test_a_busy_machine_is_recorded_and_not_refused():
    state = preflight(MeasureSpec(), {**CALM, "runnable": 3, "load": 5.0})
    assert [c.name for c in state.spoilt] == ["runnable threads", "load"]
    assert state.require() is state


def test_spinning_threads_on_a_busy_machine_are_refused():
    with pytest.raises(UndecidedError) as error:
        preflight(MeasureSpec(spin=True), {**CALM, "runnable": 2}).require()
    assert str(error.value) == (
        "cannot measure: runnable threads is 2 of others; waiting threads that spin disturb each other: "
        "two equal networks then differ by 7.6 %.\nset measure.spin = false, or stop what else runs there."
    )


def test_more_threads_than_cores_are_refused():
    with pytest.raises(UndecidedError) as error:
        preflight(MeasureSpec(threads=8), CALM).require()
    assert (
        str(error.value)
        == "cannot measure: cores is 4; 8 threads on 4 cores wait for each other.\nset measure.threads = 4 or lower."
    )


REFUSALS = [
    ({"disk_free_mib": 10}, "free disk is 10 MiB; 256 MiB are needed: raw samples that do not fit are lost."),
    ({"memory_free_mib": 100},
     "free memory is 100 MiB; 256 MiB are needed: a network may not fit, or the system may swap during the run."),
    ({"throttle": {"oc1": 2}, "throttle_moved": 1},
     "throttle events is 2, of them 1 just now; the device lowers its clock now, which voids a measurement."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), REFUSALS)
def test_what_voids_a_measurement_is_refused_with_its_numbers(change, text):
    with pytest.raises(UndecidedError) as error:
        preflight(MeasureSpec(), {**CALM, **change}).require()
    assert error.value.message == f"cannot measure: {text}"
    assert error.value.hint.endswith(".")


def test_a_device_hotter_than_declared_is_refused_and_without_a_declaration_only_recorded():
    hot = {**CALM, "temperatures": {"soc 0": 93.4, "gpu 1": 50.0}}
    assert not preflight(MeasureSpec(), hot).require().spoilt[0].fatal
    declared = MeasureSpec(start_below_c=50.5)
    assert preflight(declared, CALM).require().spoilt == ()
    with pytest.raises(UndecidedError) as error:
        preflight(declared.model_copy(update={"start_below_c": 50.0}), CALM).require()
    assert error.value.message == (
        "cannot measure: temperature is 50 C at gpu 1; a measurement starts below 50 C (measure.start_below_c)."
    )
    with pytest.raises(UndecidedError) as error:
        preflight(declared, {**CALM, "temperatures": {}}).require()
    assert error.value.message.startswith("cannot measure: temperature is not shown by this system; ")


def test_everything_else_that_spoils_a_number_is_advice():
    worn = {"steal_percent": 30.0, "cpu_quota": 0.4, "clocks": "floating", "power": "powersave", "load": 9.0}
    state = preflight(MeasureSpec(), {**CALM, **worn, "throttle": {"oc1": 2}, "runnable": 3})
    assert state.require() is state and len(state.spoilt) == 7


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"steal_percent": 7.25}, "steal", "7.2 %"),
        ({"cpu_quota": 0.4}, "processor quota", "0.4 cores"),
        ({"clocks": "floating"}, "clocks", "floating, now 1728 MHz"),
        ({"clocks": "floating", "clocks_khz": [800_000, 3_100_000]}, "clocks", "floating, now 800 to 3100 MHz"),
        ({"power": "powersave"}, "governor", "powersave"),
        ({"power": "performance powersave"}, "governor", "performance powersave"),
        ({"temperatures": {"soc 0": 93.4}}, "temperature", "93 C at soc 0"),
        ({"throttle": {"oc1": 2, "oc3": 1}}, "throttle events", "3"),
        ({"throttle": {"oc1": 2}, "throttle_moved": 1}, "throttle events", "2, of them 1 just now"),
        (
            {"busy": [{"pid": 12, "command": "python train.py", "cores": 1.04}]},
            "busy processes",
            "python train.py (process 12) at 1.04 cores",
        ),
        ({"memory_free_mib": 100}, "free memory", "100 MiB"),
        ({"disk_free_mib": 10}, "free disk", "10 MiB"),
    ],
)
def test_each_thing_that_spoils_a_number_is_named_with_why_and_how_to_mend_it(change, name, value):
    found = spoilt(**change)
    assert list(found) == [name]
    assert found[name].value == value
    assert found[name].why and found[name].mend.endswith(".")


def test_a_process_to_end_is_named_by_its_number():
    busy = [{"pid": 12, "command": "python", "cores": 2.0}, {"pid": 7, "command": "yes", "cores": 0.5}]
    found = spoilt(busy=busy)["busy processes"]
    assert found.value == "python (process 12) at 2.00 cores, yes (process 7) at 0.50 cores"
    assert found.mend == "wait for it, or end it if it is yours: kill 12."


SPIN = "import sys, time; sys.stdout.write('up'); sys.stdout.flush(); end = time.monotonic() + 20\n"
SPIN += "while time.monotonic() < end: pass\n"


def test_a_process_that_spins_is_found_with_the_script_it_runs(tmp_path):
    (tmp_path / "spin.py").write_text(SPIN)
    command = [sys.executable, str(tmp_path / "spin.py"), "--token", "secret.value"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as spinning:
        try:
            assert spinning.stdout is not None and spinning.stdout.read(2) == b"up"
            for _ in range(5):  # the three busiest are named, and this machine may be busy
                busy = machine.state(str(tmp_path))["busy"]
                if spinning.pid in {p["pid"] for p in busy}:
                    break
        finally:
            spinning.kill()
    (found,) = [p for p in busy if p["pid"] == spinning.pid]
    assert found["command"] == f"{Path(sys.executable).name} spin.py" and found["cores"] >= machine.BUSY_CORES
    assert os.getpid() not in {p["pid"] for p in busy}


def test_the_lease_condition_says_who_holds_the_device():
    assert device.lease_condition(None).ok
    held = device.lease_condition("ada@host (process 9, expected until 12:00:00 UTC)")
    assert not held.ok and held.value == "held by ada@host (process 9, expected until 12:00:00 UTC)"
    assert held.why and held.mend


def test_what_a_system_does_not_show_is_left_out_and_not_guessed():
    state = preflight(
        MeasureSpec(), {**CALM, "steal_percent": None, "memory_free_mib": None, "temperatures": {}, "throttle": {}}
    )
    assert not {"steal", "free memory", "temperature", "throttle events"} & {c.name for c in state.conditions}


def test_the_preflight_of_this_machine_comes_back_from_its_table(tmp_path):
    state = preflight(MeasureSpec(), folder=tmp_path / "not" / "yet" / "made")
    assert Preflight.from_table(state.to_table()) == state
    assert {"load", "cores", "free disk"} <= {c.name for c in state.conditions}
