"""Whether ONNX Runtime runs where it is asked to, who the GPU is, and how it is timed there.

Over the processor's own ONNX Runtime, which has no GPU provider, and over a stand-in that says it had. No GPU is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import write_conv
from engine_sites import installed, make_gpu_site
from onnx import TensorProto, helper

from profiles.errors import DeployError, UndecidedError
from profiles.schema import MeasureSpec, load_profile
from targets.base import load_target
from targets.harness import device, pack
from targets.harness import lease as leases
from targets.harness.agent.board import machine, providers, rows
from targets.harness.agent.board.base import AgentError
from targets.harness.agent.board.files import contents, whole
from targets.harness.agent.board.model import Model, open_session
from targets.harness.agent.board.tensorrt import cuda, library
from targets.harness.agent.board.tensorrt.errors import BoardError
from targets.runtimes.base import load_runtime

TENSORRT, CUDA = GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
CPU = "CPUExecutionProvider"
PROTOCOL = "ort-gpu-1/clock=wall/cuda_graph=0/spin=0/copies=1"
SHORT = MeasureSpec(
    rank_processes=1, rank_rounds=4, block_min_ms=0.1, warmup_s=0.02, warmup_inferences=5, warmup_max_s=0.2
)
FACTS = {
    "machine": "m", "cpu": "c", "cpu_flags": "f" * 64, "cores": 6, "cpu_quota": None, "kernel": "Linux 5",
    "memory_mib": 8192, "power": "", "clocks": "locked", "python": "3.11", "runtime": "onnxruntime",
    "runtime_version": "1.31.1", "runtime_build": "b" * 64,
}  # fmt: skip
without = pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this machine has the provider")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """This machine as a target for these providers; its agents find the stand-in of a site."""
    (tmp_path / "lock").mkdir()
    monkeypatch.setattr(leases, "lease_folder", lambda: tmp_path / "lock")

    def make(site, *names, **keys):
        if site is not None:
            monkeypatch.setenv("PYTHONPATH", str(site))
        return load_target(load_profile("local", {"providers": list(names), **keys}), tmp_path / ".deploy")

    return make


def cpu_only(path, **options):
    return open_session(str(path), {"providers": [CPU], "threads": 1, "spin": False, **options})


class Keeping(onnxruntime.InferenceSession):
    """A session on the processor that keeps an engine as the TensorRT provider does: one that is there is trusted."""

    built = 0
    dies = False

    def __init__(self, source, settings=None, providers=()):
        self.asked = {each[0]: each[1] for each in providers}
        engine = os.path.join(self.asked[TENSORRT]["trt_engine_cache_path"], "engine.engine")
        if not os.path.exists(engine):
            Keeping.built += 1
            with open(engine, "wb") as file:
                file.write(b"half")
                if Keeping.dies:
                    raise SystemExit("killed")
                file.write(b" and half")
        with open(engine, "rb") as file:
            self.trusted = file.read()
        super().__init__(source, settings, providers=[CPU])

    def get_providers(self):
        return [*self.asked, CPU]


@pytest.fixture
def keeping(monkeypatch):
    """An ONNX Runtime whose TensorRT provider keeps engines."""
    monkeypatch.setattr(providers, "prepare", lambda names, spin: None)
    monkeypatch.setattr(providers, "hardware", lambda *names: {"gpu": "Orin"})
    monkeypatch.setattr(onnxruntime, "InferenceSession", Keeping)
    monkeypatch.setattr(Keeping, "built", 0)
    monkeypatch.setattr(Keeping, "dies", False)


def test_an_engine_that_was_half_written_or_damaged_is_built_again_and_a_whole_one_is_not(keeping, tmp_path):
    path, options = str(write_conv(tmp_path / "a.onnx")), {"providers": [TENSORRT], "engine_cache": str(tmp_path / "e")}

    def opened():
        return providers.opened(path, onnxruntime.SessionOptions(), options).trusted, Keeping.built

    Keeping.dies = True
    with pytest.raises(SystemExit):
        opened()
    Keeping.dies = False
    assert opened() == (b"half and half", 2), "what was there had no seal"
    assert opened() == (b"half and half", 2), "a whole one is used"
    [engine] = (tmp_path / "e").glob("*/engine.engine")
    engine.write_bytes(b"half")
    assert opened() == (b"half and half", 3)
    (engine.parent / ".seal").write_text("[")
    assert opened() == (b"half and half", 4)


def test_two_processes_that_open_one_network_build_one_engine(tmp_path):
    held = (
        "import sys, time; from targets.harness.agent.board.files import whole\n"
        "with whole(sys.argv[1]):\n print('in', flush=True); sys.stdin.read(); open(sys.argv[1] + '/x', 'w').write('1')"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "e")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdin is not None and first.stdout.readline() == "in\n"
    seen = []

    def second():
        with whole(str(tmp_path / "e")):
            seen.extend(contents(str(tmp_path / "e")))

    waiting = threading.Thread(target=second)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and seen == [], "it does not wait"
    first.communicate(timeout=60)
    waiting.join(60)
    assert seen == ["x"]


# --- on a machine without one --------------------------------------------------------------------------------------


def test_the_small_network_is_what_onnx_writes_and_runs():
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=4, opset_imports=[helper.make_opsetid("", 9)], producer_name="")
    onnx.checker.check_model(model)
    assert model.SerializeToString() == providers.SMALL
    providers.run_small([CPU])
    assert set(providers.there([CPU])) == set(onnxruntime.get_available_providers())


@without
@pytest.mark.parametrize("name", GPU)
def test_a_provider_that_is_not_there_is_an_error_on_every_way_to_it(name, here, tmp_path):
    path = write_conv(tmp_path / "a.onnx")
    told = f"no provider {name}, there are "
    with pytest.raises(BoardError, match=told):
        open_session(str(path), {"providers": [name], "threads": 1, "spin": False, "engine_cache": str(tmp_path / "e")})
    target = here(None, name)
    for ask in (
        target.fingerprint,
        lambda: target.infer(path, [np.zeros((1, 3, 16, 16), np.float32)]),
        lambda: target.build(path, tmp_path / "b.onnx"),
    ):
        with pytest.raises(DeployError) as error:
            ask()
        assert error.value.message.startswith(told) and "onnxruntime-gpu" in error.value.hint
    assert not (tmp_path / "b.onnx").exists() and not (tmp_path / "e").exists()
    found = {condition.name: condition for condition in target.doctor()}
    assert not found["providers"].ok and found["providers"].fatal and CPU in found["providers"].mend


def falling_back(monkeypatch, gpu=None):
    """The processor's ONNX Runtime as one that names CUDA and runs elsewhere, as where CUDA does not load."""
    real = onnxruntime.InferenceSession
    there = [CUDA, CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda source, settings=None, providers=(): real(source, settings, [CPU])
    )
    if gpu is not None:
        monkeypatch.setattr(cuda, "Cuda", lambda: gpu)


class Gpu:
    """A CUDA runtime that is there. seen: how waiting was asked for."""

    def __init__(self):
        self.seen = []

    def open(self, spin):
        self.seen.append(spin)


def test_a_session_that_runs_elsewhere_than_asked_is_one_sentence_with_the_reason(monkeypatch, tmp_path):
    falling_back(monkeypatch, Gpu())
    with pytest.raises(BoardError) as error:
        open_session(str(write_conv(tmp_path / "a.onnx")), {"providers": [CUDA], "threads": 1, "spin": False})
    version = onnxruntime.__version__
    assert error.value.message.startswith(f"ONNX Runtime {version} gives up {CUDA}: ") and error.value.kind == "device"
    assert "libonnxruntime_providers_cuda.so: cannot open shared object file" in error.value.message
    assert "\n" not in error.value.message and "ldconfig -p" in error.value.hint


def test_a_session_that_loads_and_runs_elsewhere_says_where(monkeypatch, tmp_path):
    falling_back(monkeypatch, Gpu())
    monkeypatch.setattr(providers, "reason", lambda name: "")
    with pytest.raises(BoardError, match=rf"gives up {CUDA}: it runs the network on {CPU} instead"):
        open_session(str(write_conv(tmp_path / "a.onnx")), {"providers": [CUDA, CPU], "threads": 1, "spin": False})


def test_without_a_cuda_runtime_the_provider_is_given_up_before_anything_is_opened(monkeypatch, tmp_path):
    falling_back(monkeypatch)
    gone = BoardError("library", "the CUDA runtime (libcudart) cannot be loaded here: none.so")
    monkeypatch.setattr(cuda, "_load", lambda paths: (_ for _ in ()).throw(gone))
    with pytest.raises(BoardError, match=rf"gives up {CUDA}: the CUDA runtime \(libcudart\) cannot be loaded") as error:
        open_session(str(tmp_path / "none.onnx"), {"providers": [CUDA], "threads": 1, "spin": False})
    assert error.value.hint == providers.START_HINT


def test_a_session_never_changes_over_to_another_provider_later(tmp_path):
    assert cpu_only(write_conv(tmp_path / "a.onnx"))._enable_fallback is False


def test_waiting_for_the_gpu_is_said_before_it_is_used_and_once(monkeypatch):
    gpu = Gpu()
    falling_back(monkeypatch, gpu)
    for spin in (True, False):
        providers.prepare([CUDA, CPU], spin)
    providers.prepare([CPU], True)
    assert gpu.seen == [True, False]


# --- over a stand-in -----------------------------------------------------------------------------------------------


def test_a_gpu_and_what_runs_on_it_are_part_of_the_fingerprint(here, tmp_path):
    first = here(make_gpu_site(tmp_path / "site"), *GPU).fingerprint()
    assert first.gpu.startswith("Orin 8.7, CUDA 12.6, driver 12.8") and first.providers == (*GPU, PROTOCOL)
    told = first.libraries.split(", ")
    assert [each.rsplit(" ", 1)[0] for each in told] == ["TensorRT 10.3.0", "cuDNN 9.3.0"]
    assert all(len(each.rsplit(" ", 1)[1]) == 64 for each in told)
    others = [
        here(make_gpu_site(tmp_path / name, **change), *GPU).fingerprint()
        for name, change in {
            "card": {"card": "NVIDIA L4"},
            "lib": {"tensorrt": 100700},
            "dnn": {"cudnn": 90800},
        }.items()
    ]
    assert [list(first.differs(other)) for other in others] == [["gpu"], ["libraries"], ["libraries"]]
    assert len({each.digest() for each in (first, *others)}) == 4
    alone = here(tmp_path / "site", CUDA).fingerprint()
    assert alone.libraries == told[1] and device.Fingerprint.from_table(alone.to_table()) == alone


def test_the_processors_fingerprint_is_what_it_was(here, tmp_path):
    """Tables that were measured before stay valid; this digest was taken before GPUs were told of."""
    made = device.fingerprint(FACTS, load_runtime("ort").manner((CPU,), MeasureSpec(), FACTS), MeasureSpec())
    assert made.digest() == "f5773b692d7bdf90a3be95832276262cf4cd898a65afb5f1d6d109847fe1506b"
    plain = here(make_gpu_site(tmp_path / "site"), CPU).fingerprint().to_table()
    assert plain["providers"] == [CPU] and not {"gpu", "libraries"} & set(plain)
    assert machine.runtime_facts("onnxruntime", [CPU]) == machine.runtime_facts("onnxruntime")


def test_networks_are_timed_under_a_protocol_that_says_everything_and_no_other_is_joined(here, tmp_path, monkeypatch):
    path = write_conv(tmp_path / "a.onnx", channels=4, size=8)
    site = make_gpu_site(tmp_path / "site")
    session = here(site, *GPU).measure({"a": path, "b": path}, SHORT, "rank")
    assert session.protocol.startswith(f"{PROTOCOL} rank ") and session.fingerprint.providers[-1] == PROTOCOL
    assert [m.protocol for m in session.measurements.values()] == [PROTOCOL] * 2
    assert len(list((tmp_path / ".deploy" / "engines").iterdir())) == 1, "one network, one folder for its engine"
    assert here(site, *GPU).rows([path], path, 2).ms.shape == (1, 2)

    monkeypatch.setenv("FAKE_GRAPH", "1")
    captured = here(site, *GPU).measure({"a": path, "b": path}, SHORT, "rank")
    assert captured.protocol.startswith(PROTOCOL.replace("cuda_graph=0", "cuda_graph=1"))
    with pytest.raises(UndecidedError, match="measured differently"):
        session.joined(captured)
    mixed = replace(session, measurements={"a": session.measurement("a"), "b": captured.measurement("b")})
    with pytest.raises(UndecidedError, match=r"different protocols.*cuda_graph=1"):
        mixed.ratio("b", "a")


@pytest.mark.parametrize(("name", "free"), [(CUDA, 3000), (CPU, 9000)])
def test_rows_are_opened_while_the_memory_of_what_runs_them_lasts(name, free, monkeypatch):
    monkeypatch.setattr(library, "free_mib", lambda: (3000, {}))
    monkeypatch.setattr(rows, "free_memory_mib", lambda: 9000)
    room = rows.Room({"providers": [name]})
    assert room.free_mib() == free and room.for_more(rows.MOST_ENGINES + 1) is (name == CPU)


@pytest.mark.parametrize("said", ["CUDA failure 2: out of memory ; GPU=0", "Failed to allocate memory for a buffer"])
def test_a_gpu_that_is_full_is_told_from_a_network_that_does_not_run(said, monkeypatch):
    def full(path, settings, options):
        raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {said}")

    monkeypatch.setattr(providers, "opened", full)
    with pytest.raises(AgentError) as error:
        Model("a.onnx", {"providers": [CUDA], "threads": 1, "spin": False, "seed": 0})
    assert error.value.kind == "memory" and error.value.message == said.rstrip(".")


def test_spinning_is_part_of_the_protocol_and_the_processors_id_stays():
    timed = [providers.protocol({"providers": [CUDA], "spin": spin}) for spin in (False, True)]
    assert timed == [PROTOCOL, PROTOCOL.replace("spin=0", "spin=1")]
    assert providers.protocol({"providers": [CPU], "spin": True}) == ""
    runtime = load_runtime("ort")
    assert runtime.manner(GPU, MeasureSpec(spin=True), FACTS)[-1] == timed[1]


def test_a_measurement_that_would_run_on_the_processor_is_refused(here, tmp_path, monkeypatch):
    """CUDA is compiled in and does not load: nothing is filed as CUDA's."""
    target = here(make_gpu_site(tmp_path / "site"), *GPU)
    monkeypatch.setenv("FAKE_LACKS", CUDA)
    path = write_conv(tmp_path / "a.onnx")
    for ask in (
        target.fingerprint,
        lambda: target.measure({"a": path}, SHORT, "rank"),
        lambda: target.rows([path], path, 2),
    ):
        with pytest.raises(DeployError) as error:
            ask()
        assert f" gives up {CUDA}: " in error.value.message and error.value.hint == providers.START_HINT
    found = {condition.name: condition for condition in target.doctor()}
    assert not found["providers"].ok and found["providers"].fatal and "gives up" in found["providers"].value
    monkeypatch.delenv("FAKE_LACKS")
    found = {condition.name: condition for condition in target.doctor()}
    assert found["providers"].ok and found["providers"].value == ", ".join(GPU)


def test_the_agent_tells_where_it_can_run_after_it_has(tmp_path):
    def told(*names):
        command = [sys.executable, str(pack.FOLDER), "providers", *names]
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "FAKE_LACKS": CUDA}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    make_gpu_site(tmp_path / "site")
    code, found = told(CPU)
    assert code == 0 and found["there"][:2] == list(GPU)
    assert told("NoSuchProvider") == (0, found), "the caller says which is lacking"
    code, refused = told(CUDA)
    assert code == 1 and refused["kind"] == "device" and f"gives up {CUDA}" in refused["message"]


def test_a_board_is_asked_for_its_gpu_and_really_runs_on_it(board, tmp_path):
    with installed(board, make_gpu_site(tmp_path / "site")):
        file = board.file("gpu", f'providers = ["{CUDA}", "{CPU}"]')
        target = load_target(load_profile(str(file)), tmp_path / ".deploy")
        fingerprint = target.fingerprint()
        assert fingerprint.gpu.startswith("Orin 8.7") and fingerprint.libraries.startswith("cuDNN 9.3.0 ")
        found = {condition.name: condition for condition in target.doctor()}
        assert found["gpu"].value == fingerprint.gpu and found["providers"].ok
        session = target.measure({"a": write_conv(tmp_path / "a.onnx", channels=4, size=8)}, SHORT, "rank")
        assert session.fingerprint == fingerprint and session.protocol.startswith(PROTOCOL)
        target.board.close()
