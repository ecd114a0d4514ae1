from graph_samples import graph, node, ops, run_pass, weights


def test_nodes_and_initializers_that_no_output_needs_go():
    nodes = [node("Relu", "x", "y"), node("Conv", "x dead.weight", "d"), node("Neg", "d", "e")]
    result, step = run_pass(
        graph(nodes, (1, 2, 4, 4), (1, 2, 4, 4), {"dead.weight": (2, 2, 1, 1), "lost": (3,)}), "dead-ends"
    )
    assert ops(result) == ["Relu"] and not weights(result)
    assert step.changed >= 3


def test_an_input_that_nothing_reads_stays():
    from onnx import TensorProto, helper

    model = graph([node("Relu", "x", "y")], (1, 2), (1, 2))
    model.graph.input.append(helper.make_tensor_value_info("unread", TensorProto.FLOAT, [1]))
    result, step = run_pass(model, "dead-ends")
    assert [info.name for info in result.graph.input] == ["x", "unread"]
    assert step.changed == 0
