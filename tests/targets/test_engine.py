"""The builder over every version's module: what each is asked for, and never more than it has."""

from __future__ import annotations

import hashlib
import json
import threading
import time

import numpy as np
import onnx
import pytest
from conftest import write_conv
from fake_tensorrt import VERSIONS, Fake
from onnx import TensorProto, helper, numpy_helper

from profiles.schema import TensorRTSpec
from targets.harness.agent.board.tensorrt import dla, engine, layers, library, onnxfile, parsing, progress
from targets.harness.agent.board.tensorrt.errors import BoardError
from targets.harness.agent.board.tensorrt.library import Library
from targets.runtimes.tensorrt import builder_options

WEAK = ("8.2", "8.5", "8.6")
STRONG = ("10.3", "11.4")


def quantized(path, zero_point=0):
    """QuantizeLinear -> DequantizeLinear -> Conv with a quantised weight -> Relu."""
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(zero_point, np.int8), "zero")
    none = numpy_helper.from_array(np.array(0, np.int8), "none")
    weight = numpy_helper.from_array(np.ones((16, 3, 3, 3), np.int8), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], name="input_quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="input_dequantize"),
        helper.make_node("DequantizeLinear", ["w", "scale", "none"], ["wd"], name="weight_dequantize"),
        helper.make_node("Conv", ["d", "wd"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["output"], name="relu"),
    ]
    ports = (
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 16, 16]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 16, 16, 16]),
    )
    graph = helper.make_graph(nodes, "g", [ports[0]], [ports[1]], [scale, zero, none, weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def half(path):
    """Cast to float16, Conv in it, Cast back, Relu in float32."""
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["input"], ["h"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], name="conv"),
        helper.make_node("Cast", ["c"], ["f"], name="up", to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["output"], name="relu"),
    ]
    ports = (
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 4, 8, 8]),
    )
    graph = helper.make_graph(nodes, "g", [ports[0]], [ports[1]], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Builds with a version's stand-in; gives the stand-in, what was built, and the record."""
    monkeypatch.setattr(library, "free_mib", lambda: (3000, {"system": 3000, "gpu": 2000}))
    monkeypatch.setattr(library, "loaded_file", lambda name: "")

    def build(version, onnx_path, cache="", fake=None, tell=None, **options):
        fake = fake or Fake(version)
        job = {"onnx": str(onnx_path), "out": str(tmp_path / "e.plan"), "library": "tensorrt", "options": options}
        record = engine.build(
            {**job, "timing_cache": str(cache)}, tell or (lambda event: None), Library("tensorrt", fake.api)
        )
        built = json.loads((tmp_path / "e.plan").read_bytes())
        return fake, built, record

    return build


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_a_network_with_what_it_has(version, make, tmp_path):
    _, built, record = make(version, write_conv(tmp_path / "c.onnx"))
    assert ("EXPLICIT_BATCH" in built["network"]) == (version != "11.4")
    assert ("STRONGLY_TYPED" in built["network"]) == (version in STRONG)
    assert built["flags"] == ["TF32"] and record["flags"] == ["TF32"]
    assert (
        built["settings"]["profiling_verbosity"].endswith(("1", "DETAILED"))
        or "profiling_verbosity" in built["settings"]
    )
    assert record["bytes"] == (tmp_path / "e.plan").stat().st_size and record["seconds"] >= 0
    assert record["title"].startswith("TensorRT " + version)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_workspace_is_a_power_of_two_under_half_of_what_is_free(version, make, tmp_path):
    _, built, record = make(version, write_conv(tmp_path / "c.onnx"))
    assert record["workspace_mib"] == 1024 and record["free_mib"] == {"system": 3000, "gpu": 2000}
    if version == "8.2":
        assert built["settings"]["max_workspace_size"] == str(1024 << 20) and built["pools"] == {}
    else:
        assert built["pools"] == {"WORKSPACE": 1024 << 20} and "max_workspace_size" not in built["settings"]
    _, built, record = make(version, write_conv(tmp_path / "c.onnx"), workspace_mib=77)
    assert record["workspace_mib"] == 77


@pytest.mark.parametrize("version", VERSIONS)
def test_float16_needs_a_flag_only_where_there_is_no_strong_typing(version, make, tmp_path):
    fake, built, record = make(version, half(tmp_path / "h.onnx"))
    if version in STRONG:
        assert built["flags"] == ["TF32"] and built["precisions"] == {} and record["way"] == "strong typing"
        return
    held = "STRICT_TYPES" if version == "8.2" else "OBEY_PRECISION_CONSTRAINTS"
    assert built["flags"] == sorted(["FP16", "TF32", held]) and record["way"] == f"weak typing {held}"
    kinds = fake.api.DataType
    assert built["precisions"] == {"conv": str(kinds.HALF), "relu": str(kinds.FLOAT)}
    assert ("output type", ("conv", "HALF")) in fake.said and ("output type", ("relu", "FLOAT")) in fake.said


@pytest.mark.parametrize("version", WEAK)
def test_a_float32_network_is_not_allowed_float16(version, make, tmp_path):
    assert "FP16" not in make(version, write_conv(tmp_path / "c.onnx"))[1]["flags"]


@pytest.mark.parametrize("version", VERSIONS)
def test_explicit_quantisation_needs_a_flag_only_where_typing_is_weak(version, make, tmp_path):
    _, built, _ = make(version, quantized(tmp_path / "q.onnx"))
    assert ("INT8" in built["flags"]) == (version in WEAK)
    assert "FP16" not in built["flags"] and built["precisions"] == {}


def test_layers_behind_a_dequantisation_are_not_held_to_float(make, tmp_path):
    model = onnx.load(quantized(tmp_path / "q.onnx"))
    weight = numpy_helper.from_array(np.ones((1,), np.float16), "unused")
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "q.onnx")
    _, built, _ = make("8.6", tmp_path / "q.onnx")
    assert set(built["flags"]) >= {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert set(built["precisions"]) == {"relu"}


def test_a_type_that_a_version_lacks_is_an_error_not_another_type(make, tmp_path):
    model = onnx.load(half(tmp_path / "h.onnx"))
    model.graph.node[0].attribute[0].i = TensorProto.BFLOAT16
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(BoardError, match=r"TensorRT 8\.6\.1 has no bfloat16, which '.*b\.onnx' holds"):
        make("8.6", tmp_path / "b.onnx")


def test_when_obeying_fails_preferring_is_tried_and_said(make, tmp_path):
    fake = Fake("8.6")
    fake.refuses = lambda b: (
        "Error Code 4: no implementation obeys" if "OBEY_PRECISION_CONSTRAINTS" in b["flags"] else ""
    )
    _, built, record = make("8.6", half(tmp_path / "h.onnx"), fake=fake)
    assert "PREFER_PRECISION_CONSTRAINTS" in built["flags"] and "OBEY_PRECISION_CONSTRAINTS" not in built["flags"]
    assert record["notes"][0] == (
        "with weak typing OBEY_PRECISION_CONSTRAINTS it did not build (no implementation obeys)"
    )


def test_what_fails_every_way_is_one_sentence_with_the_reason(make, tmp_path):
    fake = Fake("10.3")
    fake.refuses = lambda b: "[E] no tactic for Conv_3" if b["network"] else ""
    path = write_conv(tmp_path / "c.onnx")
    with pytest.raises(BoardError) as error:
        make("10.3", path, fake=fake)
    assert error.value.message == f"TensorRT 10.3.0 cannot build '{path}': [E] no tactic for Conv_3"


@pytest.mark.parametrize("said", ["Cuda failure: out of memory", "OutOfMemory (no further information)"])
def test_running_out_of_memory_says_the_limit_and_what_was_free(said, make, tmp_path):
    fake = Fake("8.6")
    fake.refuses = lambda b: said
    path = half(tmp_path / "h.onnx")
    with pytest.raises(BoardError) as error:
        make("8.6", path, fake=fake)
    assert error.value.kind == "memory" and len([1 for what, _ in fake.said if what == "build"]) == 1
    assert (
        error.value.message == f"building '{path}' ran out of memory under a workspace of 1024 MiB with 2000 MiB free"
    )
    assert "tensorrt.workspace_mib" in error.value.hint


# --- options -----------------------------------------------------------------------------------------------------


def test_the_table_of_options_and_the_profile_are_the_same():
    assert builder_options(TensorRTSpec()) == engine.OPTIONS


@pytest.mark.parametrize(
    ("option", "value", "there", "lacking"),
    [
        ("version_compatible", True, "8.6", "8.5"),
        ("hardware_compatible", "ampere+", "8.6", "8.5"),
        ("hardware_compatible", "same-compute-capability", "11.4", "10.3"),
        ("optimization_level", 4, "8.6", "8.5"),
    ],
)
def test_an_option_is_set_where_it_is_there_and_refused_where_not(option, value, there, lacking, make, tmp_path):
    path = write_conv(tmp_path / "c.onnx")
    _, built, _ = make(there, path, **{option: value})
    seen = json.dumps([built["flags"], built["settings"]])
    assert {"version_compatible": "VERSION_COMPATIBLE", "optimization_level": '"builder_optimization_level": "4"'}.get(
        option, "hardware_compatibility_level"
    ) in seen
    with pytest.raises(BoardError) as error:
        make(lacking, path, **{option: value})
    assert error.value.kind == "option" and f"tensorrt.{option}" in error.value.hint
    assert f"TensorRT {lacking}" in error.value.message


def test_tf32_is_cleared_when_it_is_not_wanted(make, tmp_path):
    assert make("10.3", write_conv(tmp_path / "c.onnx"), tf32=False)[1]["flags"] == []


def test_only_a_library_that_builds_for_absent_gpus_is_asked_to(make, tmp_path):
    with pytest.raises(BoardError, match=r"TensorRT 10\.3\.0 has no engines for GPUs that are not here"):
        make("10.3", write_conv(tmp_path / "c.onnx"), compute_capability="8.7")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dla_core_runs_what_it_can_and_the_gpu_the_rest(version, make, tmp_path):
    fake = Fake(version)
    fake.cores = 2
    _, built, _ = make(version, write_conv(tmp_path / "c.onnx"), fake=fake, dla_core=1)
    assert "GPU_FALLBACK" in built["flags"] and built["settings"]["DLA_core"] == "1"
    with pytest.raises(BoardError, match=r"the DLA core 2 was asked for, TensorRT [\d.]+ finds 2 here"):
        make(version, write_conv(tmp_path / "c.onnx"), fake=fake, dla_core=2)


def test_a_dla_that_refuses_strong_typing_is_tried_with_weak_typing(make, tmp_path):
    fake = Fake("10.3")
    fake.cores, fake.refuses = 1, lambda b: "not on a DLA" if "STRONGLY_TYPED" in b["network"] else ""
    _, built, record = make("10.3", half(tmp_path / "h.onnx"), fake=fake, dla_core=0)
    assert "FP16" in built["flags"] and record["notes"][0].startswith("with strong typing it did not build")


ON_A_DLA = [
    "---------- Layers Running on DLA ----------", "[DlaLayer] {ForeignNode[Conv_0...Relu_3]}",
    "[DlaLayer] {ForeignNode[Gemm_9]}", "---------- Layers Running on GPU ----------", "[GpuLayer] POOLING: pool",
]  # fmt: skip
"""As in the README of github.com/NVIDIA-AI-IOT/jetson_dla_tutorial, without the time."""


@pytest.mark.parametrize("version", VERSIONS)
def test_what_runs_on_a_dla_and_what_fell_back_is_told(version, make, tmp_path):
    fake = Fake(version)
    fake.cores, fake.placed = 1, ON_A_DLA
    record = make(version, half(tmp_path / "h.onnx"), fake=fake, dla_core=0)[2]
    parts = ["{ForeignNode[Conv_0...Relu_3]}", "{ForeignNode[Gemm_9]}"]
    assert record["dla"] == {"core": 0, "known": True, "dla": parts, "gpu": ["POOLING: pool"]}
    assert f"the DLA core 0 runs 2 parts ({', '.join(parts)}); the GPU runs 1 part (POOLING: pool)" in record["notes"]
    assert make(version, half(tmp_path / "h.onnx"), fake=fake)[2]["dla"] == {}


def test_a_dla_on_which_nothing_runs_is_told_with_what_would_mend_it(make, tmp_path):
    fake = Fake("8.5")
    fake.cores, fake.placed = 1, ["[GpuLayer] CONVOLUTION: conv"]
    record = make("8.5", write_conv(tmp_path / "c.onnx"), fake=fake, dla_core=0)[2]
    assert record["dla"]["dla"] == [] and record["dla"]["known"]
    assert record["notes"][-1].startswith("nothing runs on the DLA core 0 but everything on the GPU, since ")
    assert record["notes"][-1].endswith('is float32 and a DLA computes in float16 and int8: precision = "fp16"')
    record = make("8.5", half(tmp_path / "h.onnx"), fake=fake, dla_core=0)[2]
    assert record["notes"][-1] == "nothing runs on the DLA core 0 but everything on the GPU"


def test_where_the_log_does_not_tell_the_layers_do():
    told = [("{ForeignNode[a...b]}", ""), ("{ForeignNode[c...d]}", "Myelin"), ("pool", "CudaPooling"), ("e", "DLA")]
    assert dla.by_layers([{"name": name, "op": op} for name, op in told]) == [
        ("dla", "{ForeignNode[a...b]}"), ("gpu", "{ForeignNode[c...d]}"), ("gpu", "pool"), ("dla", "e")
    ]  # fmt: skip


def test_what_is_not_known_of_a_dla_is_not_taken_for_nothing(tmp_path):
    table, note = dla.used(1, "", [], onnxfile.read(str(half(tmp_path / "h.onnx"))))
    assert not table["known"] and note.startswith("what runs on the DLA core 1 is not known")


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_free_batch_is_fixed_at_one(version, make, tmp_path):
    fixed = [1, 3, 16, 16]
    _, built, _ = make(version, write_conv(tmp_path / "c.onnx", batch="N"))
    assert built["profiles"] == [{"input": [fixed, fixed, fixed]}]
    assert make(version, write_conv(tmp_path / "c.onnx"))[1]["profiles"] == []


def test_another_free_size_is_refused_by_name(make, tmp_path):
    model = onnx.load(write_conv(tmp_path / "c.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "c.onnx")
    with pytest.raises(BoardError, match=r"input 'input' of '.*' has free sizes \(1, 3, any, 16\); only the batch"):
        make("10.3", tmp_path / "c.onnx")


# --- what the parser refuses -------------------------------------------------------------------------------------

ASYMMETRIC = (
    "Assertion failed: shiftIsAllZeros(zeroPoint): TensorRT only supports symmetric quantization. "
    "The zero point for the QuantizeLinear/DequantizeLinear operator must be all zeros."
)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refusal_names_the_node_whether_or_not_the_parser_does(version, make, tmp_path):
    fake = Fake(version)
    fake.complaints = [(0, "input_quantize", "QuantizeLinear", ASYMMETRIC)]
    path = quantized(tmp_path / "q.onnx", zero_point=3)
    with pytest.raises(BoardError) as error:
        make(version, path, fake=fake)
    assert error.value.message == (
        f"TensorRT {fake.version} does not take the node 'input_quantize' (QuantizeLinear): "
        "TensorRT only supports symmetric quantization"
    )
    assert error.value.hint == parsing.SYMMETRIC and "\n" not in error.value.message


@pytest.mark.parametrize(
    ("op", "said", "told", "mended"),
    [
        ("Foo", "No importer registered for op: Foo", "it has no operator Foo", 'runtime = "ort"'),
        (
            "Bar",
            "Plugin not found, are the plugin name, version, and namespace correct?",
            "it has no operator Bar",
            "ort",
        ),
        ("Dropout", "UNSUPPORTED_NODE: training mode", "training mode", "drop-dropout"),
        ("Range", "[8] Assertion failed: inputs.at(0).is_weights()", "inputs.at(0).is_weights()", "fold-constants"),
        ("QLinearConv", "false", "it has no operator QLinearConv", "QuantFormat.QDQ"),
        ("Resize", "unsupported opset 21", "unsupported opset 21", "graph.opset=13"),
    ],
)
def test_what_would_mend_it_follows_from_the_operator_and_the_words(op, said, told, mended, tmp_path):
    model = parsing.OnnxFile("m.onnx", 17, [], [], set(), [])
    complaint = parsing.Complaint(f"'n' ({op})", op, parsing.sentence(said, op))
    error = parsing.refusal("TensorRT 9", model, [complaint])
    assert error.message == f"TensorRT 9 does not take the node 'n' ({op}): {told}" and mended in error.hint


def test_a_parser_without_a_word_is_not_quoted():
    model = parsing.OnnxFile("m.onnx", 17, [], [], set(), [])
    assert parsing.refusal("TensorRT 9", model, []).message == "TensorRT 9 does not take 'm.onnx' and does not say why"


# --- the timing cache --------------------------------------------------------------------------------------------


def timed(path):
    """What a cache holds behind its head."""
    return path.read_bytes().partition(b"\n")[2]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_timing_cache_grows_and_one_that_does_not_fit_is_begun_anew(version, make, tmp_path):
    cache, path = tmp_path / "timing" / "a.cache", write_conv(tmp_path / "c.onnx")
    fake, _, record = make(version, path, cache=cache)
    assert record["timing_cache"] == "new" and timed(cache) == fake.version.encode() + b":+"
    assert make(version, path, cache=cache)[2]["timing_cache"] == "reused"
    assert timed(cache).endswith(b":++")
    for foreign in (b"7.0.0:+++", b"damaged"):
        cache.write_bytes(engine.TIMING + hashlib.sha256(foreign).hexdigest().encode() + b"\n" + foreign)
        record = make(version, path, cache=cache)[2]
        assert record["timing_cache"] == "discarded" and "of another device or version" in record["notes"][0]
        assert timed(cache) == fake.version.encode() + b":+"


def test_a_timing_cache_that_was_cut_off_never_reaches_the_library(make, tmp_path):
    cache, path = tmp_path / "a.cache", write_conv(tmp_path / "c.onnx")
    make("8.6", path, cache=cache)
    whole = cache.read_bytes()
    for cut in (b"", whole[:10], whole[:-1], whole + b"x", b"no cache at all"):
        cache.write_bytes(cut)
        assert engine.read_timing(str(cache)) == (True, b"")
        assert make("8.6", path, cache=cache)[2]["timing_cache"] == "discarded"
    assert engine.read_timing(str(tmp_path / "none")) == (False, b"")


def test_without_a_place_there_is_no_timing_cache(make, tmp_path):
    assert make("8.6", write_conv(tmp_path / "c.onnx"))[2]["timing_cache"] == "none"


# --- progress and layers -----------------------------------------------------------------------------------------


def test_phases_inside_phases_never_run_backwards():
    phases = progress.Phases()
    shares = [phases.share()]
    phases.start("build", None, 2)
    phases.start("tactics", "build", 4)
    for step in range(4):
        phases.step("tactics", step)
        shares.append(phases.share())
    assert shares == pytest.approx([0.0, 0.1125, 0.225, 0.3375, 0.45])
    phases.finish("tactics")
    phases.step("build", 0)
    phases.start("late", "nobody", 1)
    assert phases.share() == pytest.approx(0.45)
    phases.step("build", 1)
    phases.finish("build")
    assert 0.9 <= phases.share() < 1
    phases.finish("never begun")


def test_a_phase_may_begin_while_another_thread_asks_how_far_the_build_is(monkeypatch):
    phases, asked, told = progress.Phases(), threading.Event(), threading.Event()
    for name in ("build", "again"):
        phases.start(name, None, 1)
    share = progress.Phase.share

    def slowly(phase):
        asked.set()
        told.wait(0.1)
        return share(phase)

    def begin():
        asked.wait()
        phases.start("late", "build", 1)
        told.set()

    monkeypatch.setattr(progress.Phase, "share", slowly)
    library = threading.Thread(target=begin)
    library.start()
    assert phases.share() == 0
    library.join()
    assert phases.latest == "late" and list(phases.running) == ["build", "again", "late"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_shows_life_with_or_without_a_monitor(version, make, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(progress.Beat.__init__, "__defaults__", (0.005,))
    fake = Fake(version)
    fake.refuses = lambda built: time.sleep(0.05) or ""
    make(version, write_conv(tmp_path / "c.onnx"), fake=fake, tell=events.append)
    done = [event["done"] for event in events]
    assert len(events) >= 4 and done == sorted(done) and done[0] == pytest.approx(0, abs=0.01) and done[-1] == 1
    assert all(share < 1 for share in done[:-1])
    assert all(event["event"] == "progress" and event["seconds"] >= 0 for event in events)
    assert (fake.api.__dict__.get("IProgressMonitor") is not None) == (version in STRONG)


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_are_read_in_both_spellings(version, make, tmp_path):
    record = make(version, write_conv(tmp_path / "c.onnx"))[2]
    assert [(x["name"], x["op"], x["precision"]) for x in record["layers"]] == [
        ("conv + relu", "CaskConvolution", "float16"), ("pool", "CudaPooling", ""),
    ]  # fmt: skip
    assert record["ports"] == ["input", "output"]


def test_layers_without_details_are_names():
    found = layers.read('{"Layers": ["a", "b + c"], "Bindings": ["in", "out"]}')
    assert layers.names(found["layers"]) == ["a", "b + c"] and found["ports"] == ["in", "out"]
    with pytest.raises(BoardError, match="no readable description"):
        layers.read("not json")


# --- the library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_library_that_gives_no_builder_without_a_driver_says_so(version, make, tmp_path):
    fake = Fake(version)
    fake.broken = "CUDA initialization failure with error: 35"
    with pytest.raises(BoardError) as error:
        make(version, write_conv(tmp_path / "c.onnx"), fake=fake)
    assert error.value.kind == "device" and "finds no GPU with a driver that fits" in error.value.message
    fake.broken = "something else"
    with pytest.raises(BoardError, match=r"TensorRT [\d.]+ gives no Builder: something else"):
        make(version, write_conv(tmp_path / "c.onnx"), fake=fake)


def test_a_missing_library_says_every_reason():
    def importer(name):
        raise ImportError(f"No module named '{name}'")

    with pytest.raises(BoardError) as error:
        library.load("tensorrt-rtx", importer)
    assert error.value.kind == "library"
    assert error.value.message == (
        "TensorRT for RTX is not installed here: No module named 'tensorrt_rtx'; "
        "No module named 'tensorrt_rtx_bindings'"
    )


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("[builder.cpp::build::12] Error Code 2: Internal Error (x failed. )", "x failed"),
        ("IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (no)", "no"),
        ("plain words: with a colon.", "plain words: with a colon"),
        (
            "IBuilder::build: Error Code 6: API Usage Error (Unable to load: x.so: not found In Impl at /_src/l.cpp:3)",
            "Unable to load: x.so: not found",
        ),
        (
            "IRuntime::open: Error Code 1: Cuda Runtime (In Stream at /_src/c.cpp:25 (cudaError 35: too old))",
            "cudaError 35: too old",
        ),
    ],
)  # fmt: skip
def test_codes_and_source_places_are_taken_off_a_line(line, kept):
    assert library.clean(line) == kept


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*ignored):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.os, "fsync", full)
    with pytest.raises(BoardError, match=r"cannot write 3 bytes to .*: No space left on device"):
        engine.write(str(tmp_path / "x"), b"abc")
    assert list(tmp_path.iterdir()) == []
