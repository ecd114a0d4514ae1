"""Rules of a user's own: what they couple is proved like what ours do, and a mistake in one is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from leaf_nets import Swish
from prune_nets import example
from torch import Tensor, nn

from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.execute import MaskedRun
from pipeline.prune.groups import find_groups
from pipeline.prune.labels import NONE, Labels, LabelSpace, Op
from pipeline.prune.own_rules import unmet
from pipeline.prune.plan import kept_units
from pipeline.prune.surgery import prune
from profiles.errors import DeployError

HERE = __name__


class Steps(torch.autograd.Function):
    """Multiples of a step that every channel has."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor) -> Tensor:
        scale = step.reshape(1, -1, 1, 1).abs() + 0.1
        return torch.round(x / scale) * scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Mixer(nn.Module):
    """Reads all channels and makes others: a layer of the user's, with an inner one and a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.scale, self.power = nn.Linear(inputs, outputs), nn.Parameter(torch.rand(outputs)), 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.movedim(1, -1)).movedim(-1, 1)
        return torch.tanh(y) ** self.power * self.scale.reshape(1, -1, 1, 1)


class Halves(nn.Module):
    """Two outputs: the first channels and the last."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[1] // 2
        return x[:, :n].clone(), x[:, n:] * 2


@torch.fx.wrap
def bent(x: Tensor, by: float) -> Tensor:
    return torch.where(x > 0, x, x * by)


@torch.library.custom_op("own_rules_test::lift", mutates_args=())
def lift(x: Tensor, by: float) -> Tensor:
    return x + by * x.abs()


@lift.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


lift.register_autograd(
    lambda ctx, g: (g * (1 + ctx.by * ctx.saved_tensors[0].sign()), None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "by", inputs[1])),
)


class Net(nn.Module):
    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor], extra: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 5, 3, 1, 1)
        self.step, self.extra, self.middle = nn.Parameter(torch.rand(8)), extra or nn.Identity(), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self, torch.tanh(self.a(x))))


def passing(op: Op, space: LabelSpace) -> None:
    space.tensors[op.output] = space.tensors[op.inputs[0]]


def stepping(op: Op, space: LabelSpace) -> None:
    space.tie(space.along(op, 0, 1), space.along(op, 1, 0))
    passing(op, space)


def mixing(op: Op, space: LabelSpace) -> None:
    assert op.attrs == {"power": 2} and op.params["scale"] == "extra.scale"
    space.param(op.params["inner.weight"], 1, space.read(op, 1))
    made = space.produce(op.params["inner.weight"], 0, op.out_shape[1])
    for role in ("inner.bias", "scale"):
        space.param(op.params[role], 0, made)
    space.tensors[op.output] = Labels.channels(made)


def halving(op: Op, space: LabelSpace) -> None:
    one, two = np.split(space.along(op, 0, 1), 2)
    space.tie(one, two)
    for name, ids in zip(op.pieces, (one, two), strict=True):
        space.tensors[name] = Labels.channels(ids)


RULES = {
    "autograd function": (lambda: Net(lambda s, x: Steps.apply(x, s.step)), f"{HERE}.Steps", stepping, 8),
    "module": (lambda: Net(lambda s, x: s.extra(x), Mixer(8, 8)), f"{HERE}.Mixer", mixing, 8),
    "several outputs": (lambda: Net(lambda s, x: torch.cat(s.extra(x), 1), Halves()), f"{HERE}.Halves", halving, 4),
    "wrapped function": (lambda: Net(lambda s, x: bent(x, by=0.3)), f"{HERE}.bent", passing, 8),
    "custom operator": (lambda: Net(lambda s, x: lift(x, 0.3)), "own_rules_test::lift", passing, 8),
    "custom operator by packet": (
        lambda: Net(lambda s, x: torch.ops.own_rules_test.lift(x, 0.3)), "own_rules_test::lift", passing, 8,
    ),
}  # fmt: skip


def found(make: Callable[[], nn.Module], kind: str, rule: Callable[[Op, LabelSpace], None]) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(make().eval(), example(), {kind: rule}))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_of_ones_own_offers_a_group_that_can_be_cut(name: str):
    make, kind, rule, units = RULES[name]
    network = found(make, kind, rule)
    group = next(g for g in network.topology.groups if g.name == "a")
    assert group.frozen is None and group.size == units
    plan = PruningPlan((KeepUnits(group.id, (0, 2, 3)),))
    pruned, keep = prune(network, plan), torch.from_numpy(kept_units(network.topology, plan))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(pruned(x), MaskedRun(network.graph, network.readers, keep).run(x), atol=1e-5)
    assert pruned.a.weight.shape[0] == 3 * 8 // units


@pytest.mark.parametrize("name", sorted(set(RULES) - {"wrapped function", "module", "several outputs"}))
def test_without_its_rule_such_an_operator_freezes_what_flows_through_it(name: str):
    make, kind, _, _ = RULES[name]
    network = find_groups(capture(make().eval(), example()))
    frozen = {group.name: group.frozen for group in network.topology.groups}
    assert str(frozen["a"]).startswith(f"there is no rule for {kind} (") or f"{kind} 'function_0'" in str(frozen["a"])


def test_all_that_a_module_with_a_rule_makes_can_be_cut_with_its_inner_layers():
    network = found(*RULES["module"][:3])
    made = next(g for g in network.topology.offered if g.name == "extra.inner")
    assert set(made.members) == {"extra.inner.weight[0]", "extra.inner.bias[0]", "extra.scale[0]", "b.weight[1]"}
    pruned = prune(network, PruningPlan((KeepUnits(made.id, (1, 5)),)))
    assert pruned.extra.inner.out_features == 2 and pruned(torch.randn(1, 3, 8, 8)).shape == (1, 5, 8, 8)


WRONG = {  # rules that say what is not so -> what the proof finds
    "in another order": lambda op, space: space.tensors.update(
        {op.output: Labels.channels(space.along(op, 0, 1)[::-1].copy())}
    ),
    "without the step": passing,
    "nothing passes": lambda op, space: space.tensors.update({op.output: NONE}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught_by_the_proof(name: str):
    make, kind, _, _ = RULES["autograd function"]
    network = found(make, kind, WRONG[name])
    assert "a" not in {group.name for group in network.topology.offered}
    coupled = find_groups(capture(make().eval(), example(), {kind: WRONG[name]}), prove=False)
    assert "a" in {group.name for group in coupled.topology.offered}, "it was the proof that said no"


def test_a_rule_that_forgets_that_channels_are_mixed_is_caught_by_the_proof():
    def forgets(op: Op, space: LabelSpace) -> None:
        space.param(op.params["inner.weight"], 1, space.along(op, 0, 1))
        space.tensors[op.output] = NONE

    make, kind, _, _ = RULES["module"]
    assert "a" not in {group.name for group in found(make, kind, forgets).topology.offered}


MISTAKES = {
    "no labels": (lambda op, space: None, "sets no labels of its output 'function_0'."),
    "no labels object": (
        lambda op, space: space.tensors.update({op.output: [1, 2]}), "sets no labels of its output 'function_0'.",
    ),
    "too few": (
        lambda op, space: space.tensors.update({op.output: Labels.channels(space.along(op, 0, 1)[:3])}),
        "gives 3 labels along axis 1 of its output 'function_0', which has 8.",
    ),
    "no such axis": (
        lambda op, space: space.tensors.update({op.output: Labels.channels(space.fresh(8), 7)}),
        "labels axis 7 of its output 'function_0', which has no such axis.",
    ),
    "made up": (
        lambda op, space: space.tensors.update({op.output: Labels.channels(np.arange(8) + 10**6)}),
        "makes labels up: 1000007 along axis 1 of 'function_0'.",
    ),
    "no such parameter": (
        lambda op, space: (passing(op, space), space.param("stepp", 0, space.along(op, 0, 1))),
        "names the parameter 'stepp', which is not there.",
    ),
    "parameter of another size": (
        lambda op, space: (passing(op, space), space.param("b.bias", 0, space.along(op, 0, 1))),
        "gives 8 labels along axis 0 of the parameter 'b.bias', which has 5.",
    ),
    "parameter without the axis": (
        lambda op, space: (passing(op, space), space.param("step", 1, space.along(op, 0, 1))),
        "labels axis 1 of the parameter 'step', which has no such axis.",
    ),
    "reads statistics": (
        lambda op, space: (passing(op, space), space.read(op, 1, "statistics")), "reads with how = 'statistics'.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_rule_is_named(name: str):
    rule, sentence = MISTAKES[name]
    make, kind, _, _ = RULES["autograd function"]
    with pytest.raises(DeployError) as caught:
        found(make, kind, rule)
    assert caught.value.message.startswith(f"the rule for '{kind}' {sentence}")


def test_an_operator_that_does_not_bear_the_cut_is_refuted_not_a_crash():
    class Counts(nn.Module):
        """Knows how many channels there are by heart."""

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 8
            return {8: x}[x.shape[1]]

    kind = f"{HERE}.{Counts.__qualname__}"
    network = found(lambda: Net(lambda s, x: s.extra(x), Counts()), kind, passing)
    reasons = {g.name: g.frozen for g in network.topology.groups}
    assert str(reasons["a"]).startswith("cutting it fails: ")


def test_a_kind_that_the_network_does_not_have_is_told_with_its_near_miss():
    model = Net(lambda s, x: Swish.apply(x))
    network = capture(model.eval(), example(), {"leaf_nets.Swich": passing})
    (said,) = unmet(network, model, [("leaf_nets.Swich", "my_rules")])
    assert said == (
        "my_rules names 'leaf_nets.Swich', which the network does not have. Did you mean 'leaf_nets.Swish'?"
    )
    assert unmet(capture(model, example(), {"leaf_nets.Swish": passing}), model, [("leaf_nets.Swish", "x")]) == []
