"""Networks in half precision: valid, of the right types, as close to float32 as rounding allows, and settled."""

import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from graph_samples import Mixed, Mobile, ResNet, graph, integers, node, ops, shaken, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow
from pipeline.graph.optimize import optimize_model
from pipeline.graph.passes.base import is_parameter
from pipeline.graph.precision.half import halve
from pipeline.graph.precision.rounding import UNIT, allowed, roundings, spelt_out
from pipeline.graph.probe import tensor_types
from pipeline.graph.verify import check_model, compare_outputs, open_session, seeded_inputs
from pipeline.nouns import DropBlock, KeepUnits, PruningPlan
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import resolve
from profiles.errors import DeployError
from profiles.schema import GraphSpec, InputSpec

SHAPE = (1, 3, 16, 16)


class Tokens(nn.Module):
    """A transformer block with heads, a norm of torch's and one that is written out."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.stem, self.norm, self.heads = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 5)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = torch.flatten(self.stem(x), 2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(n, t, c))
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.head((x + self.down(F.gelu(self.up(y)))).mean(1))


class Gated(nn.Module):
    """Channels scaled by what two small layers make of their means; upsampling; a group norm; a swish."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.last = nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.a(x)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.last(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


class Causal(nn.Module):
    """Attention that hides what comes later behind minus infinity; clamps, comparisons, activations of many kinds."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, width, 4, 4), nn.PReLU(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.place, self.head = nn.Parameter(torch.randn(1, 16, width)), nn.Linear(2 * width, 5)
        self.register_buffer("later", torch.triu(torch.ones(16, 16, dtype=torch.bool), 1))

    def forward(self, x):
        x = torch.flatten(F.hardswish(self.act(self.stem(x))), 2).transpose(1, 2) + self.place
        scores = (self.q(x) @ self.k(x).transpose(1, 2) / 4).masked_fill(self.later, -torch.inf)
        y = torch.where(x > 0, torch.softmax(scores, -1) @ self.v(x), F.elu(x)).clamp(-3, 3)
        y = F.normalize(F.leaky_relu(y) + F.softplus(y) * torch.tanh(y), dim=-1)
        return self.head(torch.cat([y.amax(1), y.mean(1)], 1))


NETS = {
    "resnet": lambda: ResNet(3),
    "mobile": Mobile,
    "mixed": Mixed,
    "tokens": Tokens,
    "gated": Gated,
    "causal": Causal,
}


def exported(net, folder, shape=SHAPE):
    """The optimised ONNX of a network with seeded weights."""
    torch.manual_seed(0)
    path = export(shaken(net()), [InputSpec(shape=shape)], folder / "net.onnx")
    return optimize_model(onnx.load(str(path)), GraphSpec().passes)[0]


@pytest.fixture(scope="module", params=list(NETS))
def net(request, tmp_path_factory):
    """A network, it in half precision, and what is told of that."""
    model = exported(NETS[request.param], tmp_path_factory.mktemp("half"))
    return model, *halve(model, seeded_inputs(model, 5, 8))


def rounded_at_every_step(model, feed):
    """Outputs where each node rounds its result to the type that it declares: numpy, with sums in float32 at least."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceEvaluator(model).run(None, dict(feed))


def gap(expected, found):
    """Largest difference relative to the largest expected value."""
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True))


# --- whole networks --------------------------------------------------------------------------------------------------


def test_a_network_in_half_is_valid_and_runs_and_its_inputs_and_outputs_are_as_before(net):
    model, half, _ = net
    check_model(half)
    assert half.graph.input == model.graph.input and half.graph.output == model.graph.output
    for feed in seeded_inputs(model, 9, 2):
        for result in open_session(half).run(None, feed):
            assert result.dtype == np.float32 and np.isfinite(result).all()


def test_outputs_are_within_the_bound_also_where_every_step_is_rounded(net):
    model, half, done = net
    assert 0 < done.max_rel < done.allowed < 0.05
    feed = seeded_inputs(model, 3, 1)[0]
    exact = open_session(model).run(None, feed)
    found = gap(exact, rounded_at_every_step(half, feed))
    assert UNIT / 8 < found < allowed(half, sum(each.size for each in exact))


def test_what_computes_is_in_half_and_the_file_is_smaller(net):
    model, half, done = net
    types = tensor_types(half)
    heavy = [n for n in half.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    assert heavy and all(types[n.output[0]] == TensorProto.FLOAT16 for n in heavy)
    assert (done.bytes_before, done.bytes_after) == (model.ByteSize(), half.ByteSize())
    assert done.bytes_after < done.bytes_before
    assert done.samples == 8 and done.precision == "fp16"


def test_a_network_of_many_weights_takes_half_the_bytes(tmp_path):
    model = exported(lambda: ResNet(1, (32, 64)), tmp_path)
    _, done = halve(model, seeded_inputs(model))
    assert 0.5 < done.bytes_after / done.bytes_before < 0.52


def test_parameters_keep_their_names_and_shapes(net):
    model, half, _ = net
    before, after = weights(model), weights(half)
    names = {name for name in before if is_parameter(name)}
    assert names <= after.keys() and all(before[name].shape == after[name].shape for name in names)
    assert {"float16"} <= {str(after[name].dtype) for name in names}
    assert half.metadata_props == model.metadata_props


def test_no_cast_undoes_another_and_none_is_there_twice(net):
    _, half, done = net
    types, nodes = tensor_types(half), [n for n in half.graph.node if n.op_type == "Cast"]
    made = {n.output[0]: n for n in nodes}
    assert len(nodes) == done.casts
    assert not [n.name for n in nodes if n.input[0] in made]
    assert len({n.input[0] for n in nodes}) == len(nodes)
    assert all(types[n.input[0]] != types[n.output[0]] for n in nodes)


def test_every_node_that_stays_float32_has_a_reason_and_every_other_is_in_half(net):
    _, half, done = net
    types, reasons = tensor_types(half), {row.node: row.reason for row in done.kept}
    for n in half.graph.node:
        if n.op_type != "Cast" and types[n.output[0]] in (TensorProto.FLOAT, TensorProto.FLOAT16):
            assert (types[n.output[0]] == TensorProto.FLOAT) == (n.name in reasons)
    assert all(reasons.values())


def test_halving_again_changes_nothing_and_halving_is_the_same_every_time(net):
    model, half, done = net
    again, nothing = halve(half, seeded_inputs(model, 5, 8))
    assert again == half and nothing.nodes == 0 and nothing.kept == done.kept
    before = model.SerializeToString(deterministic=True)
    assert halve(model, seeded_inputs(model, 5, 8))[0].SerializeToString() == half.SerializeToString()
    assert model.SerializeToString(deterministic=True) == before


def test_the_norms_and_the_softmax_of_a_transformer_stay(tmp_path):
    model = exported(Tokens, tmp_path)
    _, done = halve(model, seeded_inputs(model, 5, 8))
    reasons = [row.reason for row in done.kept]
    assert reasons.count("it is a norm") == reasons.count("it is a softmax") == 1
    assert reasons.count("it is a piece of a norm") == 6
    assert done.casts <= 2 * 4 + 2


# --- overflow --------------------------------------------------------------------------------------------------------


class Loud(nn.Module):
    """A stream that grows beyond half precision in the middle and is brought back."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("gain", torch.tensor(4e4))

    def forward(self, x):
        x = F.relu(self.b(self.gain * F.relu(self.a(x)))) / self.gain
        return self.c(x)


def test_what_overflows_on_samples_stays_float32_and_without_it_the_network_breaks(tmp_path):
    model = exported(Loud, tmp_path)
    feeds = seeded_inputs(model, 0, 4)
    half, done = halve(model, feeds, "4 samples of noise")
    reasons = {row.node: row.reason for row in done.kept}
    assert {name.split("/")[1] for name in reasons} >= {"b"} and "/a/Conv" not in reasons and "/c/Conv" not in reasons
    assert any("reaches" in why and "on 4 samples of noise" in why for why in reasons.values())
    found = rounded_at_every_step(half, feeds[0])
    assert gap(open_session(model).run(None, feeds[0]), found) < done.allowed
    blind, _ = halve(model, [{"input": np.zeros(SHAPE, np.float32)}])
    assert not np.isfinite(rounded_at_every_step(blind, feeds[0])[0]).all(), "zeros say nothing of how large it grows"


def test_a_network_that_half_precision_spoils_is_refused():
    """Differences of large numbers: 4096 + x loses what x has below 4. ONNX Runtime's own kernels do not show it."""
    nodes = [node("Add", "x far", "a"), node("Sub", "a far", "y")]
    model = graph(nodes, (1, 64), (1, 64), {"far": np.float32(4096)})
    with pytest.raises(DeployError) as caught:
        halve(model, [{"x": np.linspace(0, 1, 64, dtype=np.float32)[None]}], "1 sample", "the dense network")
    assert caught.value.message.startswith("half precision changes the outputs of the dense network by 1 of their ")
    assert "largest value on 1 sample, where rounding explains " in caught.value.message
    assert caught.value.hint == 'set precision = "fp32".'


# --- single rewrites -------------------------------------------------------------------------------------------------


def halved(model):
    """In half, checked, and as close as the bound says where every step is rounded."""
    feeds = seeded_inputs(model, 1, 2)
    half, _ = halve(model, feeds)
    for feed in feeds:
        assert gap(open_session(model).run(None, feed), rounded_at_every_step(half, feed)) < allowed(half, 100)
    return half


def test_an_output_that_is_read_inside_too_is_cast_once():
    light = [node("Relu", "z", "r"), node("Softmax", "z", "s", axis=1), node("Mul", "r s", "y")]
    nodes = [node("Conv", "x w", "z"), *light]
    half = halved(graph(nodes, (1, 3, 4, 4), (1, 4, 4, 4), {"w": (4, 3, 1, 1)}, {"z": (1, 4, 4, 4)}))
    readers = {n.op_type: n.input[0] for n in half.graph.node if n.op_type in ("Relu", "Softmax")}
    assert readers == {"Relu": "z/float16", "Softmax": "z"}
    assert ops(half).count("Cast") == 4


def test_an_input_that_halves_and_floats_read_is_cast_for_the_halves_alone():
    nodes = [node("Conv", "x w", "a"), node("Softmax", "x", "s", axis=1), node("Concat", "a s", "y", axis=1)]
    half = halved(graph(nodes, (1, 3, 4, 4), (1, 7, 4, 4), {"w": (4, 3, 1, 1)}))
    read = {n.op_type: list(n.input) for n in half.graph.node}
    assert read["Softmax"] == ["x"] and read["Conv"][0] == "x/float16" and read["Concat"] == ["a", "s/float16"]


@pytest.mark.parametrize("name", ["c", "/own/c"])
def test_a_constant_of_both_kinds_is_there_twice_and_a_parameter_makes_all_its_readers_stay(name):
    nodes = [node("Add", f"x {name}", "a"), node("MatMul", "a w", "m"), node("LayerNormalization", f"m {name}", "y")]
    half = halved(graph(nodes, (1, 8), (1, 8), {name: (8,), "w": (8, 8)}))
    kinds = {each: array.dtype for each, array in weights(half).items()}
    copy = {} if is_parameter(name) else {"/own/c/float16": np.float16}
    assert kinds == {name: np.float32, "w": np.float16} | copy
    assert tensor_types(half)["a"] == (TensorProto.FLOAT if is_parameter(name) else TensorProto.FLOAT16)


def test_casts_of_the_network_itself_go_straight_to_half():
    nodes = [node("Cast", "i", "f", to=TensorProto.FLOAT), node("Mul", "x f", "m"),
             node("Cast", "m", "n", to=TensorProto.BOOL), node("Cast", "n", "y", to=TensorProto.FLOAT)]  # fmt: skip
    half = halved(graph(nodes, (1, 4), (1, 4), {"i": integers(1, 2, 3, 4)}))
    kinds = {n.output[0]: n.attribute[0].i for n in half.graph.node if n.op_type == "Cast"}
    assert kinds == {
        "x/float16": TensorProto.FLOAT16, "f": TensorProto.FLOAT16, "n": TensorProto.BOOL,
        "y/float16": TensorProto.FLOAT16, "y": TensorProto.FLOAT,
    }  # fmt: skip


def test_a_network_that_is_half_in_parts_already_gets_no_cast_there_and_back():
    nodes = [node("Conv", "x w", "a"), node("Cast", "a", "h", to=TensorProto.FLOAT16), node("Relu", "h", "r"),
             node("Cast", "r", "f", to=TensorProto.FLOAT), node("Conv", "f v", "y")]  # fmt: skip
    half = halved(graph(nodes, (1, 3, 4, 4), (1, 2, 4, 4), {"w": (4, 3, 1, 1), "v": (2, 4, 1, 1)}))
    assert ops(half) == ["Cast", "Conv", "Relu", "Conv", "Cast"]


def test_the_scales_of_a_resize_stay_as_they_are():
    resize = helper.make_node("Resize", ["a", "", "scales"], ["y"], name="/y/Resize", mode="linear")
    stored = {"w": (4, 3, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)}
    half = halved(graph([node("Conv", "x w", "a"), resize], (1, 3, 4, 4), (1, 4, 8, 8), stored))
    kinds = {name: array.dtype for name, array in weights(half).items()}
    assert kinds == {"w": np.float16, "scales": np.float32}
    assert tensor_types(half)["y/float16"] == TensorProto.FLOAT16


def test_a_graph_within_a_node_reads_float32():
    def branch(name, op):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4, 4, 4))
        return helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [out])

    branches = {"then_branch": branch("t", "Relu"), "else_branch": branch("e", "Neg")}
    choice = helper.make_node("If", ["c"], ["b"], name="/if", **branches)
    nodes = [node("Conv", "x w", "a"), choice, node("Conv", "b v", "y")]
    stored = {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "c": np.array(True)}
    half = halved(graph(nodes, (1, 3, 4, 4), (1, 4, 4, 4), stored))
    [choice] = [n for n in half.graph.node if n.op_type == "If"]
    assert {n.input[0] for a in choice.attribute for n in a.g.node} == {"a/float32"}


# --- narrowing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobile", "mixed"])
def test_narrowing_a_network_in_half_is_the_narrowed_network_in_half(name, tmp_path):
    network = find_groups(capture(shaken(NETS[name]()), (torch.randn(SHAPE),)), prove=False)
    path = export(network.graph, [InputSpec(shape=SHAPE)], tmp_path / "dense.onnx")
    model, _ = optimize_model(onnx.load(str(path)), GraphSpec().passes)
    half, _ = halve(model, seeded_inputs(model, 0, 4))
    gone = [block.id for block in network.topology.removable[:1]]
    edits = [DropBlock(id) for id in gone]
    edits += [KeepUnits(g.id, tuple(range(0, g.size, 2))) for g in network.topology.offered if g.block not in gone]
    cut = resolve(network.topology, PruningPlan(tuple(edits)))
    exact, narrowed = narrow(model, cut), narrow(half, cut)
    check_model(narrowed)
    assert {t.data_type for t in narrowed.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    feeds = seeded_inputs(model, 2)
    assert compare_outputs(exact, narrowed, feeds).max_rel < allowed(narrowed, 1000)


# --- the bound -------------------------------------------------------------------------------------------------------


def test_roundings_are_counted_along_the_longest_way():
    nodes = [node("Conv", "x w b", "a"), node("Relu", "a", "r"), node("Conv", "r v", "c"), node("Add", "c x", "y")]
    stored = {"w": (3, 3, 1, 1), "b": (3,), "v": (3, 3, 1, 1)}
    half = halved(graph(nodes, (1, 3, 4, 4), (1, 3, 4, 4), stored))
    assert roundings(half) == 1 + 3 + 0 + 2 + 1, "input; w, b, result; Relu is exact; v, result; sum"


def test_roundings_spelt_out_are_those_of_arithmetic_in_half(net):
    model, half, _ = net
    spelt = spelt_out(half)
    check_model(spelt)
    assert TensorProto.FLOAT16 not in {t.data_type for t in spelt.graph.initializer}
    for feed in seeded_inputs(model, 7, 2):
        other = rounded_at_every_step(half, feed)
        assert gap(open_session(spelt).run(None, feed), other) < 8 * UNIT, "but for the order of sums"


def test_the_bound_grows_with_the_roundings_and_hardly_with_the_values():
    few, many = (
        halved(graph([node("Sigmoid", "x", "t0"), *(node("Sigmoid", f"t{i}", f"t{i + 1}") for i in range(n)),
                      node("Sigmoid", f"t{n}", "y")], (1, 4), (1, 4)))
        for n in (2, 47)
    )  # fmt: skip
    assert (roundings(few), roundings(many)) == (5, 50)
    assert allowed(many, 10) == pytest.approx(10**0.5 * allowed(few, 10), rel=0.1)
    assert allowed(few, 10) < allowed(few, 10**6) < 1.6 * allowed(few, 10)


# --- any network -----------------------------------------------------------------------------------------------------

UNARY = ("Relu", "Sigmoid", "Tanh", "Softplus", "Neg", "Abs", "Exp", "Identity", "Erf")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")


@st.composite
def networks(draw):
    """Models on (1, 4, 6, 6) of up to ten nodes that read any earlier tensor of the same shape."""
    tensors, nodes, stored = ["x"], [], {}
    kinds = ("unary", "binary", "conv", "softmax", "norm", "constant", "moved")
    for index in range(draw(st.integers(1, 10))):
        kind, out = draw(st.sampled_from(kinds)), f"t{index}"
        source = draw(st.sampled_from(tensors))
        if kind == "unary":
            nodes.append(node(draw(st.sampled_from(UNARY)), source, out))
        elif kind == "binary":
            nodes.append(node(draw(st.sampled_from(BINARY)), f"{source} {draw(st.sampled_from(tensors))}", out))
        elif kind == "conv":
            stored[f"c{index}.weight"], stored[f"c{index}.bias"] = (4, 4, 3, 3), (4,)
            nodes.append(node("Conv", f"{source} c{index}.weight c{index}.bias", out, pads=[1, 1, 1, 1]))
        elif kind == "softmax":
            nodes.append(node("Softmax", source, out, axis=1))
        elif kind == "norm":
            stored[f"n{index}.weight"] = np.ones(6, np.float32)
            nodes.append(node("LayerNormalization", f"{source} n{index}.weight", out))
        elif kind == "constant":
            size = draw(st.sampled_from((1e-7, 1e-3, 1.0, 100.0, 1e5)))
            stored[f"k{index}"] = np.float32(size)
            nodes.append(node(draw(st.sampled_from(("Add", "Mul"))), f"{source} k{index}", out))
        else:
            nodes += [node("Transpose", source, f"{out}m", perm=[0, 1, 3, 2]), node("Relu", f"{out}m", out)]
        tensors.append(out)
    read = {name for n in nodes for name in n.input}
    ends = [name for name in tensors[1:] if name not in read]
    shape = (1, 4, 6, 6)
    return graph([*nodes, node("Concat", " ".join(ends), "y", axis=0)], shape, (len(ends), *shape[1:]), stored)


@settings(max_examples=60, deadline=None)
@given(networks())
def test_any_network_in_half_is_valid_minimal_and_settled(model):
    feeds = seeded_inputs(model, 1, 2)
    try:
        half, done = halve(model, feeds)
    except DeployError as error:
        assert "where rounding explains" in error.message or "not finite" in error.message
        return
    types = tensor_types(check_model(half))
    made = {n.output[0]: n for n in half.graph.node if n.op_type == "Cast"}
    assert not [name for name, n in made.items() if n.input[0] in made]
    assert len({n.input[0] for n in made.values()}) == len(made)
    kept = {row.node for row in done.kept}
    for n in half.graph.node:
        if n.op_type != "Cast":
            assert (types[n.output[0]] == TensorProto.FLOAT) == (n.name in kept)
    assert halve(half, feeds)[0] == half
    for result in rounded_at_every_step(half, feeds[0]):
        assert np.isfinite(result).all()
