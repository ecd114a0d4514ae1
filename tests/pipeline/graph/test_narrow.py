import time
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from graph_samples import Mixed, Mobile, ResNet, graph, integers, node, norm, ops, shaken, weights
from onnx import numpy_helper
from torch import nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow, narrow_file
from pipeline.graph.optimize import optimize_model
from pipeline.graph.verify import check_model, compare_outputs, open_session, seeded_inputs
from pipeline.nouns import Block, Cut, DropBlock, KeepUnits, PruningPlan
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import resolve
from pipeline.prune.surgery import prune
from profiles.errors import DeployError
from profiles.schema import GraphSpec, InputSpec

PASSES = GraphSpec().passes


def at(*positions):
    return np.array(positions, dtype=np.int64)


def valid(model):
    check_model(model)
    open_session(model)
    return model


# --- single rules, by hand -------------------------------------------------------------------------------------------


def test_parameters_are_sliced_by_name_along_every_axis():
    stored = {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "b.weight": (2, 4, 1, 1)}
    model = graph(
        [node("Conv", "x a.weight a.bias", "a"), node("Conv", "a b.weight", "y")], (1, 3, 2, 2), (1, 2, 2, 2), stored
    )
    kept = at(0, 2, 3)
    cut = Cut({"a.weight": {0: kept}, "a.bias": {0: kept}, "b.weight": {1: kept}}, {})
    before = model.SerializeToString()
    result = valid(narrow(model, cut))
    old, new = weights(model), weights(result)
    assert np.array_equal(new["a.weight"], old["a.weight"][kept])
    assert np.array_equal(new["a.bias"], old["a.bias"][kept])
    assert np.array_equal(new["b.weight"], old["b.weight"][:, kept])
    assert model.SerializeToString() == before, "the model that came in must not change"


@pytest.mark.parametrize(
    ("layer", "x", "shape", "axes", "kept"),
    [
        (node("Conv", "x w.weight", "c"), (1, 3, 4, 4), (4, 3, 1, 1), {0: at(1, 3)}, [1, 3]),
        (node("ConvTranspose", "x w.weight", "c"), (1, 3, 4, 4), (3, 4, 1, 1), {1: at(1, 3)}, [1, 3]),
        (node("ConvTranspose", "x w.weight", "c", group=2), (1, 4, 4, 4), (4, 2, 1, 1), {1: at(1)}, [1, 3]),
        (node("Gemm", "x w.weight", "c", transB=1), (1, 3), (4, 3), {0: at(0, 1)}, [0, 1]),
    ],
    ids=["conv", "transposed", "transposed-grouped", "linear"],
)
def test_the_bias_that_fold_batchnorm_made_follows_its_weight(layer, x, shape, axes, kept):
    y = (1, 4, *x[2:])
    names = "bn.weight bn.bias bn.running_mean bn.running_var"
    model = graph([layer, node("BatchNormalization", f"c {names}", "y")], x, y, {"w.weight": shape} | norm("bn", 4))
    folded, _ = optimize_model(model, ("fold-batchnorm",))
    cut = Cut({"w.weight": axes} | {name: {0: at(*kept)} for name in names.split()}, {})
    result = narrow(folded, cut)
    assert np.array_equal(weights(result)["w.bias"], weights(folded)["w.bias"][kept])


@pytest.mark.parametrize(
    ("group", "shape", "axes", "expected"),
    [
        (4, (4, 1, 3, 3), {0: at(0, 2)}, 2),
        (4, (8, 1, 3, 3), {0: at(0, 1, 4, 5)}, 2),
        (2, (8, 2, 3, 3), {0: at(0, 1, 4, 5)}, 2),
    ],
    ids=["depthwise", "depthwise-doubling", "grouped"],
)
def test_groups_follow_the_weight(group, shape, axes, expected):
    model = graph([node("Conv", "x w", "y", group=group)], (1, 4, 5, 5), (1, shape[0], 3, 3), {"w": shape})
    result = narrow(model, Cut({"w": axes}, {}))
    assert [a.i for a in result.graph.node[0].attribute if a.name == "group"] == [expected]


def named(op, inputs, outputs="y", **attributes):
    return node(op, inputs, outputs, name=f"/op/{op}", **attributes)


CONSTANTS = {  # kind: node, shapes of x and y, initializers, axis and value of the cut, inputs that the node then has
    "pad": (
        named("Pad", "x /p"),
        ((1, 3, 2, 2), (1, 8, 2, 2)),
        {"/p": integers(0, 2, 0, 0, 0, 3, 0, 0)},
        (1, (1, 2)),
        [[0, 1, 0, 0, 0, 2, 0, 0]],
    ),
    "split": (named("Split", "x /s", "y z", axis=1), ((1, 6), (1, 4)), {"/s": integers(4, 2)}, (1, (3, 1)), [[3, 1]]),
    "reshape": (named("Reshape", "x /s"), ((1, 4, 2, 2), (1, 16)), {"/s": integers(1, 16)}, (1, (1, 8)), [[1, 8]]),
    "gather": (named("Gather", "x /i", axis=1), ((1, 4), (1, 4)), {"/i": integers(2, 0, 3, 1)}, (1, (1, 0)), [[1, 0]]),
    "slice": (
        named("Slice", "x /a /b /axes"),
        ((1, 4, 3), (1, 2, 3)),
        {"/a": integers(1, 0), "/b": integers(3, 9), "/axes": integers(1, 2)},
        (1, (1, 2)),
        [[1, 0], [2, 9]],
    ),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_rewritten_by_the_scope_of_their_node(kind):
    layer, (x, y), stored, (axis, value), expected = CONSTANTS[kind]
    model = graph([layer], x, y, stored, {"z": (1, 2)} if kind == "split" else None)
    result = narrow(model, Cut({}, {"op": (kind, axis, value)}))
    names = list(result.graph.node[0].input)[1:]
    assert [weights(result)[name].tolist() for name in names[: len(expected)]] == expected
    assert ops(model) == ops(result)


def test_a_pad_of_channels_that_adds_none_any_more_goes():
    model = graph(
        [node("Pad", "x /p", "a", name="/op/Pad"), node("Relu", "a", "y")],
        (1, 3, 2, 2),
        (1, 5, 2, 2),
        {"/p": integers(0, 1, 0, 0, 0, 1, 0, 0)},
    )
    assert ops(narrow(model, Cut({}, {"op": ("pad", 1, (0, 0))}))) == ["Relu"]


def residual(skip_first=False):
    operands = "r c2" if skip_first else "c2 r"
    nodes = [
        node("Conv", "x stem", "s"),
        node("Relu", "s", "r"),
        node("Conv", "r one.weight", "c1"),
        node("Conv", "c1 two.weight", "c2"),
        node("Add", operands, "a", name="/residual_add_0/Add"),
        node("Relu", "a", "y"),
    ]
    stored = {"stem": (2, 2, 1, 1), "one.weight": (3, 2, 1, 1), "two.weight": (2, 3, 1, 1)}
    return graph(nodes, (1, 2, 3, 3), (1, 2, 3, 3), stored)


@pytest.mark.parametrize("skip", [0, 1])
def test_a_removed_block_leaves_its_skip(skip):
    block = Block("b", "residual_add_0", skip, (), ("one.weight", "two.weight"))
    model = residual(skip_first=skip == 0)
    result = valid(narrow(model, Cut({}, {}, (block,))))
    assert ops(result) == ["Conv", "Relu"], "the second Relu does nothing and goes"
    assert set(weights(result)) == {"stem"}
    assert [info.name for info in result.graph.output] == ["y"]


# --- every name is asserted ------------------------------------------------------------------------------------------


def test_a_parameter_that_is_not_in_the_model_is_named():
    with pytest.raises(DeployError) as error:
        narrow(residual(), Cut({"three.weight": {0: at(0)}}, {}))
    assert str(error.value) == (
        "the parameter 'three.weight' is not in the exported graph.\nexport and optimize the dense network again."
    )


def test_a_constant_that_is_not_in_the_model_is_named():
    with pytest.raises(DeployError) as error:
        narrow(residual(), Cut({}, {"channel_pad_9": ("pad", 1, (1, 1))}))
    assert error.value.message == "the operation 'channel_pad_9' (pad) is not in the exported graph."


def test_a_block_that_is_not_in_the_model_is_named():
    with pytest.raises(DeployError) as error:
        narrow(residual(), Cut({}, {}, (Block("b", "residual_add_7", 0, (), ()),)))
    assert error.value.message == "the addition 'residual_add_7' of block 'b' is not in the exported graph."


def test_amounts_that_are_computed_when_it_runs_ask_for_folding():
    shape = numpy_helper.from_array(integers(0, 1, 0, 0, 0, 1, 0, 0))
    model = graph(
        [node("Constant", "", "p", value=shape), node("Pad", "x p", "y", name="/op/Pad")], (1, 3, 2, 2), (1, 5, 2, 2)
    )
    with pytest.raises(DeployError) as error:
        narrow(model, Cut({}, {"op": ("pad", 1, (1, 0))}))
    assert str(error.value) == "input 1 of '/op/Pad' is not a constant.\nrun fold-constants before narrowing."


# --- against surgery of the torch network -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[ResNet, Mobile, Mixed], ids=["resnet", "mobile", "mixed"])
def captured(request, tmp_path_factory):
    net = request.param(2) if request.param is ResNet else request.param()
    network = find_groups(capture(shaken(net), (torch.randn(1, 3, 16, 16),)), prove=False)
    path = export(network.graph, [InputSpec(shape=(1, 3, 16, 16))], tmp_path_factory.mktemp("dense") / "dense.onnx")
    return network, onnx.load(str(path))


def random_plan(topology, seed):
    rng = np.random.default_rng(seed)
    gone = {block.id for block in topology.removable if rng.random() < 0.4}
    edits = [DropBlock(id) for id in sorted(gone)]
    for group in topology.offered:
        if group.block not in gone:
            width = int(rng.integers(1, group.size + 1))
            edits.append(KeepUnits(group.id, tuple(sorted(int(i) for i in rng.permutation(group.size)[:width]))))
    return PruningPlan(tuple(edits))


@pytest.mark.parametrize("passes", [PASSES, ("fold-constants",)], ids=["optimized", "folded"])
def test_a_narrowed_graph_computes_what_the_pruned_network_does(captured, passes):
    network, dense = captured
    model, _ = optimize_model(dense, passes)
    for seed in range(5):
        plan = random_plan(network.topology, seed)
        pruned = prune(network, plan).eval()
        result = valid(narrow(model, resolve(network.topology, plan)))
        with torch.no_grad():
            gap = compare_outputs(
                lambda x, net=pruned: net(torch.from_numpy(x)).numpy(), result, seeded_inputs(result, seed)
            )
        assert gap.max_rel < 1e-5, plan


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm, partial(nn.LayerNorm, bias=False), partial(nn.LayerNorm, elementwise_affine=False)],
    ids=["layer", "no bias", "plain"],
)
def test_what_the_export_adds_to_a_norm_is_narrowed_with_it(norm, tmp_path):
    """A LayerNorm without bias has one of zeros in ONNX: a constant of the dense width."""
    net = shaken(nn.Sequential(nn.Linear(4, 12), norm(12), nn.Linear(12, 12), norm(12), nn.Linear(12, 3)))
    network = find_groups(capture(net, (torch.randn(2, 4),)), prove=False)
    path = export(network.graph, [InputSpec(shape=(2, 4))], tmp_path / "dense.onnx")
    model, _ = optimize_model(onnx.load(str(path)), PASSES)
    plan = random_plan(network.topology, 1)
    assert plan.edits
    pruned = prune(network, plan).eval()
    result = valid(narrow(model, resolve(network.topology, plan)))
    with torch.no_grad():
        gap = compare_outputs(lambda x: pruned(torch.from_numpy(x)).numpy(), result, seeded_inputs(result, 0))
    assert gap.max_rel < 1e-5, plan


def test_a_candidate_has_the_nodes_of_the_network_that_ships(captured, tmp_path):
    network, dense = captured
    model, _ = optimize_model(dense, PASSES)
    for seed in range(3):
        plan = random_plan(network.topology, seed)
        candidate = narrow(model, resolve(network.topology, plan))
        shipped = export(prune(network, plan), [InputSpec(shape=(1, 3, 16, 16))], tmp_path / f"{seed}.onnx")
        final, _ = optimize_model(onnx.load(str(shipped)), PASSES)
        assert sorted(ops(candidate)) == sorted(ops(final))


def test_a_strided_shortcut_whose_padding_is_all_gone_is_still_a_convolution(tmp_path):
    network = find_groups(capture(shaken(ResNet()), (torch.randn(1, 3, 16, 16),)), prove=False)
    path = export(network.graph, [InputSpec(shape=(1, 3, 16, 16))], tmp_path / "dense.onnx")
    model, _ = optimize_model(onnx.load(str(path)), PASSES)
    added = next(group for group in network.topology.offered if "blocks.1.conv2" in group.name)
    plan = PruningPlan((KeepUnits(added.id, ()),))
    result = valid(narrow(model, resolve(network.topology, plan)))
    pruned = prune(network, plan).eval()
    with torch.no_grad():
        gap = compare_outputs(lambda x: pruned(torch.from_numpy(x)).numpy(), result, seeded_inputs(result))
    assert gap.max_rel < 1e-5
    again, _ = optimize_model(
        onnx.load(str(export(pruned, [InputSpec(shape=(1, 3, 16, 16))], tmp_path / "p.onnx"))), PASSES
    )
    assert sorted(ops(again)) == sorted(ops(result))


def test_narrowing_resnet20_takes_at_most_twenty_milliseconds(tmp_path):
    network = find_groups(capture(shaken(ResNet(3, (16, 32, 64), 10)), (torch.randn(1, 3, 32, 32),)), prove=False)
    path = export(network.graph, [InputSpec(shape=(1, 3, 32, 32))], tmp_path / "dense.onnx")
    model, _ = optimize_model(onnx.load(str(path)), PASSES)
    plan = PruningPlan(tuple(KeepUnits(group.id, tuple(range(group.size // 2))) for group in network.topology.offered))
    cut = resolve(network.topology, plan)
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        narrow(model, cut)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) <= 0.020


def test_narrowing_files_gives_the_same_model(tmp_path):
    model = residual()
    onnx.save(model, str(tmp_path / "dense.onnx"))
    cut = Cut({"one.weight": {0: at(0, 2)}, "two.weight": {1: at(0, 2)}}, {})
    out = narrow_file(tmp_path / "dense.onnx", cut, tmp_path / "narrow.onnx")
    assert onnx.load(str(out)).SerializeToString() == narrow(model, cut).SerializeToString()
