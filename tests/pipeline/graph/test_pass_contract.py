import onnx
import pytest
import torch
from graph_samples import Mixed, Mobile, ResNet, imported, shaken

from pipeline.graph.export import export
from pipeline.graph.optimize import PACKAGE, optimize_model
from pipeline.graph.passes.base import PassResult
from pipeline.graph.verify import check_model, compare_outputs, seeded_inputs
from pipeline.prune.capture import capture
from profiles import plugins
from profiles.schema import GraphSpec, InputSpec

NAMES = plugins.names(PACKAGE)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    found = []
    for net in (ResNet(), Mobile(), Mixed()):
        graph = capture(shaken(net), (torch.randn(1, 3, 16, 16),)).graph
        path = export(graph, [InputSpec(shape=(1, 3, 16, 16))], folder / f"{type(net).__name__}.onnx")
        found.append(onnx.load(str(path)))
    return found


def test_every_default_pass_is_a_file():
    assert set(GraphSpec().passes) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_says_what_it_is_for_and_returns_a_result(name, models):
    assert plugins.summary(PACKAGE, name)
    result = plugins.load(PACKAGE, name).rewrite(imported(models[0]))
    assert isinstance(result, PassResult)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_alone_settles_and_keeps_numbers_names_and_validity(name, models):
    for model in models:
        result, log = optimize_model(model, (name,))
        check_model(result)
        assert log.steps[-1].changed == 0
        assert compare_outputs(model, result, seeded_inputs(model, 5)).max_rel < 1e-5
        assert [i.name for i in result.graph.input] == [i.name for i in model.graph.input]
        assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]


def test_the_order_of_passes_does_not_change_what_is_computed(models):
    for model in models:
        result, _ = optimize_model(model, tuple(reversed(GraphSpec().passes)))
        assert compare_outputs(model, result, seeded_inputs(model, 6)).max_rel < 1e-5
