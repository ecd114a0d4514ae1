"""Engines built for real, by TensorRT for RTX from PyPI, on a machine that needs no GPU; none is run here.

pip install 'edge-deploy[tensorrt-rtx]'
"""

from __future__ import annotations

import hashlib
import importlib.util
import json

import numpy as np
import onnx
import pytest
from conftest import write_conv
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from test_engine import half
from test_engines import other_weights

from benchmarks import nets
from pipeline.graph.export import export
from profiles.errors import DeployError
from profiles.schema import InputSpec, TensorRTSpec, load_profile
from targets.harness import building, engines
from targets.harness.agent.board.tensorrt import job, onnxfile
from targets.runtimes.base import load_runtime
from targets.runtimes.tensorrt import TensorRT, builder_options

if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("TensorRT for RTX is not installed: pip install 'edge-deploy[tensorrt-rtx]'", allow_module_level=True)

AMPERE = TensorRTSpec(compute_capability="8.6")


class Noise(quantization.CalibrationDataReader):
    """Eight samples to calibrate with."""

    def __init__(self, shape):
        rng = np.random.default_rng(0)
        self.samples = iter([{"input": rng.standard_normal(shape).astype(np.float32)} for _ in range(8)])

    def get_next(self):
        return next(self.samples, None)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """ResNet-20, MobileNetV1, the former quantised symmetrically and not, and float16 beside float32, as ONNX files."""
    folder, found = tmp_path_factory.mktemp("nets"), {}
    for name, model, size in (("resnet20", nets.resnet20(), 32), ("mobilenetv1", nets.mobilenetv1(), 96)):
        found[name] = export(model, [InputSpec(shape=(1, 3, size, size))], folder / f"{name}.onnx")
    for name, symmetric in (("int8", True), ("asymmetric", False)):
        found[name] = folder / f"{name}.onnx"
        quantization.quantize_static(
            found["resnet20"], found[name], Noise((1, 3, 32, 32)), quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": False},
        )  # fmt: skip
    found["float16"] = half(folder / "float16.onnx")
    return found


@pytest.fixture
def rtx(tmp_path):
    """The runtime for an RTX 30 card, with a state folder of its own."""
    return TensorRT("tensorrt-rtx", AMPERE, tmp_path / ".deploy")


def test_the_plug_in_tells_the_version_of_the_library_that_is_loaded():
    runtime = load_runtime("tensorrt-rtx")
    assert runtime.name == "tensorrt-rtx" and runtime.suffix == ".plan"
    version = tuple(int(part) for part in runtime.version().split("."))
    assert len(version) == 3 and version >= (1, 0, 0)


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv1", "int8", "float16"])
def test_an_engine_is_built_for_a_card_that_is_not_here(name, exported, rtx, tmp_path):
    shares = []
    built = rtx.built(exported[name], tmp_path / "e.plan", shares.append)
    assert not built.reused and (tmp_path / "e.plan").read_bytes() == built.plan.read_bytes()
    assert built.record["bytes"] == (tmp_path / "e.plan").stat().st_size > exported[name].stat().st_size // 4
    assert built.record["way"] == "strong typing" and built.record["flags"] == ["TF32"]
    assert shares[0] < 0.1 and shares[-1] == 1.0 and shares == sorted(shares)
    facts = onnxfile.read(str(exported[name]))
    assert facts.quantized == (name == "int8") and ("float16" in facts.elements) == (name == "float16")


def test_a_known_engine_is_not_built_again(exported, rtx, tmp_path, monkeypatch):
    first = rtx.built(exported["resnet20"], tmp_path / "a.plan")
    monkeypatch.setattr(building.Here, "build", None)
    again = rtx.built(exported["resnet20"], tmp_path / "b.plan")
    assert again.reused and again.key == first.key and again.record == first.record
    assert again.record["sha256"] == hashlib.sha256((tmp_path / "b.plan").read_bytes()).hexdigest()


def test_two_networks_of_one_structure_get_two_engines(rtx, tmp_path):
    first = write_conv(tmp_path / "a.onnx")
    second = other_weights(first, tmp_path / "b.onnx")
    one, two = rtx.built(first, tmp_path / "a.plan"), rtx.built(second, tmp_path / "b.plan")
    assert one.key != two.key and not two.reused
    assert one.plan.read_bytes() != two.plan.read_bytes()


def test_a_key_is_the_same_in_another_process_and_another_folder(rtx, tmp_path):
    (tmp_path / "other").mkdir()
    built = rtx.built(write_conv(tmp_path / "a.onnx"), tmp_path / "a.plan")
    here = building.facts("tensorrt-rtx")["library"]
    moved = write_conv(tmp_path / "other" / "renamed.onnx")
    assert built.key == engines.engine_key(moved, builder_options(AMPERE), here, {"capability": "8.6"})


def test_what_was_timed_is_kept_and_taken_up_again(rtx, tmp_path):
    first = rtx.built(write_conv(tmp_path / "a.onnx"), tmp_path / "a.plan")
    (cache,) = (tmp_path / ".deploy" / "timing").iterdir()
    assert first.record["timing_cache"] == "new" and cache.stat().st_size > 0
    second = rtx.built(write_conv(tmp_path / "b.onnx", channels=8), tmp_path / "b.plan")
    assert second.record["timing_cache"] == "reused"
    cache.write_bytes(b"not a timing cache")
    third = rtx.built(write_conv(tmp_path / "c.onnx", channels=4), tmp_path / "c.plan")
    assert third.record["timing_cache"] == "discarded" and "damaged" in third.record["notes"][0]
    assert cache.read_bytes() != b"not a timing cache"


def test_a_free_batch_is_built_for_one_sample(rtx, tmp_path):
    assert rtx.build(write_conv(tmp_path / "n.onnx", batch="N"), tmp_path / "n.plan", (), 1).stat().st_size > 1000


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(rtx, path, tmp_path):
    with pytest.raises(DeployError) as error:
        rtx.build(path, tmp_path / "e.plan", (), 1)
    assert error.value.exit_code == 1 and "\n" not in error.value.message and error.value.hint
    assert not (tmp_path / "e.plan").exists()
    left = [p for p in (tmp_path / ".deploy").rglob("*") if p.is_file()]
    assert left == []
    return error.value


def test_an_asymmetric_quantisation_names_its_node_and_what_mends_it(exported, rtx, tmp_path):
    error = refused(rtx, exported["asymmetric"], tmp_path)
    first = next(n for n in onnx.load(exported["asymmetric"]).graph.node if n.op_type == "QuantizeLinear")
    assert error.message.startswith(f"TensorRT for RTX {rtx.version()} does not take the node '")
    assert first.op_type in error.message and "zero point" in error.message.lower()
    assert any(f"'{n.name}'" in error.message for n in onnx.load(exported["asymmetric"]).graph.node)
    assert "zero points of 0" in error.hint and "ActivationSymmetric" in error.hint


def test_a_quantisation_in_the_other_format_is_told_to_change_it(exported, rtx, tmp_path):
    path = tmp_path / "q.onnx"
    quantization.quantize_static(
        exported["resnet20"], path, Noise((1, 3, 32, 32)), quant_format=quantization.QuantFormat.QOperator,
        activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )  # fmt: skip
    error = refused(rtx, path, tmp_path)
    assert "(QLinearConv): it has no operator QLinearConv (and" in error.message
    assert "QuantFormat.QDQ" in error.hint


def one_node(path, op, inputs=("relu",), weights=(), domain=""):
    nodes = [
        helper.make_node("Relu", ["input"], ["relu"], name="first"),
        helper.make_node(op, list(inputs), ["output"], name="second", domain=domain),
    ]
    ports = (
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, None),
    )
    graph = helper.make_graph(nodes, "g", [ports[0]], [ports[1]], [numpy_helper.from_array(a, n) for n, a in weights])
    domains = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), path)
    return path


@pytest.mark.parametrize(("op", "domain"), [("Det", ""), ("Twist", "my.operators")])
def test_an_operator_that_is_not_there_is_named_with_its_node(op, domain, rtx, tmp_path):
    error = refused(rtx, one_node(tmp_path / "m.onnx", op, domain=domain), tmp_path)
    title = f"TensorRT for RTX {rtx.version()}"
    assert error.message == f"{title} does not take the node 'second' ({op}): it has no operator {op}."
    assert error.hint == 'leave this operator out of the network, or run it elsewhere: runtime = "ort".'


def test_an_operator_that_a_pass_removes_names_the_pass(rtx, tmp_path):
    weights = (("ratio", np.array(0.5, np.float32)), ("train", np.array(True)))
    error = refused(rtx, one_node(tmp_path / "m.onnx", "Dropout", ("relu", "ratio", "train"), weights), tmp_path)
    assert "does not take the node 'second' (Dropout): TensorRT does not support the Dropout" in error.message
    assert error.hint.startswith("the pass drop-dropout removes it: --set 'graph.passes=")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"compute_capability": "8.7"}, r"builds for the compute capabilities 7\.5, 8\.0, .*, not for 8\.7"),
        ({"dla_core": 0}, r"the DLA core 0 was asked for, TensorRT for RTX [\d.]+ finds 0 here"),
    ],
)
def test_what_the_library_does_not_offer_is_said_with_what_it_does(keys, told, tmp_path):
    runtime = TensorRT("tensorrt-rtx", TensorRTSpec(**keys), tmp_path / ".deploy")
    with pytest.raises(DeployError, match=told):
        runtime.build(write_conv(tmp_path / "a.onnx"), tmp_path / "a.plan", (), 1)


def test_another_kind_of_file_is_refused(rtx, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no network")
    assert "is no ONNX file" in refused(rtx, tmp_path / "x.onnx", tmp_path).message
    with pytest.raises(DeployError, match=r"there is no file '.*none\.onnx'"):
        rtx.build(tmp_path / "none.onnx", tmp_path / "e.plan", (), 1)


# --- running -----------------------------------------------------------------------------------------------------


def test_an_engine_is_not_run_where_there_is_no_driver_and_that_is_one_sentence(tmp_path):
    if "none" not in job.gpu_facts():
        pytest.skip("there is a GPU here")
    runtime = TensorRT("tensorrt-rtx", TensorRTSpec(), tmp_path / ".deploy")
    record = runtime.built(write_conv(tmp_path / "a.onnx"), tmp_path / "a.plan").record
    assert record["layers"] == [] and "its layers are not listed: no engine can run here" in record["notes"][0]
    with pytest.raises(DeployError) as error:
        runtime.open(tmp_path / "a.plan", (), 1)
    assert "\n" not in error.value.message and error.value.message.count(". ") == 0
    assert "cudaError" in error.value.message or "libcudart" in error.value.message


def test_a_profile_sets_how_engines_are_built_and_run(tmp_path):
    profile = load_profile("local", {"tensorrt": {"compute_capability": "8.9", "tf32": False, "cuda_graph": True}})
    fitted = load_runtime("tensorrt-rtx").fitted(profile, tmp_path / ".deploy")
    assert isinstance(fitted, TensorRT) and fitted.spec.cuda_graph
    built = fitted.built(write_conv(tmp_path / "a.onnx"), tmp_path / "a.plan")
    assert built.record["flags"] == [] and built.record["options"]["compute_capability"] == "8.9"
    kept = json.loads((tmp_path / ".deploy" / "engines" / built.key / "record.json").read_text(encoding="utf-8"))
    assert kept["sha256"] == hashlib.sha256((tmp_path / "a.plan").read_bytes()).hexdigest()
    assert kept["library"]["version"] == fitted.version() and len(kept["library"]["build"]) == 64
