"""Networks that hold tokens first, (tokens, samples, channels), are ranked and repaired as those with samples first."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import capture
from pipeline.prune.criteria import _knockoffs
from pipeline.prune.criteria.base import PACKAGE
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune
from pipeline.prune.taps import DenseTaps
from profiles import plugins

COUNT = 8


class Tokens(nn.Module):
    """An encoder layer between two layers; `first`: the tokens lie first in it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=not first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.first:
            return self.head(self.encoder(x.transpose(0, 1)).mean(0))
        return self.head(self.encoder(x).mean(1))


@cache
def both(tokens: int) -> tuple[Evidence, Evidence]:
    """The same weights with tokens first and with samples first."""
    torch.manual_seed(0)
    nets = Tokens(True), Tokens(False)
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(COUNT, tokens, 3)
    samples = Samples([(x,)], torch.arange(COUNT) % 5)
    found = [Evidence(find_groups(capture(net.eval(), (x[:1],))), samples) for net in nets]
    return found[0], found[1]


def test_a_capture_knows_along_which_axis_the_samples_lie():
    first, last = (evidence.network for evidence in both(10))
    assert first.samples["encoder_linear1"] == 1 and "head" not in first.samples and "embed" not in first.samples
    assert not last.samples
    assert {reader.op: reader.samples for reader in first.readers}["encoder_linear1"] == 1


@pytest.mark.parametrize("tokens", [16, COUNT, 10], ids=["a multiple of the samples", "as many", "neither"])
@pytest.mark.parametrize("criterion", plugins.names(PACKAGE))
def test_the_place_of_the_samples_changes_no_score(criterion, tokens, monkeypatch):
    monkeypatch.setattr(_knockoffs, "STEPS", 5)
    first, last = (rank(evidence, criterion) for evidence in both(tokens))
    assert len(first) == 4 and set(first) == set(last)
    for id, ranking in first.items():
        assert ranking.removal_order == last[id].removal_order
        assert np.allclose(ranking.marginal_loss, last[id].marginal_loss, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", [16, COUNT, 10])
def test_least_squares_gives_the_same_weights_wherever_the_samples_lie(tokens):
    """On half of the samples, and on some positions of each, which have to be those of the same sample."""
    fixed = []
    for evidence in both(tokens):
        network = evidence.network
        plan = PruningPlan(tuple(KeepUnits(g.id, tuple(range(g.size // 2))) for g in network.topology.offered))
        taps = DenseTaps(network, evidence.samples.joined(), limit=24, fitted=COUNT // 2)
        fixed.append(repair(prune(network, plan), network, plan, evidence.samples, taps=taps).state_dict())
    assert fixed[0].keys() == fixed[1].keys()
    assert all(torch.allclose(value, fixed[1][name], rtol=1e-3, atol=1e-4) for name, value in fixed[0].items())
