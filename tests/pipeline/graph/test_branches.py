"""Networks that decide by their data, as ONNX: every branch is there, and whoever narrows or measures minds it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from pipeline.graph.export import export
from pipeline.graph.inner import graphs, reads, renamed
from pipeline.graph.narrow import narrow
from pipeline.graph.optimize import optimize_model
from pipeline.graph.rows import Rows
from pipeline.graph.verify import check_model, compare_outputs, open_session
from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups
from pipeline.prune.labels import LabelSpace, Op
from pipeline.prune.plan import resolve
from pipeline.prune.surgery import prune
from profiles.errors import DeployError
from profiles.schema import GraphSpec, InputSpec

sys.path.append(str(Path(__file__).parents[1] / "prune"))  # the networks are those of the tests of capture
from leaf_nets import (
    Around,
    Branch,
    Called,
    Deeper,
    FromDoubles,
    FromPairs,
    HoldsScript,
    Loose,
    Outputs,
    Rectified,
    Remembers,
    ThroughNumpy,
    Writes,
)


class Scales(torch.nn.Module):
    """A scale for each channel where the first of them is large."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[:, 0].abs().max() > -1.0 and x.abs().mean() * 0 >= 0:
            return x * self.scale.reshape(1, -1, 1, 1)
        return x


SPEC = (InputSpec(shape=(2, 3, 8, 8)),)


def network(middle: torch.nn.Module) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(Around(middle).eval(), (torch.randn(2, 3, 8, 8),)))


def written(net: torch.nn.Module, folder: Path, *, passes: bool = True) -> onnx.ModelProto:
    model = onnx.load(str(export(net, SPEC, folder / "net.onnx")))
    return optimize_model(model, GraphSpec().passes)[0] if passes else model


def feeds() -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)
    return [{"input": each} for each in (x, -x, 10 * x, x - 3, x + 3)]


def run(net: torch.nn.Module):
    def call(x: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [net(torch.from_numpy(x)).numpy()]

    return call


LEAVES = {
    "branch": (Branch, True),
    "deeper": (Deeper, True),
    "named tuple": (FromDoubles, True),
    "script": (lambda: torch.jit.script(Rectified().eval()), True),
    "tensor of its own": (Remembers, True),
    "defaults": (Called, True),
    "script inside": (HoldsScript, True),
    "script with a tensor of its own": (lambda: torch.jit.script(Remembers().eval()), True),
    "writes": (Writes, False),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", LEAVES)
def test_what_was_left_whole_is_exported_with_every_branch(tmp_path: Path, name: str):
    make, decides = LEAVES[name]
    net = network(make())
    model = written(net.graph, tmp_path)
    assert ("If" in {node.op_type for node in model.graph.node}) == decides
    assert compare_outputs(run(net.graph), model, feeds()).max_rel < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", LEAVES)
def test_the_narrowed_file_computes_what_the_cut_network_does(tmp_path: Path, name: str):
    net = network(LEAVES[name][0]())
    plan = PruningPlan(tuple(KeepUnits(g.id, tuple(range(g.size // 2))) for g in net.topology.offered))
    assert plan.edits
    narrowed = narrow(written(net.graph, tmp_path), resolve(net.topology, plan))
    check_model(narrowed)
    assert compare_outputs(run(prune(net, plan)), narrowed, feeds()).max_rel < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", LEAVES)
def test_every_row_of_the_table_runs_at_any_width(tmp_path: Path, name: str):
    net = network(LEAVES[name][0]())
    every_row_runs(net, written(net.graph, tmp_path))


def every_row_runs(net: Network, model: onnx.ModelProto) -> None:
    rows = Rows(model, net.topology, lambda plan: resolve(net.topology, plan))
    assert sorted(n for site in rows.sites for n in site.nodes) == sorted(node.name for node in model.graph.node)
    sizes = {group.id: group.size for group in net.topology.groups}
    for site in rows.sites:
        for share in (1.0, 0.5):
            widths = tuple(dim.size({id: max(1, int(size * share)) for id, size in sizes.items()}) for dim in site.dims)
            for copies in rows.copies(site):
                row = onnx.load_from_string(rows.row(site, widths, copies=copies))
                check_model(row)
                session = open_session(row)
                session.run(None, {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()})
        assert rows.row(site, widths) == rows.row(site, widths)


def test_parameters_that_branches_read_are_stored_once_and_outside(tmp_path: Path):
    model = written(network(Branch()).graph, tmp_path)
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names)) and "middle.inner.conv.weight" in names
    assert not [tensor.name for node in model.graph.node for inner in graphs(node) for tensor in inner.initializer]


def gated(op: Op, space: LabelSpace) -> None:
    space.param(op.params["scale"], 0, space.along(op, 0, 1))
    space.tensors[op.output] = space.tensors[op.inputs[0]]


def test_an_operator_with_a_rule_may_decide_by_its_data_too(tmp_path: Path):
    torch.manual_seed(0)
    kind = f"{Scales.__module__}.{Scales.__qualname__}"
    net = find_groups(capture(Around(Scales()).eval(), (torch.randn(2, 3, 8, 8),), {kind: gated}))
    assert net.leaves == {} and {"a", "b"} == {group.name for group in net.topology.offered}
    assert "middle.scale[0]" in next(g for g in net.topology.offered if g.name == "a").members
    model = written(net.graph, tmp_path)
    assert "If" in {node.op_type for node in model.graph.node}
    plan = PruningPlan(tuple(KeepUnits(g.id, tuple(range(1, g.size, 2))) for g in net.topology.offered))
    narrowed = narrow(model, resolve(net.topology, plan))
    assert {t.name: list(t.dims) for t in narrowed.graph.initializer}["middle.scale"] == [4]
    assert compare_outputs(run(net.graph), model, feeds()).max_rel < 1e-5
    assert compare_outputs(run(prune(net, plan)), narrowed, feeds()).max_rel < 1e-5
    every_row_runs(net, model)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (ThroughNumpy, "leaf_nets.ThroughNumpy reads numbers out of its data, and TorchScript cannot compile it: "),
        (Loose, "leaf_nets.Loose reads numbers out of its data, and TorchScript cannot compile it: "),
    ],
)
def test_what_would_be_exported_with_one_branch_only_is_refused(tmp_path: Path, middle, reason: str):
    with pytest.raises(DeployError) as caught:
        written(network(middle()).graph, tmp_path)
    assert caught.value.message.startswith(f"the network cannot be exported to ONNX: {reason}")
    assert "torch.where" in caught.value.hint


def test_a_dict_that_a_branch_gives_has_no_form_in_onnx_and_stdout_stays_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(DeployError, match=r"the operator 'prim::DictConstruct' has no ONNX form in opset 17\."):
        written(network(FromPairs()).graph, tmp_path)
    assert capfd.readouterr().out == ""


def test_outputs_in_dicts_and_lists_are_exported_in_order(tmp_path: Path):
    model = Outputs().eval()
    net = find_groups(capture(model, (torch.randn(2, 3, 8, 8),)))
    proto = written(net.graph, tmp_path)

    def flat(x: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = model(torch.from_numpy(x))
        return [found["out"].numpy(), found["aux"][0].numpy(), found["aux"][1][0].numpy()]

    assert compare_outputs(flat, proto, feeds()).max_rel < 1e-5


def test_a_file_that_computes_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the compiled forward is not used, the exporter writes one branch: the comparison has to see that."""
    net = network(Branch())
    leaf = net.graph.get_submodule("middle")
    leaf.compiled, leaf.on_data = None, False
    with pytest.raises(DeployError) as caught:
        written(net.graph, tmp_path)
    assert caught.value.message.startswith("the exported network differs from the given one by ")


def branching() -> onnx.NodeProto:
    def body(name: str, other: str) -> onnx.GraphProto:
        inner = helper.make_node("Identity", ["inside"], [f"{name}_out"])
        outer = helper.make_node("Add", ["x", other], ["inside"])
        made = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [2])
        return helper.make_graph([outer, inner], name, [], [made])

    return helper.make_node("If", ["yes"], ["y"], then_branch=body("a", "p"), else_branch=body("b", "q"))


def test_what_a_node_reads_is_what_its_branches_read_too():
    assert reads(branching())[0] == "yes" and sorted(reads(branching())) == ["p", "q", "x", "yes"]
    nested = helper.make_node("If", ["also"], ["z"], then_branch=helper.make_graph([branching()], "n", [], []))
    assert set(reads(nested)) == {"also", "yes", "x", "p", "q"}
    assert reads(helper.make_node("Clip", ["x", "", "high"], ["y"])) == ["x", "high"]


def test_renaming_reaches_outer_tensors_and_keeps_inner_ones_apart():
    (first, second) = (renamed(a, {"x": "t0", "p": "w1", "q": "w2"}, "n7_") for a in branching().attribute)
    for attribute in (first, second):
        add, identity = attribute.g.node
        assert list(add.input) == ["t0", "w1" if attribute.name == "then_branch" else "w2"]
        assert identity.input[0] == add.output[0] and attribute.g.output[0].name == identity.output[0]
        assert add.output[0].startswith(f"n7_{attribute.name}_")
    assert set(first.g.node[0].output).isdisjoint(second.g.node[0].output)
