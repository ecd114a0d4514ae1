import pytest
from graph_samples import graph, node, norm, ops, run_pass, weights

BN = "bn.weight bn.bias bn.running_mean bn.running_var"


def folded(layer, x, y, stored, channels):
    model = graph(
        [layer, node("BatchNormalization", f"c {BN}", "y", epsilon=1e-3)], x, y, stored | norm("bn", channels)
    )
    return run_pass(model, "fold-batchnorm")


def test_a_convolution_without_bias_gets_one_named_after_its_weight():
    result, step = folded(
        node("Conv", "x conv.weight", "c"), (1, 3, 5, 5), (1, 4, 3, 3), {"conv.weight": (4, 3, 3, 3)}, 4
    )
    assert ops(result) == ["Conv"] and step.changed == 1
    assert set(weights(result)) == {"conv.weight", "conv.bias"}
    assert weights(result)["conv.bias"].shape == (4,)


@pytest.mark.parametrize(
    ("layer", "x", "y", "shape"),
    [
        (node("Conv", "x w.weight w.bias", "c"), (1, 3, 5, 5), (1, 4, 5, 5), (4, 3, 1, 1)),
        (node("Conv", "x w.weight w.bias", "c", group=4), (1, 4, 5, 5), (1, 4, 5, 5), (4, 1, 1, 1)),
        (node("ConvTranspose", "x w.weight w.bias", "c", strides=[2, 2]), (1, 3, 2, 2), (1, 4, 4, 4), (3, 4, 2, 2)),
        (node("ConvTranspose", "x w.weight w.bias", "c", group=2), (1, 6, 2, 2), (1, 4, 3, 3), (6, 2, 2, 2)),
        (node("Gemm", "x w.weight w.bias", "c", transB=1), (2, 3), (2, 4), (4, 3)),
        (node("Gemm", "x w.weight w.bias", "c"), (2, 3), (2, 4), (3, 4)),
    ],
    ids=["conv", "depthwise", "transposed", "transposed-grouped", "linear", "gemm"],
)
def test_every_kind_of_layer_keeps_the_names_and_shapes_of_its_parameters(layer, x, y, shape):
    result, _ = folded(layer, x, y, {"w.weight": shape, "w.bias": (4,)}, 4)
    assert ops(result) == [layer.op_type]
    assert {name: array.shape for name, array in weights(result).items()} == {"w.weight": shape, "w.bias": (4,)}


def refused(nodes, y, stored):
    result, step = run_pass(graph(nodes, (1, 3, 5, 5), y, stored | norm("bn", 3)), "fold-batchnorm")
    assert step.changed == 0 and "BatchNormalization" in ops(result)
    return step.refused[0].reason


def test_a_norm_after_an_activation_is_refused():
    nodes = [node("Relu", "x", "c", name="/act/Relu"), node("BatchNormalization", f"c {BN}", "y")]
    assert refused(nodes, (1, 3, 5, 5), {}) == "its input is made by Relu '/act/Relu'"


def test_a_norm_of_the_input_is_refused():
    assert (
        refused([node("BatchNormalization", f"x {BN}", "y")], (1, 3, 5, 5), {}) == "its input is an input of the graph"
    )


def test_a_convolution_that_something_else_reads_is_refused():
    nodes = [
        node("Conv", "x w.weight", "c", name="/conv/Conv"),
        node("BatchNormalization", f"c {BN}", "d"),
        node("Add", "c d", "y"),
    ]
    assert refused(nodes, (1, 3, 5, 5), {"w.weight": (3, 3, 1, 1)}) == "what '/conv/Conv' makes is also read elsewhere"


def test_a_shared_weight_is_refused():
    nodes = [
        node("Conv", "x w.weight", "a"),
        node("Conv", "a w.weight", "c"),
        node("BatchNormalization", f"c {BN}", "y"),
    ]
    assert refused(nodes, (1, 3, 5, 5), {"w.weight": (3, 3, 1, 1)}) == "the weight 'w.weight' is shared by 2 nodes"


def test_a_bias_name_that_is_taken_is_refused():
    nodes = [
        node("Conv", "x w.weight", "c"),
        node("BatchNormalization", f"c {BN}", "d"),
        node("Add", "d w.bias", "y"),
    ]
    stored = {"w.weight": (3, 3, 1, 1), "w.bias": (3, 1, 1)}
    assert refused(nodes, (1, 3, 5, 5), stored) == "the name 'w.bias' is taken"
