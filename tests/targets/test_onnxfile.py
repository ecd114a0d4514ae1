"""The reader of ONNX files for boards without the onnx package, against the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import write_conv
from onnx import TensorProto, helper, numpy_helper

from targets.harness.agent.board.tensorrt import onnxfile
from targets.harness.agent.board.tensorrt.errors import BoardError


def mixed(path, batch="N", external=False):
    """Cast -> Conv in float16, a constant of int64, weights beside the file where asked for."""
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float16), "w")
    constant = numpy_helper.from_array(np.ones(2, np.int64))
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], name="to half", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "w"], ["output"], name="conv"),
        helper.make_node("Constant", [], ["unread"], value=constant),
    ]
    ports = (
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT16, [batch, 4, 8, 8]),
    )
    graph = helper.make_graph(nodes, "g", [ports[0]], [ports[1]], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def test_it_reads_what_the_onnx_package_wrote(tmp_path):
    found = onnxfile.read(str(mixed(tmp_path / "m.onnx")))
    assert found.opset == 17 and not found.quantized and found.external == []
    assert [(n.name, n.op) for n in found.nodes] == [("to half", "Cast"), ("conv", "Conv"), ("", "Constant")]
    assert found.inputs == [onnxfile.Input("input", "float32", (None, 3, 8, 8))]
    assert found.elements == {"float32", "float16", "int64"}
    assert found.label(1) == "'conv' (Conv)" and found.label(2) == "'unread' (Constant)"
    assert found.label(3) == found.label(-1) == ""


def test_initializers_are_no_inputs_and_do_not_hide_one(tmp_path):
    path = write_conv(tmp_path / "c.onnx")
    model = onnx.load(path)
    listed = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(listed.name, TensorProto.FLOAT, listed.dims))
    onnx.save(model, path)
    assert [port.name for port in onnxfile.read(str(path)).inputs] == ["input"]


def test_files_with_weights_are_named(tmp_path):
    assert onnxfile.read(str(mixed(tmp_path / "m.onnx", external=True))).external == ["weights.bin"]


@pytest.mark.parametrize("data", [b"", b"hello world", b"\x3a\xff\xff\xff\xff\x0f", b"\x08\x09", bytes(64)])
def test_what_is_no_onnx_file_is_one_sentence(tmp_path, data):
    path = tmp_path / "x.onnx"
    path.write_bytes(data)
    with pytest.raises(BoardError) as error:
        onnxfile.read(str(path))
    assert error.value.kind == "model" and str(path) in error.value.message


def test_a_file_cut_anywhere_is_refused_or_read_but_never_crashes(tmp_path):
    whole = mixed(tmp_path / "m.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    refused = 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            onnxfile.read(str(path))
        except BoardError:
            refused += 1
    assert refused > len(whole) * 0.9


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(BoardError, match="cannot be read: No such file"):
        onnxfile.read(str(tmp_path / "none.onnx"))


def test_weights_inside_a_branch_are_seen_with_their_type_and_file(tmp_path):
    tensor = numpy_helper.from_array(np.ones(3, np.float16), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="branch.bin")
    made = helper.make_tensor_value_info("made", TensorProto.FLOAT16, [3])
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["made"])], "branch", [], [made], [tensor])
    node = helper.make_node("If", ["input"], ["output"], then_branch=branch, else_branch=branch)
    ports = [
        helper.make_tensor_value_info("input", TensorProto.BOOL, []),
        helper.make_tensor_value_info("output", TensorProto.FLOAT16, [3]),
    ]
    model = helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:]), ir_version=9)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    read = onnxfile.read(str(tmp_path / "a.onnx"))
    assert read.external == ["branch.bin"] and "float16" in read.elements
