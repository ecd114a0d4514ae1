import numpy as np
from graph_samples import graph, integers, node, ops, run_pass


def test_nodes_that_hand_on_their_input_go():
    model = graph(
        [
            node("Identity", "x", "a"),
            node("Cast", "a", "b", to=1),
            node("Transpose", "b", "c", perm=[0, 1, 2, 3]),
            node("Slice", "c /zero /end /axis", "d"),
            node("Pad", "d /pads", "e"),
            node("Concat", "e", "f", axis=1),
            node("Reshape", "f /shape", "g"),
            node("Relu", "g", "y"),
        ],
        (1, 2, 3, 3),
        (1, 2, 3, 3),
        {
            "/zero": integers(0),
            "/end": integers(9),
            "/axis": integers(2),
            "/pads": integers(*[0] * 8),
            "/shape": integers(1, 2, 3, 3),
        },
    )
    result, step = run_pass(model, "drop-identity")
    assert ops(result) == ["Relu"]
    assert step.changed == 7


def test_an_output_keeps_its_name_when_the_identity_before_it_goes():
    model = graph(
        [node("Relu", "x", "a"), node("Identity", "a", "y"), node("Neg", "a", "z")],
        (1, 2),
        (1, 2),
        outputs={"z": (1, 2)},
    )
    result, _ = run_pass(model, "drop-identity")
    assert ops(result) == ["Relu", "Neg"]
    assert [info.name for info in result.graph.output] == ["y", "z"]


def test_a_relu_of_a_relu_is_one_relu():
    result, step = run_pass(graph([node("Relu", "x", "a"), node("Relu", "a", "y")], (1, 2), (1, 2)), "drop-identity")
    assert ops(result) == ["Relu"] and step.changed == 1


def test_a_clip_of_another_clip_stays():
    limits = {"/zero": np.float32(0), "/six": np.float32(6), "/one": np.float32(1)}
    model = graph([node("Clip", "x /zero /six", "a"), node("Clip", "a /zero /one", "y")], (1, 2), (1, 2), limits)
    result, step = run_pass(model, "drop-identity")
    assert ops(result) == ["Clip", "Clip"] and step.changed == 0


def test_an_identity_from_input_to_output_is_refused_with_the_reason():
    result, step = run_pass(graph([node("Identity", "x", "y")], (1, 2), (1, 2)), "drop-identity")
    assert ops(result) == ["Identity"]
    assert step.refused[0].reason == "it joins an input, a constant or another output of the graph to an output"


def test_what_changes_its_input_stays():
    model = graph(
        [node("Slice", "x /zero /end /axis /step", "a"), node("Transpose", "a", "y", perm=[1, 0])],
        (2, 4),
        (4, 2),
        {"/zero": integers(-1), "/end": integers(-9), "/axis": integers(1), "/step": integers(-1)},
    )
    result, step = run_pass(model, "drop-identity")
    assert ops(result) == ["Slice", "Transpose"] and step.changed == 0
