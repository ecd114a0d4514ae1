"""Running engines over a CUDA runtime that is compiled for the test, through the same ctypes calls as on a board."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_conv
from fake_tensorrt import VERSIONS, Fake

from targets.harness.agent.board import timing
from targets.harness.agent.board.tensorrt import cuda, engine, library, running
from targets.harness.agent.board.tensorrt.cuda import Cuda
from targets.harness.agent.board.tensorrt.errors import BoardError
from targets.harness.agent.board.tensorrt.library import Library

SOURCE = Path(__file__).parent / "cudart.c"
ROOT = Path(__file__).parents[2]
LIVE, COPIES, LAUNCHES, GRAPHS, FLAGS = range(5)
PORTS = [
    {"name": "input", "shape": [1, 3, 4, 4], "kind": "FLOAT", "fed": True},
    {"name": "output", "shape": [1, 3, 4, 4], "kind": "FLOAT", "fed": False},
]
OPTIONS = {"library": "tensorrt", "seed": 7, "cuda_graph": False, "spin": False, "copies": True, "dla_core": None}


@pytest.fixture(scope="session", params=["new", "old"])
def runtime_file(request, tmp_path_factory):
    """The CUDA runtime as it is now, and as CUDA 10.2 had cudaGraphInstantiate."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler for the test's CUDA runtime")
    path = tmp_path_factory.mktemp("cuda") / "fake.so"  # under its name it would be found by other tests too
    flags = ["-DOLD"] if request.param == "old" else []
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", *flags, "-o", path, SOURCE], check=True)
    return str(path)


@pytest.fixture
def gpu(runtime_file):
    """A GPU whose kernels take 0.2 ms."""
    import ctypes

    found = Cuda(runtime_file)
    found.lib.fake_reset.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_int, ctypes.c_int]
    found.lib.fake_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    found.lib.fake_reset(0, 200_000, 0, 0)
    yield found
    found.lib.fake_reset(0, 0, 0, 0)


@pytest.fixture
def open_model(gpu, tmp_path):
    """Opens an engine of a version on that GPU."""
    opened = []

    def make(version="10.3", ports=PORTS, **options):
        fake = Fake(version)
        fake.launch = lambda stream, out, into, n: gpu.lib.fake_launch(stream, out, into, n) == 0
        plan = tmp_path / f"{version}.plan"
        plan.write_text(json.dumps({"version": fake.version, "ports": ports}), encoding="utf-8")
        opened.append(running.EngineModel(str(plan), {**OPTIONS, **options}, Library("tensorrt", fake.api), gpu))
        opened[-1].fake = fake
        return opened[-1]

    yield make
    for model in opened:
        model.close()
    assert gpu.lib.fake_seen(LIVE) == 0, "everything taken is given back"


def floats(data):
    return np.frombuffer(data, np.float32)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("graph", [False, True])
def test_every_version_infers_with_and_without_a_graph(version, graph, open_model, gpu):
    model = open_model(version, cuda_graph=graph)
    values = np.arange(48, dtype=np.float32)
    (out,) = model.infer({"input": values.tobytes()}).values()
    assert floats(out).tolist() == (2 * values).tolist()
    assert (gpu.lib.fake_seen(GRAPHS) > 0) == graph


@pytest.mark.parametrize("graph", [False, True])
def test_wall_times_hold_the_copies_and_events_only_the_engine(graph, open_model, gpu):
    model = open_model(cuda_graph=graph)
    wall = model.block(2, 20)
    assert len(wall) == len(model.events) == 20
    assert all(200_000 <= event <= ns for event, ns in zip(model.events, wall, strict=True))
    assert sum(model.events) < sum(wall)


def test_copies_are_made_only_where_they_are_asked_for(open_model, gpu):
    with_copies, without = open_model(copies=True), open_model(copies=False)
    seen = gpu.lib.fake_seen(COPIES)
    with_copies.block(0, 5)
    assert gpu.lib.fake_seen(COPIES) == seen + 10
    without.block(0, 5)
    assert gpu.lib.fake_seen(COPIES) == seen + 10


@pytest.mark.parametrize(("spin", "flags"), [(True, cuda.SPIN), (False, cuda.BLOCK)])
def test_how_the_process_waits_is_said_to_the_driver(spin, flags, open_model, gpu):
    open_model(spin=spin)
    assert gpu.lib.fake_seen(FLAGS) == flags


def test_the_protocol_names_every_switch():
    ids = {
        running.protocol({**OPTIONS, "cuda_graph": g, "spin": s, "copies": c})
        for g in (0, 1) for s in (0, 1) for c in (0, 1)
    }  # fmt: skip
    assert len(ids) == 8 and all(" " not in name for name in ids)
    assert running.protocol(OPTIONS) == "tensorrt-python-1/clock=wall/cuda_graph=0/spin=0/copies=1"


def test_a_control_period_is_kept(open_model):
    model = open_model()
    ns, missed = model.paced(1, 5, 2_000_000)
    assert len(ns) == len(model.events) == 5 and min(ns) >= 200_000 and 0 <= missed <= 5
    assert model.paced(0, 3, 100_000)[1] == 3, "kernels of 0.2 ms keep no period of 0.1 ms"


class Simulated(timing.Timed):
    """Takes so many nanoseconds of a clock that moves by 10 at every look, by inferring and by sleeping alone."""

    def __init__(self, takes, monkeypatch):
        self.now, self.takes, self.slept = 1_000, list(takes), 0
        monkeypatch.setattr(timing, "CLOCK", self.clock)
        monkeypatch.setattr(timing.time, "sleep", self.sleep)

    def clock(self):
        self.now += 10
        return self.now

    def sleep(self, seconds):
        self.now += int(seconds * 1e9)
        self.slept += 1

    def once(self):
        self.now += self.takes.pop(0)


def test_an_inference_misses_its_deadline_when_the_next_tick_is_over(monkeypatch):
    model = Simulated([100_000, 200_000, 1_500_000, 300_000, 2_100_000], monkeypatch)
    ns, missed = model.paced(1, 4, 1_000_000)
    assert ns == [200_010, 1_500_010, 300_010, 2_100_010] and missed == 2
    assert model.slept == 5 and not model.takes


def test_a_warm_up_ends_when_two_windows_agree_or_its_time_is_over(monkeypatch):
    rule = {"min_inferences": 4, "steady": 0.1, "min_s": 0.0, "window_s": 0.003, "max_s": 0.1}
    steady = Simulated([4_000_000, 3_000_000, 2_000_000] + [1_000_000] * 50, monkeypatch).warm(rule)
    assert steady["steady"] and steady["windows_ns"][-1] == 1_000_010
    growing = Simulated([2_000_000 * (i + 1) for i in range(100)], monkeypatch).warm(rule)
    assert not growing["steady"] and growing["seconds"] >= 0.1


def test_it_warms_up_like_every_other_model(open_model):
    rule = {"min_inferences": 20, "steady": 0.5, "min_s": 0.01, "window_s": 0.005, "max_s": 1.0}
    warmth = open_model().warm(rule)
    assert warmth["inferences"] >= 20 and warmth["steady"] and warmth["seconds"] >= 0.01


def test_inputs_are_the_same_noise_for_the_same_seed(open_model, monkeypatch):
    first, again, other = open_model(seed=1), open_model(seed=1), open_model(seed=2)
    assert floats(first.fetch()["output"]).std() > 0.5
    assert first.fetch() == again.fetch() != other.fetch()
    plain = running._plain_noise(first.ports, 1)
    assert len(plain["input"]) == 48 * 4 and abs(floats(plain["input"]).std() - 1) < 0.5


def test_a_value_that_is_no_number_is_found(open_model):
    model = open_model()
    model.check()
    bad = struct.pack("<48f", *[float("inf")] * 2, *[1.0] * 45, float("nan"))
    model.infer({"input": bad})
    with pytest.raises(BoardError, match=r"3 of 48 values of its output 'output' are NaN or infinite"):
        model.check()


def test_a_wrong_number_of_bytes_is_refused(open_model):
    with pytest.raises(BoardError, match="input 'input' takes 192 bytes, 3 were given"):
        open_model().infer({"input": b"abc"})


@pytest.mark.parametrize(("version", "said"), [("8.2", "binding shape"), ("10.3", "input shape")])
def test_a_free_batch_is_set_to_one(version, said, open_model):
    ports = [dict(port, shape=[-1, *port["shape"][1:]]) for port in PORTS]
    model = open_model(version, ports)
    assert [port.shape for port in model.ports] == [(1, 3, 4, 4)] * 2
    assert [what for what, _ in model.fake.said].count(said) == 1


def test_layers_are_profiled_by_name_with_their_operators(open_model):
    assert open_model().profile(4) == {("conv + relu", "CaskConvolution"): 0.25, ("pool", "CudaPooling"): 0.125}


def test_a_session_looks_like_onnx_runtimes(open_model):
    session = running.EngineSession(open_model())
    assert [(v.name, v.shape, v.type) for v in session.get_inputs()] == [("input", [1, 3, 4, 4], "tensor(float)")]
    (out,) = session.run(None, {"input": np.ones((1, 3, 4, 4), np.float64)})
    assert out.dtype == np.float32 and (out == 2).all() and session.get_outputs()[0].name == "output"


def test_a_type_that_numpy_lacks_is_refused_by_name_where_numpy_is_needed(open_model):
    model = open_model("10.3", [dict(PORTS[0]), dict(PORTS[1], kind="BF16")])
    assert model.ports[1].bytes == 48 * 2
    with pytest.raises(BoardError, match="tensor 'output' of the engine is bfloat16, which numpy lacks"):
        running.EngineSession(model)


def test_an_engine_that_fails_in_the_middle_is_one_sentence(open_model):
    model = open_model()
    model.fake.launch = lambda *ignored: False
    with pytest.raises(BoardError, match=r"TensorRT 10\.3\.0 does not run the engine: it does not say why"):
        model.block(0, 1)


def test_an_engine_that_cannot_be_captured_says_which_key_to_set(open_model, gpu):
    gpu.lib.fake_reset(0, 0, 0, 1)
    with pytest.raises(BoardError) as error:
        open_model(cuda_graph=True)
    assert (
        "cannot be captured as a CUDA graph" in error.value.message
        and "tensorrt.cuda_graph = false" in error.value.hint
    )


# --- machines without a driver -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "told"), [(35, "finds no driver that fits"), (100, "there is no GPU")])
def test_without_a_driver_it_is_one_sentence(status, told, open_model, gpu):
    gpu.lib.fake_reset(status, 0, 0, 0)
    with pytest.raises(BoardError) as error:
        open_model()
    assert error.value.kind == "device" and told in error.value.message and f"cudaError {status}" in error.value.message
    assert "\n" not in error.value.message


def test_the_real_runtime_on_this_machine_says_it_too():
    """Where the CUDA runtime is installed and no driver is, as on a build machine with the toolkit."""
    code = "import json; from targets.harness.agent.board.tensorrt import job; print(json.dumps(job.gpu_facts()))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    facts = json.loads(told)
    if "cannot be loaded" in facts.get("none", ""):
        pytest.skip(facts["none"])
    assert {"name", "capability"} <= set(facts) or "cudaError " in facts["none"]


def test_the_runtime_of_a_wheel_is_found_too(runtime_file, tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    shutil.copy(runtime_file, folder / "libcudart.so.13")
    monkeypatch.setattr(sys, "path", [str(tmp_path), ""])
    assert str(folder / "libcudart.so.13") in cuda._candidates()


def test_no_cuda_runtime_at_all_is_one_sentence():
    with pytest.raises(BoardError, match=r"the CUDA runtime \(libcudart\) cannot be loaded here: .*none\.so"):
        Cuda("/none.so")


def test_an_engine_of_another_version_is_refused_in_one_sentence(open_model, tmp_path, gpu):
    fake = Fake("10.3")
    path = tmp_path / "old.plan"
    path.write_text(json.dumps({"version": "8.6.1", "ports": PORTS}), encoding="utf-8")
    with pytest.raises(BoardError) as error:
        running.EngineModel(str(path), OPTIONS, Library("tensorrt", fake.api), gpu)
    assert error.value.message.startswith(
        "TensorRT 10.3.0 cannot open the engine: The engine plan file is not compatible"
    )
    assert error.value.hint == "build it again on this device with this version."


def test_a_missing_engine_is_said(gpu):
    with pytest.raises(BoardError, match=r"'/no\.plan' cannot be read: No such file"):
        running.EngineModel("/no.plan", OPTIONS, Library("tensorrt", Fake("8.2").api), gpu)


# --- what the builder asks of it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "taken"), [(1, "system"), (0, "gpu")])
def test_free_memory_is_the_systems_where_the_gpu_shares_it(shared, taken, gpu, monkeypatch):
    gpu.lib.fake_reset(0, 0, shared, 0)
    monkeypatch.setattr(cuda, "Cuda", lambda: gpu)
    free, seen = library.free_mib()
    assert seen["gpu"] == 3000 and free == seen[taken] and seen["system"] > 0


def test_the_gpu_tells_who_it_is_and_its_driver_which_release_it_is(gpu, monkeypatch, tmp_path):
    known = {"name": "Orin", "capability": "8.7", "multiprocessors": 14, "cuda": "12.6", "driver": "12.8"}
    monkeypatch.setattr(cuda, "DRIVER", str(tmp_path / "version"))
    assert gpu.facts() == known
    (tmp_path / "version").write_text("570.86.15\n")
    assert gpu.facts() == {**known, "driver": "12.8 (570.86.15)"}


def test_a_dla_core_and_host_code_are_asked_for_when_an_engine_is_opened(open_model):
    model = open_model("10.3", dla_core=1, version_compatible=True)
    assert ("DLA_core", 1) in model.fake.said and ("engine_host_code_allowed", True) in model.fake.said
    assert not [what for what, _ in open_model("10.3").fake.said if what in ("DLA_core", "engine_host_code_allowed")]


def test_an_engine_built_by_a_version_runs_under_it(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "loaded_file", lambda name: "")
    fake = Fake("8.6")
    fake.launch = lambda stream, out, into, n: gpu.lib.fake_launch(stream, out, into, n) == 0
    lib = Library("tensorrt", fake.api)
    plan = tmp_path / "e.plan"
    job = {"onnx": str(write_conv(tmp_path / "c.onnx")), "out": str(plan), "library": "tensorrt", "options": {}}
    engine.build(job, lambda event: None, lib)
    model = running.EngineModel(str(plan), OPTIONS, lib, gpu)
    assert [(port.name, port.fed) for port in model.ports] == [("input", True), ("output", False)]
    assert min(model.block(0, 3)) >= 200_000
    model.close()
