import numpy as np
import onnx
import pytest
from graph_samples import graph, node
from onnx import TensorProto, helper

from pipeline.graph.verify import check_model, compare_outputs, open_session, seeded_inputs
from profiles.errors import DeployError

RELU = graph([node("Relu", "x", "y")], (1, 4), (1, 4))
FEED = [{"x": np.array([[-1.0, 0.0, 2.0, 4.0]], dtype=np.float32)}]


def test_equal_models_do_not_differ():
    gap = compare_outputs(RELU, RELU, FEED)
    assert (gap.max_abs, gap.max_rel) == (0.0, 0.0)
    assert gap.cosine == pytest.approx(1.0)


def test_differences_are_absolute_and_relative_to_the_largest_value(tmp_path):
    onnx.save(RELU, str(tmp_path / "relu.onnx"))
    gap = compare_outputs(lambda x: np.abs(x), tmp_path / "relu.onnx", FEED)
    assert gap.max_abs == 1.0
    assert gap.max_rel == 0.25
    assert gap.cosine == pytest.approx(20 / np.sqrt(21 * 20))


def test_the_worst_input_counts():
    feeds = [FEED[0], {"x": np.array([[-3.0, 0.0, 0.0, 4.0]], dtype=np.float32)}]
    assert compare_outputs(np.abs, RELU, feeds).max_abs == 3.0


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (lambda x: (x, x), "the model has 1 outputs where 2 were expected."),
        (lambda x: x[0], "an output has shape [1, 4] where [4] was expected."),
        (lambda x: x * np.nan, "an output holds values that are not finite."),
    ],
    ids=["count", "shape", "nan"],
)
def test_outputs_that_cannot_be_compared_say_why(reference, text):
    with pytest.raises(DeployError) as error:
        compare_outputs(reference, RELU, FEED)
    assert error.value.message == text


def test_seeded_inputs_are_the_same_for_the_same_seed():
    first, again, other = (seeded_inputs(RELU, seed)[0]["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_an_open_axis_is_an_error_with_the_name():
    model = graph([node("Relu", "x", "y")], ("n", 4), ("n", 4))
    with pytest.raises(DeployError) as error:
        seeded_inputs(model)
    assert str(error.value) == "the input 'x' has no fixed size on every axis: [0, 4].\nexport with a fixed batch."


def test_a_model_with_wrong_shapes_is_not_valid():
    model = graph([node("MatMul", "x w", "y")], (1, 4), (1, 3), {"w": (5, 3)})
    with pytest.raises(DeployError, match=r"^the model is not valid ONNX: "):
        check_model(model)


def test_what_the_runtime_refuses_is_told_in_its_words():
    made = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(DeployError, match=r"^ONNX Runtime refuses the model: .*NoSuchOperator"):
        open_session(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
