"""ONNX Runtime's GPU providers: what they are asked for, and that no two networks share an engine. None is run.

How they start, and what is said where they do not: test_providers_start.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import onnxruntime
import pytest
from conftest import write_conv
from engine_sites import write_scaled
from onnxruntime.capi.onnxruntime_inference_collection import check_and_normalize_provider_args
from test_engine import half, quantized

from profiles.schema import load_profile
from targets.harness.agent.board import machine, placing, providers
from targets.harness.agent.board.base import AgentError
from targets.runtimes.base import load_runtime

KNOWN = json.loads((Path(__file__).parent / "recordings" / "onnxruntime" / "options.json").read_text())
GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


WHERE = {
    "gpu": {"name": "Orin", "capability": "8.7", "multiprocessors": 14, "cuda": "12.6", "driver": "12.8 (540.4.0)"},
    "libraries": {"TensorRT": {"name": "tensorrt", "version": "10.3.0", "build": "ab" * 32}},
}


@pytest.fixture(autouse=True)
def orin(monkeypatch):
    """What a session would find on a board."""
    monkeypatch.setattr(providers, "hardware", lambda *names: WHERE)


def settings(path: Path, cache: str = "") -> dict[str, str]:
    """What the TensorRT provider is asked for."""
    return providers.asked(str(path), {"providers": GPU[:1], "engine_cache": cache})[0][1]


def test_every_option_is_one_that_every_version_parses_and_that_the_installed_one_takes_as_it_is(tmp_path):
    asked = providers.asked(
        str(write_conv(tmp_path / "a.onnx")),
        {"providers": [*GPU, "CPUExecutionProvider"], "engine_cache": str(tmp_path)},
    )
    names, options = check_and_normalize_provider_args(asked, None, onnxruntime.get_all_providers())
    assert names == [*GPU, "CPUExecutionProvider"]
    assert options == [asked[0][1], asked[1][1], {}], "all of it is text already"
    for name, given in zip(GPU, options, strict=False):
        assert given and all(set(given) <= set(parsed) for parsed in KNOWN[name].values())


def test_the_types_that_the_provider_may_use_are_those_of_the_file(tmp_path):
    flags = [
        (found["trt_fp16_enable"], found["trt_int8_enable"])
        for found in (settings(make(tmp_path / "m.onnx")) for make in (write_conv, half, quantized))
    ]
    assert flags == [("0", "0"), ("1", "0"), ("0", "1")]


def test_without_a_folder_nothing_is_kept_and_with_one_it_is_the_networks_own(tmp_path):
    path = write_conv(tmp_path / "a.onnx")
    assert "trt_engine_cache_enable" not in settings(path)
    found = settings(path, str(tmp_path / "engines"))
    folder = Path(found["trt_engine_cache_path"])
    assert found["trt_engine_cache_enable"] == "1" and folder.is_dir() and folder.parent == tmp_path / "engines"
    os.utime(folder, (0, 0))
    assert settings(path, str(tmp_path / "engines")) == found and folder.stat().st_mtime > 0


def test_no_two_networks_share_a_folder_whatever_they_are_called(tmp_path, monkeypatch):
    def place(path):
        return Path(settings(path, str(tmp_path / "engines"))["trt_engine_cache_path"]).name

    first = write_conv(tmp_path / "a.onnx")
    same = tmp_path / "elsewhere.onnx"
    same.write_bytes(first.read_bytes())
    other = onnx.load(first)
    raw = bytearray(other.graph.initializer[0].raw_data)
    raw[0] ^= 1
    other.graph.initializer[0].raw_data = bytes(raw)
    onnx.save(other, tmp_path / "other.onnx")
    beside = [write_scaled(tmp_path / str(factor) / "net.onnx", factor) for factor in (2.0, 3.0)]
    assert beside[0].read_bytes() == beside[1].read_bytes()
    sizes = write_conv(tmp_path / "size.onnx", size=8)
    found = [place(path) for path in (first, tmp_path / "other.onnx", sizes, *beside)]
    assert place(same) == found[0] and len(set(found)) == len(found) and all(len(name) == 64 for name in found)
    monkeypatch.setattr(machine, "runtime_build", lambda name: ("9.9.9", "another build"))
    assert place(first) not in found


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": {**WHERE["gpu"], "name": "NVIDIA L4"}},
        {"gpu": {**WHERE["gpu"], "cuda": "12.8"}},
        {"gpu": {**WHERE["gpu"], "driver": "12.8 (550.54.15)"}},
        {"libraries": {"TensorRT": {**WHERE["libraries"]["TensorRT"], "version": "10.7.0"}}},
        {"libraries": {"TensorRT": {**WHERE["libraries"]["TensorRT"], "build": "cd" * 32}}},
    ],
)
def test_an_engine_is_kept_for_one_gpu_one_driver_and_one_library(change, tmp_path, monkeypatch):
    path = write_conv(tmp_path / "a.onnx")
    before = settings(path, str(tmp_path / "engines"))["trt_engine_cache_path"]
    monkeypatch.setattr(providers, "hardware", lambda *names: {**WHERE, **change})
    after = settings(path, str(tmp_path / "engines"))["trt_engine_cache_path"]
    assert before != after and len(list((tmp_path / "engines").iterdir())) == 2


def test_an_engine_is_kept_for_one_power_mode_and_one_state_of_the_clocks(tmp_path, monkeypatch):
    """The builder takes what was fastest as it was tried: what it took at 15 W is not for the board at its best."""
    path, found = write_conv(tmp_path / "a.onnx"), []
    for mode, locked in ((("15W", 0), False), (("15W", 0), True), (("MAXN_SUPER", 2), False), (("", None), None)):
        monkeypatch.setattr(providers.jetson, "power_mode", lambda mode=mode: mode)
        monkeypatch.setattr(providers.jetson, "gpu_locked", lambda locked=locked: locked)
        found += [settings(path, str(tmp_path / "engines"))["trt_engine_cache_path"] for _ in range(2)]
    assert found[::2] == found[1::2] and len(set(found)) == 4


def test_what_is_no_network_is_refused_before_the_runtime_sees_it(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no")
    with pytest.raises(AgentError, match="is no ONNX file"):
        settings(tmp_path / "no.onnx")


def test_on_a_board_engines_are_kept_in_the_agents_folder_and_here_in_the_state_folder(tmp_path):
    runtime = load_runtime("ort").fitted(load_profile("local"), tmp_path / ".deploy")
    assert runtime.options() == {"engine_cache": str(tmp_path / ".deploy" / "engines")}
    job = {"models": [], "options": {**runtime.options(), "threads": 1}}
    placed = placing.placed(job, str(tmp_path / "agent"), str(tmp_path / "job"))
    assert placed["options"] == {"engine_cache": str(tmp_path / "agent" / "engines"), "threads": 1}
