"""The proof hears every layer of a deep network: on weights that are only random it would have proved nothing there."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, fx, nn

from pipeline.prune import proof
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups


class Excited(nn.Module):
    """A residual branch with a gate on its channels, as in EfficientNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.squeeze = nn.Conv2d(2 * width, 4, 1)
        self.gate = nn.Conv2d(4, 2 * width, 1)
        self.down = nn.Conv2d(2 * width, width, 1, bias=False)
        self.after = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.silu(self.norm(self.up(x)))
        gate = self.gate(torch.nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return x + self.after(self.down(y * gate.sigmoid()))


class Attending(nn.Module):
    """A layer of one attention head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights = (self.query(y) @ self.key(y).transpose(1, 2) / 4).softmax(-1)
        return x + torch.relu(self.out(weights @ self.value(y)))


def deep(blocks: int = 30) -> tuple[nn.Module, Tensor]:
    stem = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(stem, *(Excited(8) for _ in range(blocks)), nn.Flatten(), nn.Linear(512, 5)), torch.randn(
        1, 3, 8, 8
    )


def coupled(made: tuple[nn.Module, Tensor]) -> Network:
    model, example = made
    return find_groups(capture(model.eval(), (example,)), prove=False)


def rolled(network: Network, weight: str) -> Network:
    """What a wrong rule would give: the inputs of a layer shifted by one."""
    params = {name: dict(axes) for name, axes in network.topology.params.items()}
    params[weight][1] = np.roll(params[weight][1], 1)
    return dataclasses.replace(network, topology=dataclasses.replace(network.topology, params=params))


def reactions(network: Network, *, levelled: bool) -> Tensor:
    """The largest of each group's."""
    judge = proof._Proof(network, 0)
    if not levelled:
        judge.graph = proof.randomised(network.graph, 0)
    found, _ = proof._reactions(judge, ())
    return torch.stack([found[list(group.units)].max() for group in network.topology.offered])


def test_every_group_of_a_deep_network_with_gates_is_heard():
    network = coupled(deep())
    assert float(reactions(network, levelled=False).min()) < 1e-12, "this network would have been deaf"
    assert float(reactions(network, levelled=True).min()) > 1e-2
    assert proof.refute(network) == {}


def test_a_wrong_coupling_deep_inside_is_found():
    network = coupled(deep())
    (wrong,) = (group for group in network.topology.offered if "1.up.weight[0]" in group.members)
    assert list(proof.refute(rolled(network, "1.down.weight"))) == [wrong.id]


def test_each_channel_varies_by_about_one_about_its_bias():
    network = coupled(deep())
    judge = proof._Proof(network, 0)
    seen: dict[str, Tensor] = {}

    class Watched(fx.Interpreter):
        def call_module(self, target, args, kwargs):
            seen[target] = super().call_module(target, args, kwargs)
            return seen[target]

    with torch.no_grad():
        Watched(judge.graph).run(*judge.inputs)
    layers = {name: out for name, out in seen.items() if name.endswith((".up", ".down", ".squeeze", ".gate"))}
    assert len(layers) == 120
    for name, out in layers.items():
        means, spread = proof._moments(out, 1)
        assert 0.99 < spread < 1.01, name
        bias = judge.graph.get_submodule(name).bias
        assert bias is None or float(means.abs().max()) < 1.5, name
    normed = [out for name, out in seen.items() if name.endswith((".norm", ".after"))]
    assert all(0.3 < proof._moments(out, 1)[1] < 3 for out in normed)


def test_a_group_that_the_outputs_cannot_react_to_is_refuted_as_such():
    class Alone(nn.Module):
        """A softmax over one token gives 1, whatever its query and key are."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(8, 16), Attending(16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(self.first(x)))

    network = coupled((Alone(), torch.randn(1, 1, 8)))
    (keys,) = (group for group in network.topology.offered if "attention.key.weight[0]" in group.members)
    assert proof.refute(network) == {keys.id: proof.SILENT}


def test_a_network_whose_parameters_take_no_gradients_has_the_same_groups():
    model, example = deep(2)
    free = find_groups(capture(model.eval(), (example,)))
    frozen = find_groups(capture(model.requires_grad_(False).eval(), (example,)))
    assert free.topology.offered and frozen.topology.offered == free.topology.offered
    assert not any(parameter.requires_grad for parameter in frozen.graph.parameters())
