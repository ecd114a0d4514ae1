"""Baselines: artifacts pinned by content, kept by gc, believed only while they are whole and were met."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from check_samples import DEVICE, finished_run, write_net

from pipeline.cache import Cache
from pipeline.nightly.baseline import (
    accept,
    artifact_of,
    baseline_of,
    described,
    environment,
    from_run,
    history,
    newest,
    profiles_with_baseline,
    unlike,
)
from pipeline.nouns import Pin
from pipeline.run import Run, read_state
from profiles.errors import DeployError, UsageError
from profiles.schema import Profile


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / ".deploy"


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met its budget; tests copy it before they change anything."""
    return finished_run(tmp_path_factory.mktemp("met"))


@pytest.fixture
def run(met: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(met, tmp_path / "runs" / met.name))


def _set(run: Path, **changes: object) -> None:
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | changes))


# --- pinning -----------------------------------------------------------------------------------------------------


def test_a_run_becomes_the_baseline_of_a_profile_and_its_network_comes_back(state: Path, run: Path):
    pin, artifact = from_run(run)
    accept(state, "jetson", pin, artifact)
    found = baseline_of(state, "jetson")
    assert found is not None and found.accepted is not None
    assert replace(found, accepted=None) == pin
    assert pin.name == run.name and pin.budget == "1000x" and pin.fingerprint["runtime"] == "simulated"
    content = artifact_of(state, found).read_bytes()
    assert content == (run / "bundle" / "model.onnx").read_bytes()
    assert hashlib.sha256(content).hexdigest() == pin.sha256
    assert baseline_of(state, "local") is None and profiles_with_baseline(state) == ["jetson"]


def test_a_bundle_whose_accuracy_nothing_judged_is_accepted_for_its_latency(state: Path, run: Path):
    path = run / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["accuracy"] |= {"dense": None, "pruned": None, "unjudged": "the project has no [data]"}
    path.write_text(json.dumps(manifest))
    pin, artifact = from_run(run)
    accept(state, "jetson", pin, artifact)
    assert baseline_of(state, "jetson") is not None and pin.budget == "1000x"


def test_earlier_baselines_stay_in_order_and_are_all_kept_by_gc(state: Path, tmp_path: Path):
    cache, loose = Cache(state), Cache(state).put_bytes(b"nobody names this")
    pins = []
    for width in (8, 16, 24):
        pin, path = from_run(write_net(tmp_path / f"net{width}.onnx", width))
        accept(state, "local", pin, path)
        pins.append(pin.sha256)
    assert [pin.sha256 for pin in history(state, "local")] == pins
    cache.gc(0)
    assert [artifact_of(state, pin).is_file() for pin in history(state, "local")] == [True] * 3
    assert cache.get(loose) is None


def test_the_pinned_network_outlives_the_run_it_came_from(state: Path, run: Path):
    pin, artifact = from_run(run)
    accept(state, "local", pin, artifact)
    shutil.rmtree(run)
    Cache(state).gc(0)
    assert artifact_of(state, pin).is_file()


def test_profiles_have_baselines_of_their_own_whatever_their_names(state: Path, tmp_path: Path):
    one, two = (from_run(write_net(tmp_path / f"{w}.onnx", w)) for w in (8, 16))
    accept(state, "../robot 7", *one)
    accept(state, "robot-7", *two)
    first, second = baseline_of(state, "../robot 7"), baseline_of(state, "robot-7")
    assert first and second and (first.sha256, second.sha256) == (one[0].sha256, two[0].sha256)
    assert [path.parent for path in tmp_path.rglob("*robot*")] == [state / "baselines"] * 2
    assert profiles_with_baseline(state) == ["../robot 7", "robot-7"]


def test_a_file_that_changed_since_it_was_looked_at_is_not_accepted(state: Path, tmp_path: Path):
    pin, path = from_run(write_net(tmp_path / "net.onnx", 8))
    accept(state, "local", pin, path)
    write_net(path, 16)
    with pytest.raises(DeployError, match="is not the pinned network: its SHA-256 is"):
        accept(state, "local", pin, path)
    assert len(history(state, "local")) == 1


def test_a_damaged_or_missing_pinned_network_is_said_and_mended_by_accepting_again(state: Path, tmp_path: Path):
    pin, path = from_run(write_net(tmp_path / "net.onnx", 8))
    accept(state, "local", pin, path)
    kept = artifact_of(state, pin)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with pytest.raises(DeployError, match="the pinned network 'net' is damaged: the SHA-256 of") as caught:
        artifact_of(state, pin)
    assert caught.value.hint == f"accept it again from '{path}': deploy baseline accept RUN --target T"
    kept.unlink()
    with pytest.raises(DeployError, match=r"the pinned network 'net' is not in '.*': .* is missing\."):
        artifact_of(state, pin)
    accept(state, "local", pin, path)
    assert artifact_of(state, pin) == kept


def test_a_damaged_or_newer_record_is_refused_and_left_as_it_is(state: Path, tmp_path: Path):
    pin, path = from_run(write_net(tmp_path / "net.onnx", 8))
    accept(state, "local", pin, path)
    file = state / "baselines" / "local.json"
    torn = ("{torn", '{"version": 1}', '{"version": 1, "baselines": ["x"]}', '{"version": 1, "baselines": [{"a": 1}]}')
    for text, said in (*((text, "is damaged") for text in torn), ('{"version": 9}', "newer version")):
        file.write_text(text)
        for ask in (lambda: baseline_of(state, "local"), lambda: accept(state, "local", pin, path)):
            with pytest.raises(DeployError, match=said):
                ask()
        assert file.read_text() == text


# --- where an artifact comes from ----------------------------------------------------------------------------------


def test_a_run_its_bundle_and_a_copy_of_its_bundle_give_the_same_network(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run / "bundle", tmp_path / "shipped"))
    pins = [from_run(path)[0] for path in (run, run / "bundle", copy)]
    assert len({pin.sha256 for pin in pins}) == 1
    assert [pin.name for pin in pins] == [run.name, run.name, "shipped"]


def test_a_bare_file_is_pinned_without_budget_or_device(tmp_path: Path):
    path = write_net(tmp_path / "mobilenet.onnx")
    pin, artifact = from_run(path)
    ports = {"inputs": (("input", (1, 3, 16, 16)),), "outputs": (("output", (1, 16, 1, 1)),)}
    assert pin == Pin("mobilenet", hashlib.sha256(path.read_bytes()).hexdigest(), str(path), **ports)
    assert artifact == path


def test_inputs_and_outputs_are_kept_with_the_baseline_and_read_from_the_file_of_an_older_one(
    state: Path, tmp_path: Path
):
    pin, path = from_run(write_net(tmp_path / "net.onnx", size="side"))
    assert pin.inputs == (("input", (1, 3, "side", "side")),)
    accept(state, "local", pin, path)
    kept = baseline_of(state, "local")
    assert kept is not None and (kept.inputs, kept.outputs) == (pin.inputs, pin.outputs)
    assert described(replace(pin, inputs=(), outputs=()), path) == pin


def test_networks_of_other_shapes_are_told_apart_with_both(tmp_path: Path):
    small, large = (from_run(write_net(tmp_path / f"{s}.onnx", size=s))[0] for s in (16, 32))
    assert unlike(small, small) is None and unlike(small, replace(large, inputs=(), outputs=())) is None
    assert unlike(small, large) == (
        "baseline and candidate are not the same task: '16' input 1x3x16x16 -> output 1x16x1x1, "
        "'32' input 1x3x32x32 -> output 1x16x1x1."
    )


def test_what_is_no_network_or_not_whole_in_one_file_is_refused(tmp_path: Path):
    (tmp_path / "notes.onnx").write_text("these are notes")
    with pytest.raises(UsageError, match=r"notes\.onnx' is not an ONNX file\."):
        from_run(tmp_path / "notes.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"empty\.onnx' holds no network\."):
        from_run(tmp_path / "empty.onnx")
    with pytest.raises(UsageError, match="keeps 'w' in a file outside itself, so it cannot be pinned by its contents"):
        from_run(write_net(tmp_path / "split.onnx", outside=True))
    with pytest.raises(UsageError, match="there is no run, bundle or ONNX file"):
        from_run(tmp_path / "nothing")
    with pytest.raises(UsageError, match="there is no run in"):
        from_run(tmp_path)


def test_an_unfinished_a_missed_and_a_dry_run_are_told_apart(run: Path):
    for changes, said in (
        ({"status": "interrupted"}, r"is not finished \(interrupted\), so nothing of it was accepted\."),
        ({"status": "missed"}, r"ended missed: it has no network that meets its budget\."),
        ({"status": "done", "summary": {"dry_run": True}}, r"was a dry run, which makes no network\."),
    ):
        _set(run, **changes)
        with pytest.raises(UsageError, match=said):
            from_run(run)


def test_the_nearest_point_of_a_missed_run_is_no_baseline_wherever_it_lies(tmp_path: Path):
    run = finished_run(tmp_path, budget="0.01x", missed=True)
    assert read_state(run)["status"] == "missed"
    moved = Path(shutil.copytree(run / "rejected", tmp_path / "bundle"))
    for path in (run / "rejected", moved):
        with pytest.raises(UsageError, match=r"was never accepted \(budget missed: p50 is 0\.\d+x of 'dense'"):
            from_run(path)


def test_a_bundle_whose_files_were_changed_or_lost_is_refused(run: Path):
    bundle = run / "bundle"
    whole = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(whole + b"\0")
    with pytest.raises(DeployError, match=r"model\.onnx of the bundle '.*' was changed: its SHA-256 is") as caught:
        from_run(run)
    assert caught.value.hint == f"deploy verify {bundle}"
    (bundle / "model.onnx").unlink()
    with pytest.raises(DeployError, match=r"model\.onnx is missing from the bundle"):
        from_run(run)
    (bundle / "model.onnx").symlink_to("/etc/hostname")
    with pytest.raises(DeployError, match=r"model\.onnx is missing from the bundle"):
        from_run(run)
    (bundle / "manifest.json").write_text('{"files": []}')
    with pytest.raises(DeployError, match=r"manifest\.json' is not a manifest"):
        from_run(run)
    shutil.rmtree(bundle)
    with pytest.raises(DeployError, match="there is no bundle in"):
        from_run(run)


def test_a_manifest_may_not_name_files_outside_its_bundle(run: Path):
    path = run / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../run.json"] = {"sha256": hashlib.sha256((run / "run.json").read_bytes()).hexdigest()}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DeployError, match=r"\.\./run\.json is missing from the bundle"):
        from_run(run)


def test_the_newest_met_run_of_a_profile_is_found_by_when_it_ended(run: Path, tmp_path: Path):
    runs = run.parent
    _set(run, profile="jetson", finished="2026-11-20T23:30:00+01:00")
    for name, changes in {
        "0-later": {"finished": "2026-11-20T23:00:00+00:00"},
        "9-earlier": {"finished": "2026-11-20T22:00:00+00:00"},
        "8-missed": {"finished": "2026-11-21T09:00:00+00:00", "status": "missed"},
        "8-running": {"finished": None, "started": "2026-11-21T10:00:00+00:00", "status": "running"},
        "8-dry": {"finished": "2026-11-21T09:00:00+00:00", "summary": {"dry_run": True}},
        "8-other": {"finished": "2026-11-21T09:00:00+00:00", "profile": "local"},
    }.items():
        _set(Path(shutil.copytree(run, runs / name)), **changes)
    (runs / "no-run").mkdir()
    (runs / "torn").mkdir()
    (runs / "torn" / "run.json").write_text("{")
    found = newest(runs, "jetson")
    assert found is not None and found[0].name == "0-later"
    assert newest(runs, "xavier") is None and newest(tmp_path / "nowhere", "jetson") is None
    (runs / "0-later" / "bundle" / "model.onnx").write_bytes(b"altered")
    with pytest.raises(DeployError, match="was changed"):
        newest(runs, "jetson")


def test_only_a_run_of_the_baselines_project_that_ended_after_it_was_accepted_is_tonights(
    run: Path, caplog: pytest.LogCaptureFixture
):
    runs, project = run.parent, read_state(run)["request"]["project"]
    pin = replace(from_run(run)[0], accepted="2026-11-20T12:00:00Z")
    assert pin.project == project and from_run(run / "bundle")[0].project == project
    _set(run, finished="2026-11-20T11:59:00+00:00")
    assert newest(runs, "local", pin) is None, "the run it came from, and older ones"
    other = Path(shutil.copytree(run, runs / "other"))
    _set(other, finished="2026-11-21T09:00:00+00:00", request={"project": "/another"})
    assert newest(runs, "local", pin) is None
    assert f"run '{other}' is left out: the baseline was built from another project" in caplog.text
    later = Path(shutil.copytree(run, runs / "later"))
    _set(later, finished="2026-11-20T13:01:00+01:00")
    found = newest(runs, "local", pin)
    assert found is not None and found[0].name == "later"
    anyones = newest(runs, "local", replace(pin, project=""))
    assert anyones is not None and anyones[0].name == "other"


def test_a_run_that_is_still_driven_is_not_accepted(tmp_path: Path):
    with Run.create(tmp_path, Profile(name="local", target="local")) as run:
        assert newest(tmp_path / "runs", "local") is None
        with pytest.raises(UsageError, match=r"is not finished \(running\)"):
            from_run(run.path)


# --- the device then and now ---------------------------------------------------------------------------------------


def _pin() -> Pin:
    table = json.loads(json.dumps(DEVICE.to_table()))
    return Pin("resnet20", "a" * 64, "/runs/1", None, "2026-10-01T09:00:00Z", table)


def test_the_same_device_has_not_changed():
    assert environment(_pin(), DEVICE) == ({}, None)


def test_what_hits_every_arm_is_recorded_and_not_refused():
    now = replace(DEVICE, runtime_version="1.24.0", kernel="6.8", power="MAXN", clocks="floating", providers=("A", "B"),
                  cpu_flags="0" * 64)  # fmt: skip
    changed, other = environment(_pin(), now)
    assert other is None
    assert changed == {
        "runtime_version": ("1.23.0", "1.24.0"), "kernel": ("5.15.148-tegra", "6.8"), "power": ("15W", "MAXN"),
        "clocks": ("locked", "floating"), "cpu_flags": ("f" * 64, "0" * 64),
        "providers": (("CPUExecutionProvider",), ("A", "B")),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("machine", "x86_64", "machine was aarch64, is x86_64"),
        ("cpu", "Cortex-A57", "processor was Cortex-A78AE, is Cortex-A57"),
        ("cores", 4, "cores was 6, is 4"),
        ("runtime", "tensorrt", "runtime was onnxruntime, is tensorrt"),
    ],
)
def test_another_machine_or_runtime_is_a_sentence(field: str, value: object, said: str):
    changed, other = environment(_pin(), replace(DEVICE, **{field: value}))
    assert list(changed) == [field]
    assert other == f"the baseline 'resnet20' was accepted on another device or runtime: {said}."


def test_fields_that_one_version_does_not_know_and_a_bare_file_are_not_compared():
    table = {name: value for name, value in DEVICE.to_table().items() if name != "spin"} | {"firmware": "36.4"}
    assert environment(replace(_pin(), fingerprint=table), DEVICE) == ({}, None)
    assert environment(replace(_pin(), fingerprint={}), DEVICE) == ({}, None)
