from graph_samples import graph, integers, node, ops, run_pass


def slices(second_axis, y, extra=(), outputs=None):
    stored = {
        "/start": integers(0),
        "/end": integers(1 << 40),
        "/rows": integers(2),
        "/second": integers(second_axis),
        "/two": integers(2),
    }
    nodes = [
        node("Slice", "x /start /end /rows /two", "a", name="/first/Slice"),
        node("Slice", "a /start /end /second /two", "y"),
        *extra,
    ]
    return run_pass(graph(nodes, (1, 2, 8, 8), y, stored, outputs), "merge-slices")


def test_slices_along_different_axes_become_one():
    result, step = slices(3, (1, 2, 4, 4))
    assert ops(result) == ["Slice"] and step.changed == 1


def test_slices_of_the_same_axis_are_refused():
    result, step = slices(2, (1, 2, 2, 8))
    assert ops(result) == ["Slice", "Slice"]
    assert step.refused[0].reason == "'/first/Slice' slices the same axis"


def test_a_slice_that_something_else_reads_is_refused():
    _, step = slices(3, (1, 2, 4, 4), [node("Relu", "a", "z")], {"z": (1, 2, 4, 8)})
    assert step.refused[0].reason == "what '/first/Slice' makes is also read elsewhere"
