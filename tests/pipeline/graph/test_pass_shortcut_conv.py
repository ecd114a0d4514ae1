import numpy as np
import pytest
from graph_samples import graph, integers, node, ops, run_pass, weights

RANGE = {"/start": integers(0, 0), "/end": integers(99, 99), "/axes": integers(2, 3), "/step": integers(2, 2)}
SLICE = node("Slice", "x /start /end /axes /step", "s")
PAD = node("Pad", "s /pads", "y", name="/channel_pad_0/Pad")


def test_a_strided_padded_shortcut_becomes_one_convolution():
    stored = RANGE | {"/pads": integers(0, 1, 0, 0, 0, 3, 0, 0)}
    result, step = run_pass(graph([SLICE, PAD], (1, 2, 5, 7), (1, 6, 3, 4), stored), "shortcut-conv")
    assert ops(result) == ["Conv"] and step.changed == 1
    assert result.graph.node[0].name == "/channel_pad_0/Conv"
    selection = weights(result)["/channel_pad_0/selection"][:, :, 0, 0]
    assert selection.tolist() == [[0, 0], [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]


def test_a_strided_shortcut_without_padding_becomes_one_too():
    nodes = [node("Conv", "x c.weight", "c", strides=[2, 2]), SLICE, node("Add", "c s", "y")]
    model = graph(nodes, (1, 2, 6, 6), (1, 2, 3, 3), RANGE | {"c.weight": (2, 2, 1, 1)})
    result, step = run_pass(model, "shortcut-conv")
    assert sorted(ops(result)) == ["Add", "Conv", "Conv"] and step.changed == 1


def test_a_strided_slice_that_is_no_shortcut_stays():
    nodes = [SLICE, node("Relu", "s", "y")]
    result, step = run_pass(graph(nodes, (1, 2, 6, 6), (1, 2, 3, 3), RANGE), "shortcut-conv")
    assert ops(result) == ["Slice", "Relu"] and step.changed == 0


def test_a_slice_with_an_offset_stays_before_the_convolution():
    stored = RANGE | {"/start": integers(1, 0), "/pads": integers(0, 1, 0, 0, 0, 1, 0, 0)}
    result, _ = run_pass(graph([SLICE, PAD], (1, 2, 6, 6), (1, 4, 3, 3), stored), "shortcut-conv")
    assert ops(result) == ["Slice", "Conv"]


@pytest.mark.parametrize(
    ("pads", "value", "y", "reason"),
    [
        ((0, 1, 0, 0, 0, 1, 0, 0), 2.0, (1, 4, 3, 3), "it does not add zeros"),
        ((0, 1, 1, 0, 0, 1, 0, 0), 0.0, (1, 4, 4, 3), "it does not pad the channels alone"),
    ],
    ids=["value", "spatial"],
)
def test_other_padding_is_refused(pads, value, y, reason):
    stored = RANGE | {"/pads": integers(*pads), "/value": np.float32(value)}
    model = graph([SLICE, node("Pad", "s /pads /value", "y")], (1, 2, 6, 6), y, stored)
    result, step = run_pass(model, "shortcut-conv")
    assert ops(result) == ["Slice", "Pad"]
    assert step.refused[0].reason == reason
