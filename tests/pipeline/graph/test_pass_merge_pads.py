import numpy as np
import pytest
from graph_samples import graph, integers, node, ops, run_pass


def padded(amounts, y, *, mode="constant", value=None, reader="Conv", extra=(), outputs=None):
    stored = {"/pads": integers(*amounts), "w.weight": (2, 3, 3, 3)}
    if value is not None:
        stored["/value"] = np.float32(value)
    pad = node("Pad", "x /pads" + (" /value" if value is not None else ""), "p", mode=mode)
    last = (
        node("Conv", "p w.weight", "y", name="/c/Conv", pads=[1, 0, 0, 0])
        if reader == "Conv"
        else node("MaxPool", "p", "y", name="/c/MaxPool", kernel_shape=[3, 3])
    )
    return run_pass(graph([pad, last, *extra], (1, 3, 6, 6), y, stored, outputs), "merge-pads")


def test_a_spatial_pad_adds_to_the_convolutions_own():
    result, step = padded([0, 0, 0, 1, 0, 0, 1, 2], (1, 2, 6, 7), value=0)
    assert ops(result) == ["Conv"] and step.changed == 1
    assert list(next(a.ints for a in result.graph.node[0].attribute if a.name == "pads")) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("amounts", "y", "options", "reason"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], (1, 2, 7, 6), {"mode": "reflect"}, "its mode is 'reflect'"),
        ([0, 0, 1, 1, 0, 0, 1, 1], (1, 2, 7, 6), {"value": 1}, "it does not add zeros"),
        ([0, 0, -1, 0, 0, 0, 0, 0], (1, 2, 4, 4), {}, "it crops"),
        ([0, 0, 1, 1, 0, 0, 1, 1], (1, 3, 6, 6), {"reader": "MaxPool"}, "it is read by MaxPool '/c/MaxPool'"),
    ],
    ids=["reflect", "ones", "crop", "pool"],
)
def test_a_pad_that_is_not_the_convolutions_is_refused(amounts, y, options, reason):
    result, step = padded(amounts, y, **options)
    assert ops(result)[0] == "Pad" and step.changed == 0
    assert step.refused[0].reason == reason


def test_a_pad_of_channels_is_refused():
    stored = {"/pads": integers(0, 1, 0, 0, 0, 2, 0, 0), "w.weight": (2, 6, 1, 1)}
    model = graph([node("Pad", "x /pads", "p"), node("Conv", "p w.weight", "y")], (1, 3, 4, 4), (1, 2, 4, 4), stored)
    _, step = run_pass(model, "merge-pads")
    assert step.refused[0].reason == "it pads the batch or the channels"


def test_a_pad_that_is_read_twice_is_refused():
    result, step = padded(
        [0, 0, 1, 1, 0, 0, 1, 1],
        (1, 2, 7, 6),
        extra=[node("Relu", "p", "z", name="/r/Relu")],
        outputs={"z": (1, 3, 8, 8)},
    )
    assert ops(result).count("Pad") == 1
    assert step.refused[0].reason == "it is read by Relu '/r/Relu'"
