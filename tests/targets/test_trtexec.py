"""trtexec by what its help says, its files, its failures, and a whole run of a stand-in binary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_conv
from engine_sites import compile_library
from test_engine import half, quantized

from targets.harness.agent.board.files import sha256
from targets.harness.agent.board.tensorrt import engine, library, onnxfile, running, trtexec
from targets.harness.agent.board.tensorrt.errors import BoardError
from targets.harness.agent.board.tensorrt.trtexec import Trtexec

RECORDED = Path(__file__).parent / "recordings" / "trtexec"
HELPS = ("8.2", "8.5", "10", "11")
RUN = {"cuda_graph": False, "spin": False, "copies": True, "dla_core": None}


def recorded(name):
    return (RECORDED / name).read_text(encoding="utf-8")


def binary(version):
    return Trtexec("trtexec", recorded(f"help-{version}.txt"))


def build(version, path, cache="", **options):
    return binary(version).build_command(onnxfile.read(str(path)), "e.plan", {**engine.OPTIONS, **options}, cache)


def test_options_are_those_that_begin_a_line_and_not_those_in_the_prose():
    assert trtexec.flags_of("  --a\n   --b=<x>   words\n      --c is not one\nsee --d\n --eF, --g\n") == {
        "--a",
        "--b",
        "--eF",
    }
    assert "--allowGPUFallback" in binary("10").flags and "--plugins" not in binary("10").flags


@pytest.mark.parametrize(("version", "found"), [("8.2", "8.2.1"), ("8.5", "8.5.3"), ("10", "10.3.0"), ("11", "11.1.0")])
def test_the_version_is_read_from_the_banner(version, found):
    assert binary(version).version == found and binary(version).title == f"trtexec of TensorRT {found}"


def test_something_else_is_no_trtexec():
    with pytest.raises(BoardError, match=r"'/bin/true' is no trtexec"):
        Trtexec("/bin/true")


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("8.2", ["--buildOnly", "--workspace=512"]),
        ("8.5", ["--buildOnly", "--memPoolSize=workspace:512"]),
        ("10", ["--skipInference", "--memPoolSize=workspace:512"]),
        ("11", ["--skipInference", "--memPoolSize=workspace:512"]),
    ],
)
def test_building_takes_the_flags_of_its_time(version, wanted, tmp_path):
    path = write_conv(tmp_path / "c.onnx")
    command = build(version, path, "t.cache", workspace_mib=512)
    assert command[:3] == ["trtexec", f"--onnx={path}", "--saveEngine=e.plan"]
    assert set(wanted) <= set(command) and "--timingCacheFile=t.cache" in command
    assert "--profilingVerbosity=detailed" in command
    known = binary(version).flags
    assert all(flag.partition("=")[0] in known for flag in command[1:])


@pytest.mark.parametrize("version", HELPS)
def test_precision_flags_are_given_only_without_strong_typing(version, tmp_path):
    for make, flag in ((half, "--fp16"), (quantized, "--int8")):
        command = build(version, make(tmp_path / "m.onnx"))
        assert (flag in command) == (version in ("8.2", "8.5"))
        assert ("--stronglyTyped" in command) == (version == "10")
    plain = build(version, write_conv(tmp_path / "c.onnx"))
    assert not {"--fp16", "--int8", "--best"} & set(plain)


def test_a_free_batch_is_fixed_and_another_free_size_refused(tmp_path):
    assert "--shapes=input:1x3x16x16" in build("10", write_conv(tmp_path / "c.onnx", batch="N"))


@pytest.mark.parametrize(
    ("option", "value", "flag", "lacking"),
    [
        ("version_compatible", True, "--versionCompatible", "8.5"),
        ("hardware_compatible", "ampere+", "--hardwareCompatibilityLevel=ampere+", "8.5"),
        ("optimization_level", 5, "--builderOptimizationLevel=5", "8.2"),
        ("compute_capability", "8.6", "", "10"),
    ],
)
def test_what_a_binary_lacks_is_refused_with_the_key(option, value, flag, lacking, tmp_path):
    path = write_conv(tmp_path / "c.onnx")
    if flag:
        assert flag in build("10", path, **{option: value})
    with pytest.raises(BoardError) as error:
        build(lacking, path, **{option: value})
    assert error.value.kind == "option" and error.value.hint == f"leave out tensorrt.{option}."


def test_tf32_that_cannot_be_turned_off_is_refused(tmp_path):
    path = write_conv(tmp_path / "c.onnx")
    assert "--noTF32" in build("11", path, tf32=False) and "--noTF32" not in build("11", path)
    old = Trtexec("trtexec", recorded("help-11.txt").replace("--noTF32", "--other"))
    model, options = onnxfile.read(str(path)), {**engine.OPTIONS, "tf32": False}
    with pytest.raises(BoardError, match=r"has no --noTF32, which tf32 needs"):
        old.build_command(model, "e.plan", options, "")
    assert old.build_command(model, "e.plan", engine.OPTIONS, "")


def test_a_dla_is_asked_for_with_the_gpu_for_the_rest(tmp_path):
    command = build("8.5", write_conv(tmp_path / "c.onnx"), dla_core=1)
    assert {"--useDLACore=1", "--allowGPUFallback"} <= set(command)
    old = Trtexec("trtexec", recorded("help-8.5.txt").replace("--allowGPUFallback", "--other"))
    model, options = onnxfile.read(str(tmp_path / "c.onnx")), {**engine.OPTIONS, "dla_core": 1}
    with pytest.raises(BoardError, match="has no --allowGPUFallback, which dla_core needs"):
        old.build_command(model, "e.plan", options, "")


@pytest.mark.parametrize("version", HELPS)
def test_a_dla_is_tried_with_weak_typing_where_a_binary_has_both(version):
    known, on_dla = binary(version), {**engine.OPTIONS, "dla_core": 0}
    assert known.ways(engine.OPTIONS) == [version in ("10", "11")]
    assert known.ways(on_dla) == {"10": [True, False], "11": [True]}.get(version, [False])


@pytest.mark.parametrize(
    ("version", "cuda_graph", "spin", "copies", "flags"),
    [
        ("8.2", False, False, True, []),
        ("8.2", True, True, False, ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]),
        ("10", False, False, True, []),
        ("10", True, True, False, ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]),
        ("11", False, False, True, ["--noCudaGraph", "--noSpinWait", "--includeDataTransfers"]),
        ("11", True, True, False, []),
    ],
)
def test_the_same_way_of_measuring_is_reached_whatever_a_binary_has_on_by_default(
    version, cuda_graph, spin, copies, flags
):
    assert binary(version).switches({"cuda_graph": cuda_graph, "spin": spin, "copies": copies}) == flags


def test_a_way_that_a_binary_cannot_go_is_refused():
    text = recorded("help-10.txt").replace("--useCudaGraph", "--somethingElse")
    with pytest.raises(BoardError, match=r"trtexec of TensorRT 10\.3\.0 cannot turn cuda_graph on"):
        Trtexec("trtexec", text).switches({**RUN, "cuda_graph": True})


@pytest.mark.parametrize("version", HELPS)
def test_every_flag_of_a_run_is_one_that_the_help_lists(version):
    found = binary(version)
    command = found.run_command("e.plan", {**RUN, "dla_core": 0}, 30, "t.json")
    command += found.profile_command("e.plan", RUN, 10, "p.json", "l.json")
    assert all(flag.partition("=")[0] in found.flags for flag in command if flag.startswith("--"))
    assert "--iterations=30" in command and "--duration=0" in command and "--exportProfile=p.json" in command
    assert ("--infStreams=1" in command) == (version in ("10", "11"))


@pytest.mark.parametrize("version", HELPS)
def test_an_engine_is_profiled_as_it_is_timed_on_the_dla_and_as_compatible_with_other_versions(version):
    found = binary(version)
    for options, flag, key in (
        ({"dla_core": 1}, "--useDLACore=1", "dla_core"),
        ({"version_compatible": True}, "--versionCompatible", "version_compatible"),
    ):
        asked = [
            lambda options=options: found.run_command("e.plan", {**RUN, **options}, 30, "t.json"),
            lambda options=options: found.profile_command("e.plan", {**RUN, **options}, 10, "p.json", "l.json"),
        ]
        if found.has(flag.partition("=")[0]):
            assert [ask().count(flag) for ask in asked] == [1, 1]
            continue
        for ask in asked:
            with pytest.raises(BoardError) as error:
                ask()
            assert error.value.hint == f"leave out tensorrt.{key}."
    command = found.profile_command("e.plan", RUN, 10, "p.json", "l.json")
    assert not {"--useDLACore", "--versionCompatible"} & {flag.partition("=")[0] for flag in command}


def test_the_profiler_of_a_model_is_given_the_options_of_the_model(stand_in, tmp_path):
    found = stand_in(last=f'echo "$@" >>"{tmp_path}/asked"')
    trtexec.TrtexecModel(str(tmp_path / "e.plan"), {**RUN, "dla_core": 1}, found).profile(5)
    (asked,) = [line for line in (tmp_path / "asked").read_text().splitlines() if "--exportProfile=" in line]
    assert "--useDLACore=1" in asked.split()


# --- files -------------------------------------------------------------------------------------------------------


def test_times_of_both_formats_are_the_same_without_the_warm_up():
    old, new = (trtexec.read_times(recorded(f"times-{v}.json"), 200.0) for v in ("8.2", "10"))
    assert old == new == {"compute_ns": [2_200_000, 2_250_000], "latency_ns": [2_420_000, 2_470_000]}


ALL_WARM_UP = '[{"startComputeMs": 3.0, "computeMs": 1, "latencyMs": 1}]'


@pytest.mark.parametrize("text", ["", "[{}]", "{", '[{"startComputeMs": 1}]', "[]", ALL_WARM_UP])
def test_times_that_are_cut_off_or_all_warm_up_are_refused(text):
    with pytest.raises(BoardError, match="trtexec"):
        trtexec.read_times(text, 200.0)


@pytest.mark.parametrize(("name", "runs", "first"), [("8.4", 625, 0.058695), ("8.6", 41400, 0.0280382)])
def test_layer_times_are_per_inference(name, runs, first):
    found, rows = trtexec.read_profile(recorded(f"profile-{name}.json"))
    assert found == runs and rows[0]["ms"] == first and all(row["name"] for row in rows)
    with pytest.raises(BoardError, match="profile of trtexec"):
        trtexec.read_profile("[{]")


def test_numbers_through_python_and_through_trtexec_have_other_names():
    assert running.protocol(RUN) != trtexec.protocol(RUN)
    assert trtexec.protocol(RUN) == "tensorrt-trtexec-1/clock=event/cuda_graph=0/spin=0/copies=1"


# --- failures ----------------------------------------------------------------------------------------------------

PARSER_LOG = """\
[09/14/2023-09:38:18] [I] [TRT] Start parsing network model
[09/14/2023-09:38:19] [E] [TRT] ModelImporter.cpp:771: While parsing node number 0 [QuantizeLinear -> "q"]:
[09/14/2023-09:38:19] [E] [TRT] ModelImporter.cpp:772: --- Begin node ---
[09/14/2023-09:38:19] [E] [TRT] ModelImporter.cpp:773: input: "input"
[09/14/2023-09:38:19] [E] [TRT] ModelImporter.cpp:775: --- End node ---
[09/14/2023-09:38:19] [E] [TRT] ModelImporter.cpp:777: ERROR: builtin_op_importers.cpp:1216 In function QuantDequant:
[6] Assertion failed: shiftIsAllZeros(zeroPoint) && "TRT only supports symmetric quantization - zeroPt must be zeros"
[09/14/2023-09:38:19] [E] Failed to parse onnx file
&&&& FAILED TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=q.onnx
"""


def test_a_refusal_in_a_log_is_the_same_sentence_as_from_the_parser(tmp_path):
    model = onnxfile.read(str(quantized(tmp_path / "q.onnx", 3)))
    error = trtexec.failure(binary("8.5"), PARSER_LOG, "q.onnx", model)
    assert error.message.startswith(
        "trtexec of TensorRT 8.5.3 does not take the node 'input_quantize' (QuantizeLinear): "
    )
    assert "symmetric quantization" in error.message and "zero points of 0" in error.hint


@pytest.mark.parametrize(
    ("log", "kind", "told"),
    [
        ("[x] [E] Error[2]: [cuda.cpp] Cuda failure: out of memory\n", "memory", "ran out of memory on 'm.onnx'"),
        ("[x] [E] Cuda failure: 35\n", "device", "no GPU with a driver that fits"),
        ("[x] [E] CUDA initialization failure with error: 100\n", "device", "no GPU with a driver that fits"),
        ("[x] [E] Error[1]: something else.\n", "model", "failed on 'm.onnx': Error[1]: something else"),
        ("nothing at all\n", "model", "it does not say why"),
    ],
)
def test_a_failure_is_one_sentence_of_its_kind(log, kind, told):
    error = trtexec.failure(binary("10"), log, "m.onnx", None)
    assert error.kind == kind and told in error.message and "\n" not in error.message


# --- a binary ----------------------------------------------------------------------------------------------------

STAND_IN = """\
#!/bin/sh
# replays recordings as trtexec 10 would write them; counts its own runs
echo run >>"{folder}/runs"
for word in "$@"; do case "$word" in
    --help) cat "{recorded}/help-10.txt"; exit 0;;
    --timingCacheFile=*) echo timed >>"${{word#*=}}";;
    --saveEngine=*) echo plan >"${{word#*=}}";;
    --exportTimes=*) cp "{folder}/times.json" "${{word#*=}}";;
    --exportProfile=*) cp "{recorded}/profile-8.6.json" "${{word#*=}}";;
    --exportLayerInfo=*) cp "{folder}/layers.json" "${{word#*=}}";;
esac; done
{last}
"""


@pytest.fixture
def stand_in(tmp_path):
    """A program that answers as trtexec does. last: how it ends."""

    def make(last="", times=12):
        rows = [json.loads(recorded("times-10.json"))[0] for _ in range(times)]
        (tmp_path / "times.json").write_text(json.dumps(rows), encoding="utf-8")
        layer = {"Name": "/conv1/Conv + /act1/Relu", "LayerType": "CaskConvolution"}
        (tmp_path / "layers.json").write_text(json.dumps({"Layers": [layer]}), encoding="utf-8")
        path = tmp_path / "trtexec"
        path.write_text(STAND_IN.format(folder=tmp_path, recorded=RECORDED, last=last), encoding="utf-8")
        path.chmod(0o755)
        return Trtexec(str(path))

    return make


def test_an_engine_is_built_timed_and_profiled_through_it(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "free_mib", lambda: (3000, {"system": 3000}))
    found = stand_in()
    out = tmp_path / "e.plan"
    job = {"onnx": str(write_conv(tmp_path / "c.onnx")), "out": str(out), "options": {}}
    record = trtexec.build(found, job, [].append)
    assert record["bytes"] == out.stat().st_size and record["workspace_mib"] == 1024
    model = trtexec.TrtexecModel(str(out), {**RUN, "copies": False}, found)
    assert model.block(2, 10) == [2_200_000] * 10 == model.events
    assert trtexec.TrtexecModel(str(out), RUN, found).block(2, 10) == [2_420_000] * 10
    assert model.profile(5) == {("/conv1/Conv + /act1/Relu", "CaskConvolution"): 0.0280382}
    assert model.warm({"min_inferences": 5, "steady": 0.02})["steady"]
    with pytest.raises(BoardError, match="control period"):
        model.paced(0, 1, 1000)
    with pytest.raises(BoardError, match="timed 12 inferences, 20 were asked for"):
        model.block(0, 20)


def test_a_timing_cache_is_reused_told_and_never_left_damaged(stand_in, tmp_path):
    found, cache = stand_in(), tmp_path / "timing" / "a.cache"
    job = {"onnx": str(write_conv(tmp_path / "c.onnx")), "out": str(tmp_path / "e.plan"), "options": {}}
    job["timing_cache"] = str(cache)

    def built(binary=found):
        record = trtexec.build(binary, job, [].append)
        return record["timing_cache"], record["notes"]

    assert built() == ("new", []) and engine.read_timing(str(cache)) == (True, b"timed\n")
    assert built() == ("reused", []) and engine.read_timing(str(cache)) == (True, b"timed\ntimed\n")
    kept = cache.read_bytes()
    with pytest.raises(BoardError):
        built(stand_in(last="exit 1"))
    assert cache.read_bytes() == kept, "what ended in the middle has changed a copy"
    cache.write_bytes(kept[:-3])
    stand_in()
    assert built() == ("discarded", [engine.BEGUN_ANEW]) and engine.read_timing(str(cache)) == (True, b"timed\n")
    none, notes = built(Trtexec(found.path, recorded("help-10.txt").replace("--timingCacheFile", "--other")))
    assert none == "none" and notes == ["trtexec of TensorRT 10.3.0 has written no timing cache, so nothing that it "
                                        "timed is reused"]  # fmt: skip
    assert trtexec.build(found, {**job, "timing_cache": ""}, [].append)["notes"] == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["timing"]


def test_a_binary_that_fails_is_told_in_its_own_words(stand_in, tmp_path):
    found = stand_in(last="echo '[x] [E] Error[1]: no such tactic'; exit 1")
    with pytest.raises(BoardError, match=r"failed on '.*c\.onnx': Error\[1\]: no such tactic"):
        job = {"onnx": str(write_conv(tmp_path / "c.onnx")), "out": str(tmp_path / "e"), "options": {}}
        trtexec.build(found, job, [].append)


ONLY_WEAK = """
case "$*" in *--stronglyTyped*) echo '[x] [E] Error[4]: a DLA takes no strongly typed network'; exit 1;; esac
echo '[x] [I] [TRT] [DlaLayer] {ForeignNode[Conv_0...Relu_1]}'
echo '[x] [I] [TRT] [GpuLayer] SHUFFLE: Reshape_2 + (Unnamed Layer* 7) [Shuffle]'
"""


def test_a_dla_that_refuses_strong_typing_is_tried_with_weak_typing_and_told(stand_in, tmp_path):
    out = tmp_path / "e.plan"
    job = {"onnx": str(half(tmp_path / "h.onnx")), "out": str(out), "options": {"dla_core": 0}}
    record = trtexec.build(stand_in(last=ONLY_WEAK), job, [].append)
    assert "--fp16" in record["flags"] and "--stronglyTyped" not in record["flags"]
    assert record["dla"]["dla"] == ["{ForeignNode[Conv_0...Relu_1]}"]
    assert record["dla"]["gpu"] == ["SHUFFLE: Reshape_2 + (Unnamed Layer* 7) [Shuffle]"]
    first, second, third = record["notes"]
    assert first.startswith("with strong typing it did not build (") and "takes no strongly typed network" in first
    assert second.startswith("trtexec permits float16 everywhere") and third.startswith("the DLA core 0 runs 1 part")
    with pytest.raises(BoardError, match="takes no strongly typed network"):
        trtexec.build(stand_in(last=ONLY_WEAK), {**job, "options": {}}, [].append)


def test_it_is_found_where_it_is_put(stand_in, tmp_path, monkeypatch):
    stand_in()
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert trtexec.find() == str(tmp_path / "trtexec")
    with pytest.raises(BoardError, match="there is no trtexec at /nowhere"):
        trtexec.find("/nowhere")
    assert trtexec.facts(Trtexec(trtexec.find()))["version"] == "10.3.0"


BANNER = "&&&& RUNNING TensorRT.trtexec [TensorRT v100300]\\n"
PROGRAM = """
#include <stdio.h>
CALL
int main(void) { USE; puts("OPTIONS"); return 0; }
"""
LINKED = {"CALL": "int getInferLibVersion(void);", "USE": "getInferLibVersion()"}
BY_NAME = {"CALL": "", "USE": ""}
FACTS = "from targets.harness.agent.board.tensorrt import trtexec as t; import sys, json\n"
FACTS += "found = t.Trtexec(sys.argv[1]); print(json.dumps([t.facts(found), t.loads(found)]))\n"


@pytest.mark.parametrize("how", [LINKED, BY_NAME], ids=["linked", "by name"])
def test_two_libraries_of_one_name_behind_one_binary_are_two_builds(how, tmp_path):
    places = [tmp_path / name for name in ("one", "two")]
    for number, place in enumerate(places):
        source = f"int getInferLibVersion(void) {{ return 100300; }}\nint made(void) {{ return {number}; }}\n"
        compile_library(place / "libnvinfer.so.10", source, "-Wl,-soname,libnvinfer.so.10")
    source = PROGRAM.replace("OPTIONS", BANNER + "  --onnx=\\n  --loadEngine=\\n  --exportTimes=")
    for word, text in how.items():
        source = source.replace(word, text)
    linked = [str(places[0] / "libnvinfer.so.10")] if how is LINKED else []
    path = tmp_path / "trtexec"
    subprocess.run(["gcc", "-o", path, "-x", "c", "-", "-x", "none", *linked], check=True, input=source, text=True)

    def found(place):
        env = {**os.environ, "LD_LIBRARY_PATH": str(place), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", FACTS, str(path)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, env=env).stdout)

    (one, first), (two, second) = (found(place) for place in places)
    assert [first, second] == [str(place / "libnvinfer.so.10") for place in places]
    assert one["version"] == two["version"] == "10.3.0" and one["build"] != two["build"]
    assert found(places[0])[0] == one and len(one["build"]) == 64


def test_the_library_behind_a_script_is_not_guessed(stand_in):
    found = stand_in()
    assert trtexec.loads(found) == "" and trtexec.facts(found)["build"] == sha256(found.path)


def test_one_that_hangs_is_given_up():
    with pytest.raises(BoardError, match=r"'sleep' did not end within 0 s"):
        trtexec.run(["sleep", "5"], 0.1)
