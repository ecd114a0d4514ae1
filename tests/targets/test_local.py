"""The machine at hand, measured for real."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import load_profile
from targets import local as local_target
from targets.base import load_target
from targets.harness import bench
from targets.harness import lease as leases
from targets.harness.agent.board.files import sha256
from targets.harness.measurement import Session
from targets.local import Local

ROOT = Path(__file__).parents[2]
KILLED = "the measuring process of 'net' was killed by signal 9, as a system does that runs out of memory."


@pytest.fixture(autouse=True)
def own_lease(tmp_path, monkeypatch):
    """A lease folder of this test's own, so that tests do not wait for whoever measures on this machine."""
    folder = tmp_path / "lock"
    folder.mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: folder)


@pytest.fixture
def target(local, tmp_path):
    return load_target(local, tmp_path / ".deploy")


def agents_of(pid: int, word: str = "") -> list[psutil.Process]:
    """Agents among a process's descendants, with this word on their command line if one is given."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if any(part.endswith("harness/agent") for part in words) and (not word or word in words):
            found.append(process)
    return found


def test_two_copies_measure_alike_and_a_heavier_network_is_seen_heavier(target, conv, quick, tmp_path):
    small, heavy = conv("small", layers=4, size=24), conv("heavy", layers=12, size=24)
    done: list[float] = []
    session = target.measure({"dense": small, "again": small, "heavy": heavy}, quick, "rank", done.append)
    assert session.ratio("again", "dense").center == pytest.approx(1.0, abs=0.15)
    assert session.ratio("heavy", "dense").center > 1.8
    assert session.measurement("again").sha256 == session.measurement("dense").sha256
    assert done == sorted(done) and done[-1] <= 1.0
    assert Session.from_json(session.to_json()).to_json() == session.to_json()
    assert list((tmp_path / ".deploy" / "spool").iterdir()) == []


def test_a_session_keeps_all_that_is_needed_to_repeat_it(target, conv, quick):
    net, other = conv("net"), conv("other", layers=3)
    session = target.measure({"a": net, "b": other}, quick, "rank")
    again = target.measure({"a": net, "b": other}, quick, "rank")
    assert session.order == again.order
    assert len(session.order) == 2 and all(len(process) == 8 for process in session.order)
    assert {turn for process in session.order for turn in process} == {("a", "b"), ("b", "a")}
    assert session.fingerprint == target.fingerprint() == again.fingerprint
    assert session.protocol.startswith("ort-interleaved-1 rank back-to-back 2x8 blocks of 4+")
    assert session.started <= session.ended and len(session.agent_sha256) == 64 and "@" in session.lease_owner
    for measurement in session.measurements.values():
        assert [block.ns.shape[0] for block in measurement.processes] == [8, 8]
        assert all(block.ns.shape[1] >= 10 and block.warmup.inferences >= 10 for block in measurement.processes)
        assert measurement.runtime == f"onnxruntime {session.fingerprint.runtime_version}"


def test_accepting_gives_every_process_enough_samples_for_its_99th_percentile(target, conv, quick):
    session = target.measure({"a": conv("net", size=8), "b": conv("net", size=8)}, quick, "accept")
    for process in session.measurement("a").processes:
        assert process.ns.size >= 662
    assert all(p.value_ms is not None for p in session.measurement("a").by_process("p99"))


def test_rows_of_many_small_models_come_with_their_reference(target, conv):
    models = [conv(f"row{i}", layers=1 + i % 4, size=16) for i in range(12)]
    times = target.rows(models, conv("dense", layers=8), 6)
    assert times.ms.shape == (12, 6) and times.reference_ms.shape == (1, 6) and not times.group.any()
    medians = np.median(times.ms, axis=1)
    assert (medians > 0).all() and medians[0] < medians[3] < np.median(times.reference_ms)


def test_rows_of_no_models_have_no_rows(target, conv):
    assert target.rows([], conv("dense"), 3).ms.shape == (0, 3)


@pytest.mark.parametrize("batch", [1, 4, None])
@pytest.mark.parametrize("samples", [1, 4, 7, 130])
def test_a_batch_of_any_size_runs_over_an_artifact_of_any_batch(target, conv, batch, samples):
    free, fixed = conv("free", batch=None, size=8), conv("fixed", batch=batch, size=8)
    data = np.random.default_rng(0).standard_normal((samples, 3, 8, 8)).astype(np.float32)
    (expected,) = [
        np.concatenate(parts) for parts in zip(*(target.infer(free, [row[None]]) for row in data), strict=True)
    ]
    (got,) = target.infer(fixed, [data])
    assert got.shape == (samples, 16)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_artifact_that_changed_on_disk_is_opened_again(target, conv):
    data = [np.ones((1, 3, 8, 8), np.float32)]
    first = target.infer(conv("net", size=8, channels=16), data)
    assert target.infer(conv("net", size=8, channels=24), data)[0].shape != first[0].shape


def test_building_copies_an_onnx_file_that_runs(target, conv, tmp_path):
    net = conv("net")
    out = target.build(net, tmp_path / "made" / "model.onnx")
    assert out.read_bytes() == net.read_bytes()


def test_the_doctor_finds_the_runtime_and_its_providers(target):
    found = {c.name: c for c in target.doctor()}
    assert found["runtime"].ok and found["providers"].ok and found["lease folder"].ok
    assert found["providers"].value == "CPUExecutionProvider"


def test_the_doctor_names_a_provider_that_is_not_there(tmp_path):
    profile = load_profile("local", {"providers": ["TensorrtExecutionProvider"]})
    found = {c.name: c for c in Local(profile, tmp_path).doctor()}
    assert not found["providers"].ok and "CPUExecutionProvider" in found["providers"].mend


def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"this is no network" * 4)
    return path


def test_a_file_that_is_no_onnx_is_named_by_every_verb(target, conv, quick, tmp_path):
    path, version = broken(tmp_path), target.fingerprint().runtime_version
    hint = "export the network again, or check the file."
    with pytest.raises(DeployError) as error:
        target.measure({"dense": conv("net"), "cut": path}, quick, "rank")
    assert str(error.value).startswith(f"ONNX Runtime {version} cannot run '{path}': ") and error.value.hint == hint
    with pytest.raises(DeployError) as error:
        target.rows([conv("net"), path], conv("net"), 3)
    assert str(error.value).startswith(f"ONNX Runtime {version} cannot run '{path}': ") and error.value.hint == hint
    for verb in (lambda: target.build(path, tmp_path / "o.onnx"), lambda: target.infer(path, [np.zeros(1)])):
        with pytest.raises(DeployError) as error:
            verb()
        assert str(error.value).startswith(f"ONNX Runtime {version} cannot open '{path}': ")
    assert not (tmp_path / "o.onnx").exists()


def test_a_missing_file_and_an_empty_session_are_usage_errors(target, quick, tmp_path):
    with pytest.raises(UsageError) as error:
        target.measure({"cut": tmp_path / "gone.onnx"}, quick, "rank")
    assert str(error.value) == f"'cut' cannot be measured: there is no file '{tmp_path}/gone.onnx'."
    with pytest.raises(UsageError) as error:
        target.measure({}, quick, "rank")
    assert str(error.value) == "no network to measure was given."


def test_arrays_that_do_not_fit_the_input_are_named_with_both_shapes(target, conv):
    with pytest.raises(DeployError) as error:
        target.infer(conv("net", size=8), [np.zeros((2, 3, 9, 9), np.float32)])
    assert str(error.value) == "input 'input' of 'net.onnx' takes (any, 3, 8, 8), an array of (2, 3, 9, 9) was given."
    with pytest.raises(DeployError) as error:
        target.infer(conv("net", size=8), [])
    assert str(error.value) == "'net.onnx' has 1 inputs, 0 arrays were given."


def test_a_network_with_a_free_size_beside_the_batch_cannot_be_measured(target, conv, quick, tmp_path):
    import onnx

    model = onnx.load(conv("net"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "free.onnx")
    with pytest.raises(DeployError) as error:
        target.measure({"net": tmp_path / "free.onnx"}, quick, "rank")
    assert error.value.message.endswith("input 'input' has the free size 'height'; only the batch may be free.")


def test_a_session_that_cannot_keep_its_cap_is_undecided_before_it_starts(target, conv, quick):
    spec = quick.model_copy(update={"max_seconds": 0.2})
    with pytest.raises(UndecidedError) as error:
        target.measure({"net": conv("net")}, spec, "rank")
    assert error.value.message.startswith("measuring takes too long: the shortest session takes about ")
    assert error.value.message.endswith(", the cap is 0.2 s.")
    assert error.value.hint == "raise measure.max_seconds; in a check, raise check.max_seconds."


def test_an_agent_that_goes_astray_is_ended_and_both_keys_and_the_doctor_are_named(conv, quick, tmp_path):
    path = conv("net")
    job = bench.drive_job({"net": path}, {"net": sha256(str(path))}, quick, "rank", ["CPUExecutionProvider"])
    with pytest.raises(DeployError) as error:
        bench.run_agent("drive", job, tmp_path / "spool", 0.0)
    assert error.value.message == "the measuring agent did not end within 0 s."
    assert error.value.hint == (
        "lower measure.max_seconds (check.max_seconds in a check), or deploy doctor --target T."
    )
    assert agents_of(os.getpid()) == []


def test_a_network_that_needs_more_memory_than_there_is_says_so(target, quick, tmp_path):
    from onnx import TensorProto, helper, save

    shape = helper.make_tensor_value_info("input", TensorProto.INT64, [2])
    out = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    big = helper.make_tensor("big", TensorProto.INT64, [2], [1 << 22, 1 << 22])
    nodes = [
        helper.make_node("Mul", ["input", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "big"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["output"], value=value),
    ]
    zero = helper.make_tensor("zero", TensorProto.INT64, [2], [0, 0])
    graph = helper.make_graph(nodes, "big", [shape], [out], [big, zero])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "big.onnx")
    with pytest.raises(DeployError) as error:
        target.measure({"big": tmp_path / "big.onnx"}, quick, "rank")
    assert error.value.message.startswith("not enough memory to measure 'big': Failed to allocate memory for requested")
    assert error.value.hint == "free memory, or measure fewer networks at once."


def strike(word: str, number: int) -> threading.Thread:
    """Send a signal to the first agent process of this test that has `word` on its command line."""

    def go() -> None:
        for _ in range(400):
            time.sleep(0.02)
            found = agents_of(os.getpid(), word)
            if found:
                time.sleep(0.3)
                found[0].send_signal(number)
                return

    thread = threading.Thread(target=go)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("word", "number", "text", "hint"),
    [
        ("worker", signal.SIGKILL, KILLED,
         "free memory, or measure fewer networks at once."),
        ("worker", signal.SIGSEGV, "the measuring process of 'net' crashed by signal 11 (SIGSEGV).",
         "measure it alone; if it crashes again, export the network again or use another runtime version."),
        ("drive", signal.SIGKILL, "the measuring agent ended by signal 9.", "deploy doctor --target T"),
    ],
)  # fmt: skip
def test_a_process_that_dies_is_named_and_none_is_left(target, conv, quick, tmp_path, word, number, text, hint):
    spec = quick.model_copy(update={"rank_rounds": 3000})
    thread = strike(word, number)
    with pytest.raises(DeployError) as error:
        target.measure({"net": conv("net")}, spec, "rank")
    thread.join()
    assert (error.value.message, error.value.hint) == (text, hint)
    assert agents_of(os.getpid()) == []
    assert list((tmp_path / ".deploy" / "spool").iterdir()) == []


MEASURE = """
import sys
from pathlib import Path
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness import lease
lease.lease_folder = lambda: Path(sys.argv[2])
profile = load_profile("local", {"measure": {"rank_rounds": 5000, "warmup_s": 0.1}})
load_target(profile, Path(sys.argv[2]) / "state").measure({"net": Path(sys.argv[1])}, profile.measure, "rank")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_host_is_ended_no_process_and_no_lease_stays(conv, tmp_path, number):
    host = subprocess.Popen(
        [sys.executable, "-c", MEASURE, str(conv("net")), str(tmp_path)],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 30
    while len(agents_of(host.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    agents = agents_of(host.pid)
    assert len(agents) >= 2
    host.send_signal(number)
    assert host.wait(20) != 0
    assert psutil.wait_procs(agents, timeout=10)[1] == []
    with leases.lease("local", 1, wait_s=1, folder=tmp_path):
        pass


def test_what_a_killed_host_left_behind_is_removed_by_the_next_measurement(target, conv, tmp_path):
    spool = tmp_path / ".deploy" / "spool"
    old, new = spool / "measure-1-x", spool / "measure-new"  # without a lock: of an older version, or just being made
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    target.rows([], conv("net"), 3)
    assert list(spool.iterdir()) == [new]


def test_a_paced_session_counts_deadlines_and_says_its_period(target, conv, quick):
    small, heavy = conv("small", size=8), conv("heavy", layers=12, channels=64, size=48)
    spec = quick.model_copy(update={"paced_ms": 4.0, "rank_rounds": 5})
    session = target.measure({"small": small, "heavy": heavy}, spec, "rank")
    assert session.protocol.startswith("ort-interleaved-1 rank paced=4ms 2x5 blocks of 4+10 ")
    assert session.manner == "ort-interleaved-1 rank paced=4ms"
    quick_one, slow_one = session.measurement("small"), session.measurement("heavy")
    assert quick_one.miss_ratio is not None and quick_one.miss_ratio < 0.5
    assert slow_one.miss_ratio is not None and slow_one.p50_ms > 4.0 and slow_one.miss_ratio > 0.5
    assert quick_one.processes[0].misses.shape == (5,)
    again = Session.from_json(session.to_json())
    assert again.measurement("heavy").deadline_misses == slow_one.deadline_misses
    assert again.joined(session).measurement("small").deadline_misses is not None


def test_blocks_know_when_they_began(target, conv, quick):
    session = target.measure({"a": conv("net"), "b": conv("net")}, quick, "rank")
    named = {name: iter(np.concatenate([p.started_ns for p in m.processes]))
             for name, m in session.measurements.items()}  # fmt: skip
    starts = [int(next(named[name])) for process in session.order for turn in process for name in turn]
    assert starts == sorted(starts) and starts[0] > 0
    assert starts[-1] * 1e-9 < session.telemetry["seconds"] < 60.0
    assert session.measurement("a").deadline_misses is None


def test_a_sustained_session_goes_on_in_its_first_processes_for_its_time(target, conv, quick):
    spec = quick.model_copy(update={"sustained_s": 1.5})
    session = target.measure({"a": conv("net"), "b": conv("net")}, spec, "accept")
    assert session.protocol.startswith("ort-interleaved-1 accept back-to-back sustained=1.5s 2x8 blocks of 4+")
    assert f", the first 1x{len(session.order[0])} of 4+" in session.protocol
    for measurement in session.measurements.values():
        long, short = measurement.processes
        assert len(short.ns) == len(session.order[1]) == 8
        assert long.started_ns[-1] - long.started_ns[0] >= 1.0e9 and len(long.ns) == len(session.order[0])
        assert measurement.drift is None
    assert 0.5 < session.ratio("a", "b").center < 2.0 and session.ratio("a", "b", "mean").n == 2
    plain = target.measure({"a": conv("net")}, spec, "rank")
    assert plain.protocol.startswith("ort-interleaved-1 rank back-to-back 2x8 ")


def test_layers_of_two_networks_tell_where_they_differ(target, conv, quick, tmp_path):
    dense, deep = conv("dense", layers=2, size=24), conv("deep", layers=6, size=24)
    found = target.layers({"dense": dense, "deep": deep}, quick)
    assert list(found) == ["dense", "deep"]
    convs = {name: [layer for layer in rows if layer.op == "Conv"] for name, rows in found.items()}
    assert (len(convs["dense"]), len(convs["deep"])) == (2, 6)
    assert all(layer.ms > 0 for rows in convs.values() for layer in rows)
    assert sum(layer.ms for layer in found["deep"]) > 1.5 * sum(layer.ms for layer in found["dense"])
    assert convs["dense"][1].name == convs["deep"][1].name
    assert list((tmp_path / ".deploy" / "spool").iterdir()) == []


def test_layers_of_a_broken_network_name_it(target, quick, tmp_path):
    path = broken(tmp_path)
    with pytest.raises(DeployError) as error:
        target.layers({"cut": path}, quick)
    assert f" cannot run '{path}': " in str(error.value)


def test_a_network_whose_outputs_are_no_numbers_is_named(target, conv, quick, tmp_path):
    import onnx

    model = onnx.load(conv("net"))
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[0] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, model.graph.initializer[0].name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(DeployError) as error:
        target.measure({"dense": conv("net"), "cut": tmp_path / "nan.onnx"}, quick, "rank")
    version = target.fingerprint().runtime_version
    assert error.value.message == (
        f"ONNX Runtime {version} cannot run '{tmp_path}/nan.onnx': "
        "16 of 16 values of its output 'output' are NaN or infinite."
    )


def test_the_doctor_says_who_holds_the_device(target):
    assert {c.name: c.value for c in target.doctor()}["lease"] == "free"
    with leases.lease("local", 60):
        found = {c.name: c for c in target.doctor()}["lease"]
    assert not found.ok and found.value.startswith(f"held by {leases.owner()} (process {os.getpid()}, expected until ")


@pytest.mark.parametrize("verb", ["infer", "build"])
def test_who_opens_and_runs_a_network_waits_for_whoever_measures(target, conv, tmp_path, monkeypatch, caplog, verb):
    """It is told for whom, and nothing is opened before."""
    net, opened, done = conv("net", size=8), [], []
    monkeypatch.setattr(leases, "PATIENT_S", 0.1)
    plain = target.runtime.open
    monkeypatch.setattr(target.runtime, "open", lambda *given: opened.append(given) or plain(*given))
    verbs = {
        "infer": lambda: target.infer(net, [np.zeros((1, 3, 8, 8), np.float32)]),
        "build": lambda: target.build(net, tmp_path / "o.onnx"),
    }
    thread = threading.Thread(target=lambda: done.append(verbs[verb]()))
    with leases.lease("local", 60):
        thread.start()
        end = time.monotonic() + 30
        while not caplog.records and not opened and time.monotonic() < end:
            time.sleep(0.05)
        assert not opened and not done
        (told,) = caplog.records
        assert told.getMessage().startswith(f"waiting for the device 'local', in use by {leases.owner()} (process ")
    thread.join(60)
    assert len(opened) == len(done) == 1
    assert leases.holder("local") is None


def test_who_holds_the_device_does_not_wait_for_itself(target, conv, quick, monkeypatch):
    monkeypatch.setattr(local_target, "lease", functools.partial(leases.lease, wait_s=1.0))
    net, outputs = conv("net", size=8), []
    given = [np.zeros((1, 3, 8, 8), np.float32)]
    target.measure({"net": net}, quick, "rank", lambda done: outputs.append(target.infer(net, given)[0].shape))
    assert outputs and set(outputs) == {(1, 16)}
    assert leases.holder("local") is None


def test_a_simulated_device_waits_for_nobody(conv, tmp_path, monkeypatch):
    monkeypatch.setattr(local_target, "lease", functools.partial(leases.lease, wait_s=0.0))
    target = load_target(load_profile("simulated"), tmp_path / ".deploy")
    with leases.lease("local", 60):
        net = target.build(conv("net", size=8), tmp_path / "o.onnx")
        assert target.infer(net, [np.zeros((1, 3, 8, 8), np.float32)])[0].shape == (1, 16)


def test_a_place_that_cannot_be_written_is_named(local, conv, quick, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeployError) as error:
        load_target(local, tmp_path / "file").measure({"net": conv("net")}, quick, "rank")
    assert str(error.value) == (
        f"cannot make a folder in '{tmp_path}/file/spool': Not a directory.\nfree space or choose another folder."
    )


def test_a_runtime_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(UsageError) as error:
        load_target(load_profile("local", {"runtime": "ortt"}), tmp_path)
    assert str(error.value) == "no runtime named 'ortt'. Did you mean 'ort'?\ndeploy list runtimes"
