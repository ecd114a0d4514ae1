"""Every family of operators: captured, proved, cut, and cut in ONNX, with the coupling that each of them asks for."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from written_nets import UNITS, WRITTEN, Binary, Masked, Twice, Words
from zoo_nets import ZOO as FAMILIES
from zoo_nets import (
    Apply,
    Attention,
    ChannelsFirstNorm,
    Image,
    Sequence,
    SharedBranches,
    Stochastic,
    Tied,
    TwoInputs,
    WritesView,
    example,
)

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow_file
from pipeline.graph.optimize import optimize
from pipeline.nouns import DropBlock, KeepUnits, PruningPlan
from pipeline.outputs import tensors
from pipeline.prune import proof
from pipeline.prune.capture import Network, capture
from pipeline.prune.execute import MaskedRun
from pipeline.prune.groups import find_groups
from pipeline.prune.operators import InTraining
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.surgery import carry_out, prune
from profiles.errors import DeployError
from profiles.schema import GraphSpec, InputSpec

ZOO = FAMILIES | WRITTEN


def found(name: str, *, heads: bool = False) -> Network:
    torch.manual_seed(0)
    make, shape = ZOO[name]
    return find_groups(capture(make().eval(), example(shape)), heads=heads)


def sizes(network: Network) -> dict[str, int]:
    return {group.name: group.size for group in network.topology.offered}


def every_second(network: Network) -> PruningPlan:
    return PruningPlan(tuple(KeepUnits(g.id, tuple(range(0, g.size, 2))) for g in network.topology.offered))


@pytest.mark.parametrize("name", ZOO)
def test_what_is_captured_computes_the_same_for_any_batch(name):
    torch.manual_seed(0)
    make, shape = ZOO[name]
    model = make().eval()
    network = capture(model, example(shape))
    x = torch.randn(3, *shape[1:])
    assert torch.allclose(network.graph(x), model(x), atol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_no_rule_is_refuted_and_all_groups_cut_together_equal_the_masked_network(name):
    torch.manual_seed(0)
    make, shape = ZOO[name]
    bare = find_groups(capture(make().eval(), example(shape)), prove=False)
    assert proof.refute(bare) == {}
    network = find_groups(bare)
    assert network.topology.offered
    plan = every_second(network)
    random = proof.randomised(network.graph, 3)
    x = torch.randn(2, *shape[1:], dtype=torch.float64)
    keep = torch.from_numpy(kept_units(network.topology, plan))
    with torch.no_grad():
        masked = MaskedRun(random, network.readers, keep).run(x)
        got = carry_out(random, resolve(network.topology, plan))(x)
    assert torch.allclose(masked, got, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ZOO)
def test_the_narrowed_onnx_is_the_exported_one_of_the_cut_network(name, tmp_path):
    network = found(name)
    shape = ZOO[name][1]
    inputs = (InputSpec(name="input", shape=shape),)
    plan = every_second(network)
    export(network.graph, inputs, tmp_path / "dense.onnx")
    optimize(tmp_path / "dense.onnx", GraphSpec().passes, tmp_path / "optimized.onnx")
    narrow_file(tmp_path / "optimized.onnx", resolve(network.topology, plan), tmp_path / "narrow.onnx")
    session = ort.InferenceSession(str(tmp_path / "narrow.onnx"), providers=["CPUExecutionProvider"])
    (x,) = example(shape)
    with torch.no_grad():
        expected = prune(network, plan)(x).numpy()
    assert np.allclose(session.run(None, {"input": x.numpy()})[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_layer_before_what_is_written_otherwise_may_be_cut(name):
    offered = {g.name: g.size for g in found(name).topology.offered if "a.weight[0]" in g.members}
    assert offered == {"a": UNITS[name]}


def test_a_buffer_that_is_a_weight_stays_a_buffer_in_the_cut_network():
    network = found("blur")
    pruned = prune(network, every_second(network))
    (layer,) = [m for m in pruned.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert layer.groups == 6 and dict(layer.named_buffers())["weight"].shape == (6, 1, 3, 3)
    assert [name for name, _ in layer.named_parameters()] == []


def test_a_fold_is_cut_along_the_axis_that_the_convolution_behind_it_reads():
    units = {name: sizes(found(name)) for name in ("decoder", "pixel shuffle by views")}
    assert units["decoder"]["fc"] == 16 and units["decoder"]["up"] == 8
    assert units["pixel shuffle by views"]["middle.up"] == 5
    pruned = prune(network := found("decoder"), every_second(network))
    assert pruned.fc.weight.shape == (128, 3) and pruned.up.weight.shape == (8, 4, 4, 4)


@pytest.mark.parametrize("name", ["weight standardisation", "scaled weights"])
def test_a_weight_that_is_computed_of_parameters_alone_is_stored_and_its_layer_cut(name):
    network = found(name)
    layer = network.graph.middle
    assert type(layer) is nn.Conv2d and {n for n, _ in layer.named_parameters()} == {"bias", "weight"}
    assert isinstance(layer.weight, nn.Parameter) and float(layer.weight.detach().mean((1, 2, 3)).abs().max()) < 1e-6
    assert sizes(network)["middle"] == 12 and sizes(network)["a"] == 12


def test_an_unpooling_says_that_it_has_no_rule():
    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.c, self.back = nn.MaxPool2d(2, return_indices=True), nn.Conv2d(12, 12, 1), nn.MaxUnpool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, places = self.pool(x)
            return F.max_unpool2d(self.back(self.c(y), places)[:, :, ::2, ::2], places, 2)

    network = find_groups(capture(Image(Unpooled()).eval(), example((1, 3, 8, 8))))
    frozen = {g.name: g.frozen for g in network.topology.groups}
    assert frozen["middle.c"] == "there is no rule for MaxUnpool2d 'middle.back'" and frozen["b"] is None


@pytest.mark.parametrize("kind", [Masked, Binary])
def test_a_weight_that_training_must_not_set_free_stays_computed(kind):
    network = find_groups(capture(Image(kind(12, 12, 3)).eval(), example((1, 3, 8, 8))))
    frozen = {g.name: g.frozen for g in network.topology.groups}
    assert frozen["a"] == "there is no rule for conv2d ('conv2d')" and frozen["middle"] is not None


def test_a_computed_weight_whose_parameter_is_read_elsewhere_stays_and_says_so():
    network = find_groups(capture(Image(Twice()).eval(), example((1, 3, 8, 8))))
    frozen = {g.name: g.frozen for g in network.topology.groups}
    assert frozen["middle.c"] == "there is no rule for conv2d ('conv2d')"
    assert frozen["middle"] == "'norm' reduces over them", "the weight itself is shown, and why it stays"
    assert frozen["a"] is None and "middle.weight" in network.graph.state_dict()


def test_a_wrong_reader_refutes_every_group_with_its_reason():
    """What a misread operator would give: labels of another length than the axis that is read."""
    bare = find_groups(capture(Image(nn.Identity()).eval(), example((1, 3, 8, 8))), prove=False)
    readers = tuple(replace(r, ids=r.ids[:-1]) if r.op == "b" else r for r in bare.readers)
    reasons = proof.refute(replace(bare, readers=readers))
    assert set(reasons) == {g.id for g in bare.topology.offered}
    assert all(reason.startswith("masking it fails: The size of tensor a (12)") for reason in reasons.values())


def test_heads_stay_whole_and_every_head_loses_the_same_channels():
    network = found("attention")
    assert {g.size for g in network.topology.offered if "middle.qkv.weight[0]" in g.members} == {4}
    q = network.topology.params["middle.qkv.weight"][0].reshape(3, 3, 4)
    assert (q == q[:, :1]).all() and (q[0] == q[1]).all() and not (q[1] == q[2]).any()


def test_whole_heads_are_the_units_where_they_are_wanted():
    network = found("attention", heads=True)
    (group,) = [g for g in network.topology.offered if "middle.qkv.weight[0]" in g.members]
    assert group.size == 3 and "middle.proj.weight[1]" in group.members
    pruned = prune(network, PruningPlan((KeepUnits(group.id, (0, 2)),)))
    assert pruned.middle.qkv.weight.shape == (24, 12) and pruned.middle.proj.weight.shape == (12, 8)


@pytest.mark.parametrize("name", ["attention", "attention separate", "windows", "patch embedding"])
def test_cutting_whole_heads_is_proved_too(name):
    torch.manual_seed(0)
    make, shape = ZOO[name]
    network = find_groups(capture(make().eval(), example(shape)), prove=False, heads=True)
    assert proof.refute(network) == {}


def test_the_scale_of_attention_is_that_of_the_dense_network_after_a_cut():
    network = found("attention")
    pruned = prune(network, every_second(network))
    assert pruned.attention_0.scale == network.graph.attention_0.scale == 4**-0.5


def test_layers_that_share_a_weight_share_it_after_a_cut():
    network = find_groups(capture(Sequence(Tied()).eval(), example((1, 6, 12))))
    (group,) = [g for g in network.topology.offered if "middle.one.weight[0]" in g.members]
    assert {"middle.one.weight[1]", "middle.two.weight[0]", "middle.two.weight[1]"} <= set(group.members)
    pruned = prune(network, PruningPlan((KeepUnits(group.id, tuple(range(0, group.size, 2))),)))
    assert pruned.middle.one.weight is pruned.middle.two.weight
    assert pruned.middle.one.weight.shape == (group.size // 2, group.size // 2)


def test_a_removed_branch_leaves_a_layer_that_another_branch_shares():
    torch.manual_seed(0)
    network = find_groups(capture(SharedBranches().eval(), example((1, 3, 8, 8))))
    first, second = network.topology.removable
    assert "conv.weight" not in (*first.params, *second.params)
    inner = next(g for g in network.topology.offered if "conv.weight[0]" in g.members)
    plan = PruningPlan((DropBlock(first.id), KeepUnits(inner.id, tuple(range(0, inner.size, 2)))))
    assert prune(network, plan)(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_stochastic_depth_still_acts_in_training():
    graph = capture(Image(Stochastic()), example((1, 3, 8, 8))).graph
    (kept,) = [m for m in graph.modules() if isinstance(m, InTraining)]
    x = torch.ones(64, 12, 1, 1)
    assert torch.equal(kept.eval()(x), x) and set(kept.train()(x).unique().tolist()) == {0.0, 2.0}


def test_several_inputs_and_a_dict_of_lists_are_captured_and_cut():
    torch.manual_seed(0)
    model = TwoInputs().eval()
    x, y = torch.randn(2, 1, 3, 8, 8)
    network = find_groups(capture(model, (x, y)))
    assert sizes(network)["a"] == 12
    got = prune(network, every_second(network))(x, y)
    assert set(got) == {"map", "levels"} and got["map"].shape == (1, 4, 8, 8)
    before, after = tensors(model(x, y)), tensors(network.graph(x, y))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))


def test_a_recurrent_layer_is_a_leaf_with_a_reason_and_the_rest_is_offered():
    network = found("recurrent")
    frozen = {g.name: g.frozen for g in network.topology.groups}
    assert frozen["a"] == "there is no rule for GRU 'cell'" and frozen["b"] is None


def test_an_lstm_keeps_what_it_reads_and_the_layers_around_it_are_cut():
    network = found("long short-term memory")
    frozen = {g.name: g.frozen for g in network.topology.groups}
    assert frozen["first"] == "there is no rule for LSTM 'cell'" and sizes(network) == {"a": 12, "b": 8}


def test_the_channels_of_queries_and_keys_of_another_width_go_together():
    members = [set(g.members) for g in found("cross attention").topology.offered]
    assert any({f"middle.attention.{n}_proj.weight[0]" for n in "qk"} <= m for m in members)
    assert any({"middle.attention.v_proj.weight[0]", "middle.attention.out_proj.weight[1]"} <= m for m in members)
    assert any({"middle.memory.weight[0]", "middle.attention.k_proj.weight[1]"} <= m for m in members)


def test_an_embedding_is_cut_with_the_head_that_it_is_the_weight_of():
    torch.manual_seed(0)
    words = torch.arange(6).reshape(1, 6)
    network = find_groups(capture(Words().eval(), (words,)))
    (group,) = [g for g in network.topology.offered if "words.weight[1]" in g.members]
    assert group.size == 12 and {"head.weight[1]", "mix.weight[0]", "mix.weight[1]"} <= set(group.members)
    pruned = prune(network, PruningPlan((KeepUnits(group.id, (0, 2, 5)),)))
    assert pruned.words.weight is pruned.head.weight and pruned.head.weight.shape == (20, 3)
    assert pruned(words).shape == (1, 6, 20)


def test_a_forward_that_writes_into_a_view_and_reads_the_whole_is_refused():
    with pytest.raises(DeployError, match=r"it writes into a view of a tensor that it reads again \('mul_'\)"):
        capture(WritesView().eval(), example((1, 3, 4, 4)))


def test_a_weight_norm_is_folded_into_its_weight():
    network = found("weight norm")
    assert "middle.weight" in network.graph.state_dict() and sizes(network)["middle"] == 12


def test_a_wrong_rule_is_caught_by_the_proof(monkeypatch):
    """The channels of v, tied to those of q in the wrong order: every head shifted by one."""
    from pipeline.prune.rules import movement

    right = movement.folded

    def wrong(op, labels, space):
        result = right(op, labels, space)
        moved = {axis: np.roll(ids, 1) if len(op.out_shape) == 3 else ids for axis, ids in result.by_axis.items()}
        return type(result)(moved)

    monkeypatch.setattr(movement, "folded", wrong)
    network = find_groups(capture(Sequence(Attention()).eval(), example((1, 6, 12))), prove=False)
    reasons = proof.refute(network)
    assert any(reason.startswith("masking and cutting it differ by ") for reason in reasons.values())


@pytest.mark.parametrize(
    ("middle", "how"),
    [
        (lambda: nn.GroupNorm(3, 12), "statistics"),
        (ChannelsFirstNorm, "statistics"),
        (lambda: nn.Softmax(1), "softmax"),
        (lambda: Apply(lambda x: x * x.mean(1, keepdim=True)), "mean"),
        (lambda: Apply(lambda x: x.exp() * x.exp().neg().amax(1, keepdim=True)), "amax"),
    ],
    ids=["group norm", "layer norm", "softmax", "mean", "maximum"],
)
def test_the_reference_that_only_zeroes_would_refute_a_right_rule(middle, how):
    """Statistics, softmax, mean and maximum over what is left are part of the definition: zeroing is no substitute."""
    bare = find_groups(capture(Image(middle()).eval(), example((1, 3, 8, 8))), prove=False)
    assert how in {reader.how for reader in bare.readers}
    zeroed = tuple(replace(reader, how="zero") for reader in bare.readers)
    assert proof.refute(replace(bare, readers=zeroed))
    assert proof.refute(bare) == {}
