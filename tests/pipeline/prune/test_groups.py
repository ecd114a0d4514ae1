import dataclasses

import numpy as np
import pytest
import torch
from prune_nets import NETS, Chain, Normed, Residual, example

from pipeline.nouns import DropBlock, KeepUnits, PruningPlan, Topology
from pipeline.prune import proof
from pipeline.prune.capture import Network, capture
from pipeline.prune.execute import MaskedRun
from pipeline.prune.groups import find_groups, propagate
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.surgery import prune


def found(name: str) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(NETS[name]().eval(), example()))


def offered(network: Network) -> dict[str, int]:
    return {group.name: group.size for group in network.topology.offered}


EXPECTED = {
    "chain": {"a.0": 8, "b.0": 12},
    "flat": {"a.0": 8},
    "residual identity": {"stem.0": 8, "conv1": 12},
    "residual projection": {"stem.0": 8, "conv1": 12, "project": 16},
    "residual pad": {"stem.0": 8, "conv1": 12, "conv2": 8},
    "depthwise": {"a.0": 8, "pw.0": 12},
    "depthwise multiplier": {"a.0": 8, "pw.0": 12},
    "grouped": {"a.0": 4, "g.0": 6, "b.0": 8},
    "concat": {"a.0": 6, "b.0": 8, "c.0": 8},
    "chunk": {"b.0": 6, "c.0": 8},
    "split": {"b.0": 6, "c.0": 8},
    "slice": {"b.0": 6, "c.0": 8},
    "shuffle": {"a.0": 12, "b.0": 8},
    "shuffle module": {"a.0": 12, "b.0": 8},
    "squeeze-excite": {"a.0": 12, "down": 6, "b.0": 8},
    "normed": {"a": 4, "up": 16},
    "transposed": {"a.0": 8, "up": 6},
    "transposed grouped": {"a.0": 4, "up": 3},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_have_the_units_that_the_coupling_leaves_free(name):
    network = found(name)
    sizes = offered(network)
    for group, size in EXPECTED[name].items():
        assert sizes[group] == size, [(g.name, g.size, g.frozen) for g in network.topology.groups]


def test_the_halves_of_a_split_are_two_groups():
    network = found("chunk")
    assert sorted(g.size for g in network.topology.offered if g.name == "a.0") == [6, 6]


def test_the_outer_channels_of_a_padded_shortcut_are_a_group_of_their_own():
    """Stage-1 channels run on in the middle of stage 2; what the pad adds is free, left and right alike."""
    groups = {g.name: g for g in found("residual pad").topology.offered}
    assert {"stem.0.weight[0]", "conv2.weight[0]", "conv1.weight[1]"} <= set(groups["stem.0"].members)
    assert "stem.0.weight[0]" not in groups["conv2"].members and groups["conv2"].size == 8


@pytest.mark.parametrize("name", NETS)
def test_every_group_masked_equals_the_network_cut(name):
    network = found(name)
    assert network.topology.offered
    for group in network.topology.offered:
        plan = PruningPlan((KeepUnits(group.id, tuple(range(0, group.size, 2))),))
        pruned = prune(network, plan)
        keep = torch.from_numpy(kept_units(network.topology, plan))
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            masked = MaskedRun(network.graph, network.readers, keep).run(x)
            assert torch.allclose(pruned(x), masked, atol=1e-4), group.name
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.graph.parameters())


@pytest.mark.parametrize("shortcut", ["identity", "projection", "pad"])
def test_a_residual_branch_is_a_removable_block_whatever_its_shortcut(shortcut):
    network = find_groups(capture(Residual(shortcut).eval(), example()))
    (block,) = network.topology.removable
    assert {"conv1.weight", "bn1.running_mean", "conv2.weight"} <= set(block.params)
    pruned = prune(network, PruningPlan((DropBlock(block.id),)))
    names = dict(pruned.named_modules())
    assert (
        "conv1" not in names
        and "conv2" not in names
        and ("project.weight" in pruned.state_dict()) == (shortcut == "projection")
    )
    assert pruned(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_a_group_inside_a_block_knows_it():
    network = find_groups(capture(Residual("identity").eval(), example()))
    inside = {g.name: g.block for g in network.topology.offered}
    assert inside["conv1"] == network.topology.blocks[0].id and inside["stem.0"] is None


def test_inputs_and_outputs_are_frozen_with_the_reason():
    frozen = {g.name: g.frozen for g in find_groups(capture(Chain(), example())).topology.groups if g.frozen}
    assert frozen["head.fc"] == "it is an output of the network"
    assert frozen["input of a.0"] == "it is an input of the network"


def test_prune_freeze_keeps_a_layer_and_says_so():
    network = find_groups(capture(Chain(), example()), freeze=("a",))
    reasons = {g.frozen for g in network.topology.groups if "a.0.weight[0]" in g.members}
    assert reasons == {"prune.freeze names 'a'"}


def _tampered(network: Network) -> Network:
    """The coupling of the second layer's inputs shifted by one: what a wrong rule would give."""
    params = {name: dict(axes) for name, axes in network.topology.params.items()}
    params["b.0.weight"][1] = np.roll(params["b.0.weight"][1], 1)
    topology: Topology = dataclasses.replace(network.topology, params=params)
    return dataclasses.replace(network, topology=topology)


def test_a_wrong_coupling_is_refuted_and_the_others_stay():
    network = find_groups(capture(Chain(), example()), prove=False)
    reasons = proof.refute(_tampered(network))
    wrong = next(g for g in network.topology.offered if g.name == "a.0")
    assert set(reasons) == {wrong.id} and reasons[wrong.id].startswith("masking and cutting it differ by ")


def test_the_proof_is_not_vacuous_on_zero_initialised_layer_scales():
    """With gamma = 0 a wrong coupling of the branch would move nothing; random scales make it show."""
    network = find_groups(capture(Normed(), example()), prove=False)
    params = {name: dict(axes) for name, axes in network.topology.params.items()}
    params["down.weight"][1] = np.roll(params["down.weight"][1], 1)
    tampered = dataclasses.replace(network, topology=dataclasses.replace(network.topology, params=params))
    inner = next(g for g in network.topology.offered if g.name == "up")
    assert inner.id in proof.refute(tampered)
    assert proof.refute(network) == {}


def test_group_ids_do_not_change_between_captures():
    first, second = (find_groups(capture(Chain(), example())).topology for _ in range(2))
    assert [g.id for g in first.groups] == [g.id for g in second.groups]


def test_labels_of_an_addition_are_tied_position_by_position():
    network = capture(Residual("identity"), example())
    space = propagate(network)
    units = space.units()
    add = space.tensors["residual_add_0"].ids
    stem = space.tensors["stem_0"].ids
    assert (units[add] == units[stem]).all()


def test_a_plan_of_another_network_is_refused_by_name():
    network = found("chain")
    from profiles.errors import DeployError

    with pytest.raises(DeployError, match=r"^the plan cuts a group 'nowhere' that this network does not have\."):
        resolve(network.topology, PruningPlan((KeepUnits("nowhere", (0,)),)))
    group = network.topology.offered[0]
    with pytest.raises(DeployError, match=r"^the plan keeps unit 99 of group 'a\.0', which has 8 units\."):
        resolve(network.topology, PruningPlan((KeepUnits(group.id, (99,)),)))
    with pytest.raises(DeployError, match=r"^the plan leaves no channel of 'a\.0\.weight'\."):
        resolve(network.topology, PruningPlan((KeepUnits(group.id, ()),)))


def test_a_plan_reads_back_from_its_json():
    plan = PruningPlan((KeepUnits("g", (0, 2)), DropBlock("b")))
    assert PruningPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="version"):
        PruningPlan.from_json('{"version": 2, "edits": []}')
