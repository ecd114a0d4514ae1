import numpy as np
import onnx
import pytest
import torch
from graph_samples import Mobile, ResNet, shaken, weights
from torch import fx, nn

from pipeline.graph.absorbed import absorbed
from pipeline.graph.export import export
from pipeline.graph.narrow import narrow
from pipeline.graph.verify import check_model, compare_outputs, seeded_inputs
from pipeline.nouns import Cut
from profiles.errors import DeployError
from profiles.schema import InputSpec

IMAGE = [InputSpec(name="image", shape=(2, 3, 16, 16))]


def traced(net):
    return fx.symbolic_trace(net)


def exported(net, path, inputs=IMAGE, **options):
    return onnx.load(str(export(net, inputs, path / "net.onnx", **options)))


def test_every_parameter_is_an_initializer_of_its_own_name_and_value(tmp_path):
    net = traced(ResNet().eval())
    model = exported(net, tmp_path)
    stored = weights(model)
    state = {k: v.numpy() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert set(state) == {name for name in stored if not name.startswith("/")}
    assert all(np.array_equal(stored[name], value) for name, value in state.items())
    assert "Identity" not in {node.op_type for node in model.graph.node}


def test_the_exported_graph_computes_what_the_network_does(tmp_path):
    net = shaken(traced(Mobile()))
    model = exported(net, tmp_path)
    check_model(model)
    with torch.no_grad():
        gap = compare_outputs(lambda x: net(torch.from_numpy(x)).numpy(), model, seeded_inputs(model))
    assert gap.max_rel < 1e-5 and gap.cosine > 0.99999


def test_batch_names_and_shapes_are_fixed(tmp_path):
    model = exported(traced(ResNet()), tmp_path, opset=17)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 16, 16]
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [2, 5]
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("image", "output")
    assert model.opset_import[0].version == 17


def test_a_network_in_training_mode_is_exported_in_eval_mode_and_left_training(tmp_path):
    net = traced(Mobile())
    net.train()
    net.bn.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = exported(net, tmp_path)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert norms and all(a.i == 0 for node in norms for a in node.attribute if a.name == "training_mode")
    assert net.training and net.deep.training and not net.bn.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_two_inputs_and_two_outputs_keep_their_order(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x, ids):
            return self.a(x), ids + 1

    inputs = [InputSpec(name="x", shape=(1, 3)), InputSpec(name="ids", shape=(1, 4), dtype="int64")]
    model = exported(traced(Two()), tmp_path, inputs)
    assert [info.name for info in model.graph.output] == ["output_0", "output_1"]
    assert [d.dim_value for d in model.graph.output[1].type.tensor_type.shape.dim] == [1, 4]


def test_a_shared_parameter_is_stored_once_and_noted(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = exported(traced(Tied()), tmp_path, [InputSpec(shape=(1, 4))])
    (stored,) = (name for name in weights(model) if name.endswith(".weight"))
    assert absorbed(model) == {"a.weight", "b.weight"} - {stored}
    kept = np.array([0, 1, 2, 3])
    narrow(model, Cut({"a.weight": {0: kept}, "b.weight": {0: kept}}, {}))


def test_an_operator_without_onnx_form_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(DeployError) as error:
        exported(traced(Odd()), tmp_path)
    assert error.value.message == "the operator 'aten::special_bessel_j0' has no ONNX form in opset 17."
    assert not list(tmp_path.iterdir())


class Spare(nn.Module):
    """Holds a parameter that it never uses."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.conv(x)


def test_a_parameter_that_is_not_in_the_graph_is_named(tmp_path):
    with pytest.raises(DeployError) as error:
        exported(Spare(), tmp_path, [InputSpec(shape=(1, 4, 3))])
    assert error.value.message == "the parameter 'spare' has no initializer in the exported graph."
    assert error.value.hint == "freeze its layer with prune.freeze."
    assert not list(tmp_path.iterdir())


def test_a_captured_network_needs_only_the_parameters_that_it_uses(tmp_path):
    assert set(weights(exported(traced(Spare()), tmp_path, [InputSpec(shape=(1, 4, 3))]))) == {
        "conv.weight",
        "conv.bias",
    }


def test_the_caller_can_say_which_names_matter(tmp_path):
    exported(Spare(), tmp_path, [InputSpec(shape=(1, 4, 3))], names=["conv.weight"])


def test_an_input_shape_that_the_network_refuses_is_an_error(tmp_path):
    with pytest.raises(DeployError, match=r"^the network refuses inputs of shape \[1, 5, 3\]: "):
        exported(traced(Spare()), tmp_path, [InputSpec(shape=(1, 5, 3))])
