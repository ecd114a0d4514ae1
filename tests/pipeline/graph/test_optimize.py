import json
import sys

import onnx
import pytest
from graph_samples import Mobile, ResNet, graph, node, norm, ops, shaken, weights
from torch import fx

from pipeline.graph import optimize as module
from pipeline.graph.absorbed import absorbed
from pipeline.graph.export import export
from pipeline.graph.optimize import optimize, optimize_model
from pipeline.graph.verify import compare_outputs, seeded_inputs
from profiles.errors import DeployError, UsageError
from profiles.schema import GraphSpec, InputSpec

PASSES = GraphSpec().passes
BN = "bn.weight bn.bias bn.running_mean bn.running_var"


@pytest.mark.parametrize(
    ("net", "left"),
    [(ResNet(), {"Conv", "Relu", "Add"}), (Mobile(), {"Conv", "Relu", "Gemm"})],
    ids=["resnet", "mobile"],
)
def test_the_default_passes_leave_only_what_computes(net, left, tmp_path):
    dense = export(fx.symbolic_trace(shaken(net)), [InputSpec(shape=(1, 3, 16, 16))], tmp_path / "a.onnx")
    log = optimize(dense, PASSES, tmp_path / "b.onnx")
    after = onnx.load(str(tmp_path / "b.onnx"))
    assert left <= set(ops(after))
    assert not {"BatchNormalization", "Identity", "Dropout", "Constant", "Shape", "Pad", "Slice"} & set(ops(after))
    assert log.nodes_after == len(after.graph.node) < log.nodes_before
    assert 0 < log.max_rel < 1e-5
    assert compare_outputs(dense, tmp_path / "b.onnx", seeded_inputs(after, 7)).max_rel < 1e-5


def test_the_log_is_json_and_ends_with_a_turn_that_changed_nothing(tmp_path):
    dense = export(fx.symbolic_trace(ResNet()), [InputSpec(shape=(1, 3, 16, 16))], tmp_path / "a.onnx")
    log = optimize(dense, PASSES, tmp_path / "b.onnx")
    table = json.loads(log.to_json())
    assert table["passes"] == list(PASSES)
    last = max(step["turn"] for step in table["steps"])
    assert [step["name"] for step in table["steps"] if step["turn"] == last] == list(PASSES)
    assert not any(step["changed"] for step in table["steps"] if step["turn"] == last)
    assert all((step["max_rel"] is None) == (step["changed"] == 0) for step in table["steps"])


def test_parameters_that_went_into_others_are_noted():
    model = graph(
        [node("Conv", "x c.weight", "c"), node("BatchNormalization", f"c {BN}", "y")],
        (1, 2, 3, 3),
        (1, 2, 3, 3),
        {"c.weight": (2, 2, 1, 1)} | norm("bn", 2),
    )
    result, _ = optimize_model(model, PASSES)
    assert absorbed(result) == {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    assert set(weights(result)) == {"c.weight", "c.bias"}


def test_the_version_of_the_model_stays():
    model = graph([node("Identity", "x", "a"), node("Relu", "a", "y")], (1, 2), (1, 2))
    result, _ = optimize_model(model, PASSES)
    assert (result.ir_version, result.opset_import[0].version) == (8, 17)


def test_no_passes_leave_the_model_as_it_is():
    model = graph([node("Identity", "x", "a"), node("Relu", "a", "y")], (1, 2), (1, 2))
    result, log = optimize_model(model, ())
    assert ops(result) == ["Identity", "Relu"] and log.steps == ()


def test_an_unknown_pass_names_its_near_miss():
    model = graph([node("Relu", "x", "y")], (1, 2), (1, 2))
    with pytest.raises(UsageError) as error:
        optimize_model(model, ("fold-batchnorms",))
    assert str(error.value) == "no pass named 'fold-batchnorms'. Did you mean 'fold-batchnorm'?\ndeploy list passes"


@pytest.fixture
def own_passes(tmp_path, monkeypatch):
    """A package of passes of which one is wrong and one never settles."""
    folder = tmp_path / "own_passes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    head = "from pipeline.graph.passes.base import PassResult\n\n\ndef rewrite(graph):\n"
    (folder / "drop_identity.py").write_text("from pipeline.graph.passes.drop_identity import rewrite\n")
    (folder / "negate.py").write_text(f"{head}    graph.nodes[-1].op = 'Neg'\n    return PassResult(1)\n")
    (folder / "restless.py").write_text(f"{head}    return PassResult(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "PACKAGE", "own_passes")
    yield
    for name in [name for name in sys.modules if name.startswith("own_passes")]:
        del sys.modules[name]


def test_a_pass_that_changes_the_numbers_is_named_with_those_before_it(own_passes):
    model = graph([node("Identity", "x", "a"), node("Relu", "a", "y")], (1, 2), (1, 2))
    with pytest.raises(DeployError) as error:
        optimize_model(model, ("drop-identity", "negate"))
    assert error.value.message.startswith("the graph pass 'negate' failed: outputs differ by ")
    assert error.value.hint == "changed before it: drop-identity. Take it out of graph.passes to go on without it."


def test_passes_that_never_settle_are_named(own_passes):
    model = graph([node("Relu", "x", "y")], (1, 2), (1, 2))
    with pytest.raises(DeployError) as error:
        optimize_model(model, ("restless",))
    assert error.value.message == "the graph passes have not settled after 10 turns; still changing: restless."
