"""What stays float32 in half precision, and the reason that is given for it."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graph_samples import graph, integers, node, norm
from onnx import TensorProto, helper, numpy_helper

from pipeline.graph.precision.keep import LARGEST, MARGIN, ROUNDED, SMALLEST, find_kept, rounding
from pipeline.graph.precision.ranges import Range, feeds_of, find_ranges
from pipeline.graph.probe import with_shapes
from pipeline.graph.verify import check_model, seeded_inputs

LAYER = {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1)}


def kept(model, ranges=None):
    """Node name -> why it stays float32; ranges are those of seeded inputs unless given."""
    check_model(model)
    found = find_ranges(model, seeded_inputs(model, 1)) if ranges is None else ranges
    imported = gs.import_onnx(with_shapes(model))
    reasons = find_kept(imported, found)
    return {n.name: reasons[id(n)] for n in imported.nodes if id(n) in reasons}


def around(middle, weights=None, x=(1, 3, 16, 16), y=(1, 4, 16, 16)):
    """Convolution, then nodes from `a` to `b`, then a convolution."""
    nodes = [node("Conv", "x w", "a", "/first"), *middle, node("Conv", "b v", "y", "/last")]
    return graph(nodes, x, y, {**LAYER, **(weights or {})})


# --- by operator and structure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("middle", "weights", "why"),
    [
        (node("Softmax", "a", "b", axis=1), {}, "it is a softmax"),
        (node("LogSoftmax", "a", "b", axis=1), {}, "it is a softmax"),
        (node("LRN", "a", "b", size=3), {}, "it is a norm"),
        (node("LayerNormalization", "a s", "b"), {"s": (16,)}, "it is a norm"),
        (node("InstanceNormalization", "a s t", "b"), {"s": (4,), "t": (4,)}, "it is a norm"),
        (
            node("BatchNormalization", "a n.weight n.bias n.running_mean n.running_var", "b"),
            norm("n", 4),
            "it is a norm",
        ),
        (node("GlobalAveragePool", "a", "b"), {}, "it adds up 256 terms"),
        (node("ReduceMean", "a", "b", axes=[2, 3]), {}, "it adds up 256 terms"),
        (node("ReduceSum", "a axes", "b"), {"axes": integers(2, 3)}, "it adds up 256 terms"),
        (node("ReduceL2", "a", "b", axes=[2]), {}, "it adds up powers or products"),
        (node("CumSum", "a axis", "b"), {"axis": np.array(2)}, "it adds up powers or products"),
        (node("GridSample", "a g", "b"), {"g": (1, 16, 16, 2)}, "it computes positions"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_operators_that_stay_say_why(middle, weights, why):
    model = around([middle], weights)
    for axis, dim in enumerate(model.graph.output[0].type.tensor_type.shape.dim):
        dim.dim_param = f"any{axis}"
    assert kept(model) == {middle.name: why}


@pytest.mark.parametrize("size", [8, 9])
def test_a_mean_stays_from_65_terms_on(size):
    model = around([node("GlobalAveragePool", "a", "b")], x=(1, 3, size, size), y=(1, 4, 1, 1))
    assert kept(model) == ({} if size == 8 else {"/b/GlobalAveragePool": "it adds up 81 terms"})


def test_an_average_over_a_small_window_and_a_maximum_over_anything_are_halved():
    model = around(
        [node("AveragePool", "a", "p", kernel_shape=[2, 2]), node("GlobalMaxPool", "p", "b")], y=(1, 4, 1, 1)
    )
    assert kept(model) == {}


def test_a_norm_that_is_written_out_stays_whole_and_its_scale_and_shift_do_not():
    middle = [
        node("ReduceMean", "a", "mean", axes=[1]),
        node("Sub", "a mean", "d"),
        node("Mul", "d d", "square"),
        node("ReduceMean", "square", "variance", axes=[1]),
        node("Add", "variance eps", "shifted"),
        node("Sqrt", "shifted", "spread"),
        node("Div", "d spread", "n"),
        node("Mul", "n scale", "s"),
        node("Add", "s shift", "b"),
    ]
    model = around(middle, {"eps": np.float32(1e-5), "scale": (4, 1, 1), "shift": (4, 1, 1)})
    found = kept(model)
    piece, between = "it is a piece of a norm", "it lies between nodes that stay float32"
    assert found == {
        "/mean/ReduceMean": piece, "/d/Sub": piece, "/square/Mul": between, "/variance/ReduceMean": piece,
        "/shifted/Add": piece, "/spread/Sqrt": piece, "/n/Div": piece,
    }  # fmt: skip


def test_a_norm_that_multiplies_by_the_reciprocal_stays_and_a_gate_of_means_does_not():
    root = [
        node("ReduceSumSquare", "a", "square", axes=[1]),
        node("Sqrt", "square", "size"),
        node("Reciprocal", "size", "inverse"),
        node("Mul", "a inverse", "b"),
    ]
    assert set(kept(around(root))) == {"/square/ReduceSumSquare", "/size/Sqrt", "/inverse/Reciprocal", "/b/Mul"}
    gate = [node("ReduceMean", "a", "mean", axes=[1]), node("Mul", "a mean", "b")]
    assert kept(around(gate)) == {}


def test_light_nodes_between_two_that_stay_stay_and_beside_one_they_do_not():
    middle = [
        node("Softmax", "a", "s", axis=1),
        node("Mul", "s two", "m"),
        node("Relu", "m", "r"),
        node("Softmax", "r", "t", axis=1),
        node("Relu", "t", "b"),
    ]
    found = kept(around(middle, {"two": np.float32(2)}))
    between = "it lies between nodes that stay float32"
    assert {name: why for name, why in found.items() if why == between} == {"/m/Mul": between, "/r/Relu": between}
    assert "/b/Relu" not in found and "/first" not in found


def test_a_network_of_light_nodes_alone_is_halved():
    assert kept(graph([node("Relu", "x", "r"), node("Mul", "r r", "y")], (1, 4), (1, 4))) == {}


def test_what_is_quantised_is_left_alone():
    nodes = [
        node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w t z", "dw"), node("Conv", "d dw", "c"), node("Relu", "c", "r"),
        node("QuantizeLinear", "r s z", "rq"), node("DequantizeLinear", "rq s z", "rd"), node("Conv", "rd v", "e"),
        node("Relu", "e", "f"), node("Conv", "f u", "y"),
    ]  # fmt: skip
    stored = {
        "s": np.float32(0.1), "t": np.float32(0.02), "z": np.int8(0), "v": (4, 4, 1, 1), "u": (2, 4, 1, 1),
        "w": np.random.default_rng(0).integers(-100, 100, (4, 3, 1, 1)).astype(np.int8),
    }  # fmt: skip
    model = graph(nodes, (1, 3, 8, 8), (1, 2, 8, 8), stored)
    found = kept(model)
    assert set(found) == {n.name for n in nodes} - {"/f/Relu", "/y/Conv"}
    assert found.pop("/r/Relu") == "it lies between nodes that stay float32"
    assert set(found.values()) == {"it is quantised"}


def test_operators_without_a_half_form_or_unknown_to_onnx_stay():
    celu = kept(around([node("Celu", "a", "b")]))
    assert celu == {"/b/Celu": "ONNX has no Celu in half precision"}
    model = around([node("Bend", "a", "b", domain="mine")])
    model.opset_import.append(helper.make_opsetid("mine", 1))
    imported = gs.import_onnx(with_shapes(model))
    reasons = find_kept(imported, {})
    assert [reasons.get(id(n)) for n in imported.nodes] == [
        None, "the type of 'b' is not known", "the type of 'b' is not known",
    ]  # fmt: skip


def test_what_holds_a_graph_of_its_own_stays():
    def branch(name, op):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4, 16, 16))
        return helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [out])

    choice = helper.make_node(
        "If", ["c"], ["b"], name="/if", then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg")
    )
    assert kept(around([choice], {"c": np.array(True)})) == {"/if": "it holds a graph of its own"}


# --- by weights ------------------------------------------------------------------------------------------------------


def test_a_weight_beyond_the_largest_half_keeps_its_node():
    model = around([node("Add", "a far", "b")], {"far": np.float32(1e5)})
    found = kept(model, {})
    assert found == {"/b/Add": "'far' holds 1e+05, and half precision ends at 65504"}


def test_weights_that_vanish_keep_their_node_and_a_few_small_ones_among_large_do_not():
    scale = np.full((4, 1, 1), 1e-6, np.float32)
    [(name, why)] = kept(around([node("Mul", "a scale", "b")], {"scale": scale}), {}).items()
    assert name == "/b/Mul" and why == "half precision moves 'scale' by 1.33 %: its numbers lie below 6.1e-05"
    scale[0] = 1
    assert kept(around([node("Mul", "a scale", "b")], {"scale": scale}), {}) == {}


def test_rounding_is_measured_against_the_size_of_the_array():
    rng = np.random.default_rng(0)
    for size in 10.0 ** np.arange(-3, 4):
        assert 0 < rounding((size * rng.standard_normal(1000)).astype(np.float32)) < 2.0**-11
    assert rounding((1e-6 * rng.standard_normal(1000)).astype(np.float32)) > ROUNDED
    assert rounding(np.zeros(3, np.float32)) == 0
    assert rounding(np.full(3, 1e-9, np.float32)) == 1


# --- by samples ------------------------------------------------------------------------------------------------------


def test_a_tensor_near_the_largest_half_keeps_all_that_touches_it():
    model = around([node("Mul", "a big", "m"), node("Relu", "m", "r"), node("Mul", "r small", "b")],
                   {"big": np.float32(2e4), "small": np.float32(1e-4)})  # fmt: skip
    found = kept(model)
    assert set(found) == {"/m/Mul", "/r/Relu", "/b/Mul"}
    assert found["/m/Mul"].startswith("its result reaches ") and f"within 4x of {LARGEST:.0f}" in found["/m/Mul"]
    assert found["/b/Mul"].startswith("it reads 'r', which reaches ")


@pytest.mark.parametrize(("peak", "stays"), [(0.99 * LARGEST / MARGIN, False), (1.01 * LARGEST / MARGIN, True)])
def test_the_margin_is_a_factor_below_the_largest_half(peak, stays):
    model = around([node("Relu", "a", "b")])
    assert ("/b/Relu" in kept(model, {"b": Range(peak, 1.0)})) is stays


@pytest.mark.parametrize("peak", [np.inf, np.nan])
def test_what_is_not_finite_in_float32_stays(peak):
    found = kept(around([node("Relu", "a", "b")]), {"b": Range(peak, 1.0)})
    assert found["/b/Relu"] == "its result is not finite on the samples"


@pytest.mark.parametrize(("rms", "stays"), [(1.01 * SMALLEST, False), (0.99 * SMALLEST, True), (0.0, False)])
def test_a_tensor_below_the_normal_halves_stays_unless_it_is_zero(rms, stays):
    assert ("/b/Relu" in kept(around([node("Relu", "a", "b")]), {"b": Range(rms, rms)})) is stays


def test_readers_of_one_parameter_are_all_kept_or_all_halved():
    nodes = [node("Conv", "x p.weight", "a", "/one"), node("Softmax", "a", "s", axis=1), node("Mul", "s big", "l"),
             node("Conv", "l p.weight", "y", "/two")]  # fmt: skip
    stored = {"p.weight": (3, 3, 1, 1), "big": np.float32(1e5)}
    model = graph(nodes, (1, 3, 4, 4), (1, 3, 4, 4), stored)
    found = kept(model)
    assert found["/one"] == "it shares 'p.weight' with '/two', which stays float32"
    stored["big"] = np.float32(1)
    assert set(kept(graph(nodes, (1, 3, 4, 4), (1, 3, 4, 4), stored))) == {"/s/Softmax"}


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_tensors_on_all_samples():
    model = graph([node("Relu", "x", "r"), node("MatMul", "r w", "y")], (2, 3), (2, 2), {"w": (3, 2)})
    x = np.array([[1, -2, 3], [4, -5, 6], [-70, 0.5, 0]], np.float32)
    feeds = feeds_of(model, [x])
    assert [feed["x"].tolist() for feed in feeds] == [x[:2].tolist(), [x[2].tolist()] * 2]
    found = find_ranges(model, feeds)
    assert found["x"].peak == 70 and found["r"].peak == 6
    both = np.concatenate([x, x[2:]])
    assert found["x"].rms == pytest.approx(np.sqrt(np.mean(both**2)))
    w = numpy_helper.to_array(model.graph.initializer[0])
    assert found["y"].peak == pytest.approx(np.abs(np.maximum(both, 0) @ w).max(), rel=1e-6)
    assert set(found) == {"x", "r", "y"}, "integers and weights have none"


def test_without_samples_there_are_no_ranges():
    model = graph([node("Relu", "x", "y")], (1, 3), (1, 3))
    assert find_ranges(model, []) == {}
