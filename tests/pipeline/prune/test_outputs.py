"""Networks with several outputs, as detectors have: every one of them counts in what a cut loses."""

from __future__ import annotations

import pytest
import torch
from prune_nets import Head, conv, example, lived_in
from torch import Tensor, nn

from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import (
    Evidence,
    Samples,
    answers,
    divergence,
    joined,
    mean_divergence,
    outputs_of,
    require_scores,
)
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from pipeline.prune.repair import repair
from pipeline.prune.sensitivity import LossProbe, RepairProbe
from pipeline.prune.surgery import prune
from profiles.errors import DeployError


class Detector(nn.Module):
    """Scores, boxes from a branch of their own, and anchors that no input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scores = conv(3, 8), Head(8)
        self.branch, self.boxes = conv(8, 12), nn.Conv2d(12, 4, 1)
        self.register_buffer("anchors", torch.rand(12, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.stem(x)
        return self.scores(x), {"boxes": self.boxes(self.branch(x)), "anchors": self.anchors * 2.0}


class TokensFirst(nn.Module):
    """Gives tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).flatten(2).permute(2, 0, 1)


class Chosen(nn.Module):
    """Gives the class, not the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x)).argmax(1)


def network_of(model: nn.Module) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(lived_in(model), example()))


def detector() -> Network:
    torch.manual_seed(0)
    return network_of(Detector())


def images(*counts: int) -> Samples:
    source = torch.Generator().manual_seed(3)
    return Samples([(torch.randn(count, 3, 8, 8, generator=source),) for count in counts])


def narrowed(network: Network, name: str, width: int) -> PruningPlan:
    group = next(group for group in network.topology.offered if group.name == name)
    return PruningPlan((KeepUnits(group.id, tuple(range(width))),))


@pytest.mark.parametrize("mode", ["none", "least-squares"])
def test_a_cut_of_what_only_the_second_output_reads_is_a_loss(mode):
    network, samples = detector(), images(32, 32)
    plan = narrowed(network, "branch.0", 1)
    if mode == "none":
        loss = RepairProbe(network, samples, Samples([]), "none", {}).loss(plan)
    else:
        loss = LossProbe(network, samples).loss(plan)
    assert loss > 0.02
    dense = outputs_of(network.graph, samples, network.answers)
    assert mean_divergence(prune(network, plan), samples, dense, network.answers) > 0.02


def test_a_loss_is_the_mean_over_the_outputs_that_say_something():
    network, samples = detector(), images(32)
    model = prune(network, narrowed(network, "branch.0", 4))
    (dense,), (cut,) = (outputs_of(m, samples, network.answers) for m in (network.graph, model))
    assert [len(each) for each in dense] == [32, 32] and torch.equal(dense[0], cut[0]), "scores and boxes, no anchors"
    boxes = (cut[1] - dense[1]).square().flatten(1).mean(1) / dense[1].var(correction=0)
    assert torch.allclose(divergence(cut, dense), boxes / 2)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "singe", "information", "scop"])
def test_criteria_of_a_loss_see_the_second_output_without_labels(criterion, monkeypatch):
    from pipeline.prune.criteria import _knockoffs

    monkeypatch.setattr(_knockoffs, "STEPS", 20)
    network = detector()
    rankings = rank(Evidence(network, images(12, 12)), criterion)
    ranking = next(rankings[group.id] for group in network.topology.offered if group.name == "branch.0")
    assert max(ranking.marginal_loss) > 0


@pytest.mark.parametrize("sizes", [(12, 7), (4, 4), (1,)])
def test_anchors_are_left_out_whatever_the_batch(sizes):
    network, samples = detector(), images(*sizes)
    found = joined(outputs_of(network.graph, samples, network.answers))
    assert [each.shape for each in found] == [(sum(sizes), 5), (sum(sizes), 4, 8, 8)]


@pytest.mark.parametrize("count", [3, 64])
def test_an_output_with_tokens_first_is_judged_by_sample(count):
    """64 is the number of tokens too."""
    network = network_of(TokensFirst())
    (x,) = images(count).joined()
    said = answers(network.graph(x), count, network.answers)
    assert network.answers == (1,) and torch.equal(said[0], network.graph(x).transpose(0, 1))
    samples, plan = images(24), narrowed(network, "a.0", 4)
    loss = LossProbe(network, samples).loss(plan)
    fixed = repair(prune(network, plan), network, plan, samples, "least-squares")
    dense = outputs_of(network.graph, samples, network.answers)
    assert loss > 0 and mean_divergence(fixed, samples, dense, network.answers) < 1


class Numbers(nn.Module):
    """Scores, one number a sample, boxes masked by minus infinity, and rows that are no sample's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), Head(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(self.a(x))
        masked = torch.where(y > 0, y, torch.full_like(y, -torch.inf))
        return {"y": y, "speed": y[:, :1] * 2, "masked": masked, "with rows": torch.cat([y, torch.ones(3, 5)])}


def test_a_loss_does_not_depend_on_how_samples_are_batched_and_infinite_entries_do_not_count():
    network = network_of(Numbers())
    assert network.answers == (0, 0, 0, None), "the last one holds no whole number of rows a sample"
    source, plan = torch.randn(65, 3, 8, 8, generator=torch.Generator().manual_seed(3)), narrowed(network, "a.0", 4)
    cut, losses = prune(network, plan), []
    for sizes in ([64, 1], [65], [20, 45]):
        samples = Samples([(batch,) for batch in source.split(sizes)])
        dense = outputs_of(network.graph, samples, network.answers)
        losses.append(mean_divergence(cut, samples, dense, network.answers))
        assert mean_divergence(network.graph, samples, dense, network.answers) == 0
    assert losses[0] > 0.01 and losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_an_output_that_no_device_gives_by_sample_is_told_before_any_work():
    with pytest.raises(DeployError, match=r"^output 4 of the network has the shape \[4, 5\] for 1 samples: "):
        require_scores(network_of(Numbers()))
    with pytest.raises(DeployError, match=r"^output 1 of the network has the shape \[64, 1, 5\] for 1 samples: "):
        require_scores(network_of(TokensFirst()))


def test_a_network_with_nested_outputs_and_choices_recovers(tmp_path):
    from pipeline.recover.train import RecoverData, recover
    from profiles.schema import RecoverSpec

    class Choosing(Detector):
        def forward(self, x: Tensor) -> dict[str, object]:
            scores, others = super().forward(x)
            return {"scores": scores, "others": others, "class": scores.argmax(1)}

    network = network_of(Choosing())
    cut, batches = prune(network, narrowed(network, "branch.0", 6)), torch.randn(8, 32, 3, 8, 8).unbind()
    data = RecoverData(
        lambda epoch, seed: iter([((x,), torch.zeros(32)) for x in batches]), lambda outputs, targets: 0.0, None
    )
    spec = RecoverSpec(alpha=1.0, learning_rate=0.02, epochs=4)
    history = recover(cut, network.graph, data, spec, tmp_path / "checkpoint").history
    losses = [epoch.loss for epoch in history if epoch.attempt == 0]  # the score says nothing, so it tries once more
    assert losses[-1] < 0.7 * losses[0]


def test_a_network_that_gives_no_scores_is_refused():
    network = network_of(Chosen())
    with pytest.raises(DeployError, match=r"^the network gives no scores of its samples, only \[2\] of int64\.\n"):
        outputs_of(network.graph, images(2), network.answers)
