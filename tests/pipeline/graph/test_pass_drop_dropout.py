import numpy as np
from graph_samples import graph, imported, node, ops, run_pass

from pipeline.graph.passes import drop_dropout

RATIO = {"/half": np.float32(0.5)}


def test_dropout_goes_when_not_training():
    model = graph([node("Dropout", "x /half", "a"), node("Relu", "a", "y")], (1, 4), (1, 4), RATIO)
    result, step = run_pass(model, "drop-dropout")
    assert ops(result) == ["Relu"] and step.changed == 1


def test_dropout_that_trains_is_refused():
    limits = RATIO | {"/yes": np.array(True)}
    model = graph([node("Dropout", "x /half /yes", "a"), node("Relu", "a", "y")], (1, 4), (1, 4), limits)
    result = drop_dropout.rewrite(imported(model))
    assert result.changed == 0
    assert result.refused[0].reason == "its training_mode is true"


def test_dropout_whose_mask_is_read_is_refused():
    nodes = [node("Dropout", "x /half", "a mask"), node("Cast", "mask", "m", to=1), node("Add", "a m", "y")]
    result, step = run_pass(graph(nodes, (1, 4), (1, 4), RATIO), "drop-dropout")
    assert ops(result) == ["Dropout", "Cast", "Add"]
    assert step.refused[0].reason == "its mask is read"
