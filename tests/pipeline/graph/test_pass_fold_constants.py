import numpy as np
from graph_samples import graph, integers, node, ops, run_pass, weights
from onnx import numpy_helper


def test_shape_arithmetic_becomes_an_initializer():
    model = graph(
        [
            node("Shape", "x", "shape"),
            node("Slice", "shape /start /end /axis", "head"),
            node("Constant", "", "pixels", value=numpy_helper.from_array(integers(1, 4))),
            node("Mul", "head pixels", "flat"),
            node("Reshape", "x flat", "y"),
        ],
        (1, 4, 2, 2),
        (1, 16),
        {"/start": integers(0), "/end": integers(2), "/axis": integers(0)},
    )
    result, step = run_pass(model, "fold-constants")
    assert ops(result) == ["Reshape"]
    assert step.changed == 4 and not step.refused
    assert weights(result)["flat"].tolist() == [1, 16]


def test_a_chain_that_ends_in_an_operator_is_folded_whole():
    model = graph(
        [node("Shape", "x", "shape"), node("ConstantOfShape", "shape", "zeros"), node("Add", "x zeros", "y")],
        (1, 4),
        (1, 4),
    )
    result, step = run_pass(model, "fold-constants")
    assert ops(result) == ["Add"]
    assert step.changed == 2
    assert np.array_equal(weights(result)["zeros"], np.zeros((1, 4), np.float32))


def test_an_expression_of_a_parameter_is_refused():
    model = graph(
        [node("Transpose", "fc.weight", "t", perm=[1, 0]), node("MatMul", "x t", "y")],
        (2, 4),
        (2, 3),
        {"fc.weight": (3, 4)},
    )
    result, step = run_pass(model, "fold-constants")
    assert ops(result) == ["Transpose", "MatMul"]
    assert step.changed == 0
    assert step.refused[0].reason == "it reads the parameter 'fc.weight'"


def test_a_result_too_large_to_store_is_refused():
    model = graph(
        [node("Expand", "/one /size", "big"), node("ReduceSum", "big", "sum", keepdims=0), node("Add", "x sum", "y")],
        (1, 4),
        (1, 4),
        {"/one": np.ones(1, np.float32), "/size": integers(1 << 21)},
    )
    result, step = run_pass(model, "fold-constants")
    assert ops(result) == ["Expand", "ReduceSum", "Add"]
    assert step.refused[0].reason == "its result has more than 1048576 elements"
