"""SInGE, SCOP and LDA deconvolution: what their scores are, seen on networks small enough to know."""

import copy

import numpy as np
import pytest
import torch
from prune_nets import NETS, Chain, example
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.prune.capture import Network, capture
from pipeline.prune.criteria import _knockoffs, scop, scop_generator, singe
from pipeline.prune.criteria.lda_deconv import discriminability
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from profiles.errors import UsageError

OURS = ("singe", "scop", "scop-generator", "lda-deconv")
FREE = ("singe", "scop", "lda-deconv")
"""Those that train no generator: quick enough for many networks."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(scop_generator, "STEPS", 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network_of(model: nn.Module) -> Network:
    return find_groups(capture(model.eval(), example()))


def lived_in(model: nn.Module) -> nn.Module:
    """Batch norms with scales, shifts and statistics that differ from channel to channel."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def some_samples(count: int = 24, classes: int = 5) -> Samples:
    inputs = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return Samples([(part,) for part in inputs.split(10)], torch.arange(count) % classes)


def scores(network: Network, samples: Samples, criterion: str) -> dict[str, dict[int, float]]:
    """Group name and place -> score of each unit, by its index in the group."""
    names = {group.id: f"{group.name} {at}" for at, group in enumerate(network.topology.offered)}
    rankings = rank(Evidence(network, samples), criterion)
    return {names[id]: dict(zip(r.removal_order, r.marginal_loss, strict=True)) for id, r in rankings.items()}


@pytest.mark.parametrize("name", [name for name in NETS if not name.startswith("transposed")])
@pytest.mark.parametrize("criterion", FREE)
def test_every_offered_group_of_every_coupling_is_ranked(name, criterion, monkeypatch):
    monkeypatch.setattr(_knockoffs, "STEPS", 5)
    torch.manual_seed(0)
    network = network_of(lived_in(NETS[name]()))
    found = scores(network, some_samples(), criterion)
    assert len(found) == len(network.topology.offered)
    for own in found.values():
        assert all(np.isfinite(value) and value >= 0 for value in own.values())
    assert any(len(set(own.values())) > 1 for own in found.values())


class Windows(nn.Module):
    """Attention over the positions of each of four windows, which lie in the leading axis with the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.qkv, self.out = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.place, self.up, self.head = nn.Parameter(torch.randn(16, 16)), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).reshape(-1, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-2, -1) + self.place * 0.1).softmax(-1) @ v)
        return self.head(F.gelu(self.up(x)).mean(1).reshape(-1, 4, 12).mean(1))


@pytest.mark.parametrize("criterion", FREE)
def test_samples_that_are_folded_with_their_windows_are_ranked(criterion, monkeypatch):
    monkeypatch.setattr(_knockoffs, "STEPS", 5)
    torch.manual_seed(0)
    network = network_of(Windows())
    found = scores(network, some_samples(), criterion)
    assert {"up"} <= {name.split()[0] for name in found} and len(found) == len(network.topology.offered)
    assert any(len(set(own.values())) > 3 for own in found.values())


@pytest.mark.parametrize("criterion", ["singe", "scop", "scop-generator"])
def test_outputs_that_are_no_logits_are_ranked_without_labels(criterion, monkeypatch):
    monkeypatch.setattr(_knockoffs, "STEPS", 5)
    torch.manual_seed(0)
    network = network_of(NETS["transposed"]())
    found = scores(network, Samples(some_samples().inputs), criterion)
    assert len(found) == len(network.topology.offered)


@pytest.mark.parametrize("criterion", OURS)
def test_channels_in_another_order_get_their_scores_in_that_order(criterion, monkeypatch):
    monkeypatch.setattr(_knockoffs, "STEPS", 10)
    torch.manual_seed(0)
    model = lived_in(Chain())
    order = torch.randperm(8)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for value in [moved.a[0].weight, *moved.a[1].parameters(), moved.a[1].running_mean, moved.a[1].running_var]:
            value.copy_(value[order].clone())
        moved.b[0].weight.copy_(model.b[0].weight[:, order])
    before, after = (scores(network_of(m), some_samples(), criterion) for m in (model, moved))
    for name, own in after.items():
        places = order.tolist() if name.startswith("a.0") else range(12)
        assert [own[i] for i in range(len(own))] == pytest.approx([before[name][p] for p in places], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("criterion", ["singe", "lda-deconv"])
def test_a_unit_that_nothing_reads_scores_nothing(criterion):
    torch.manual_seed(0)
    model = lived_in(Chain())
    with torch.no_grad():
        model.b[0].weight[:, 5] = 0
    own = scores(network_of(model), some_samples(), criterion)["a.0 0"]
    assert own[5] == 0 and sum(value > 0 for value in own.values()) >= 5


# --- SInGE ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """No norms and no biases, so that a gate on a unit is the same as a factor on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def test_singe_is_the_gradient_times_the_weights_summed_over_the_path(monkeypatch):
    """Σ_s |⟨∇_{W(s)} L, W(s)⟩| with W(s) = μ^s W of all units of the layer, sample by sample, from shrunk weights."""
    monkeypatch.setattr(singe, "MOST", 4)
    torch.manual_seed(0)
    model = Plain()
    samples = some_samples(4)
    own = scores(network_of(model), samples, "singe")["a 0"]
    (x,), expected = samples.joined(), torch.zeros(6)
    for step in range(singe.STEPS):
        shrunk = copy.deepcopy(model)
        shrunk.a.weight.data *= singe.SHRINK**step
        for one, target in zip(x.split(1), samples.targets.split(1), strict=True):
            (gradient,) = torch.autograd.grad(F.cross_entropy(shrunk(one), target), shrunk.a.weight)
            expected += (1 - singe.SHRINK) * (gradient * shrunk.a.weight).sum((1, 2, 3)).abs().detach() / 4
    assert [own[i] for i in range(6)] == pytest.approx(expected.tolist(), rel=1e-4)


def test_singe_without_labels_sees_what_a_gradient_at_the_dense_network_cannot():
    """The divergence from the dense outputs has no slope there, and rises on the way to a removal."""
    torch.manual_seed(0)
    network = network_of(lived_in(Chain()))
    own = scores(network, Samples(some_samples().inputs), "singe")["a.0 0"]
    assert min(own.values()) > 0


# --- SCOP ----------------------------------------------------------------------------------------------------------


def test_redrawn_codes_keep_mean_and_covariance_and_forget_the_codes():
    source = torch.Generator().manual_seed(0)
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, -1.0, 1.0]])
    codes = torch.randn(20000, 3, generator=source) @ mix.T + torch.tensor([1.0, -2.0, 3.0])
    drawn = _knockoffs.redrawn(codes, source)
    assert torch.allclose(drawn.mean(0), codes.mean(0), atol=0.05)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(codes.T), atol=0.1)
    assert float(torch.corrcoef(torch.cat([codes, drawn], 1).T)[:3, 3:].abs().max()) < 0.03


@pytest.mark.parametrize("criterion", ["scop", "scop-generator"])
@pytest.mark.parametrize("x", [torch.randn(1, 3, 8, 8), torch.ones(6, 3, 8, 8), torch.zeros(1, 3, 8, 8)])
def test_inputs_that_have_no_covariance_are_their_own_knockoffs(x, criterion, monkeypatch):
    monkeypatch.setattr(_knockoffs, "STEPS", 2)
    network = network_of(lived_in(Chain()))
    for ranking in rank(Evidence(network, Samples([(x,)], torch.arange(len(x)) % 5)), criterion).values():
        assert np.isfinite(ranking.marginal_loss).all() and min(ranking.marginal_loss) >= 0
    axes = scop.PrincipalAxes(x)
    assert torch.equal(_knockoffs.knockoffs(x, axes, torch.Generator().manual_seed(0)), x)


def _pictures(count: int) -> Tensor:
    """Smooth blobs of random colour and place on noise, (N, 3, 16, 16)."""
    source = torch.Generator().manual_seed(5)
    coarse = torch.randn(count, 3, 4, 4, generator=source) + 0.5
    smooth = F.interpolate(coarse, (16, 16), mode="bilinear", align_corners=False)
    return smooth + 0.3 * torch.randn(count, 3, 16, 16, generator=source)


@pytest.mark.parametrize("space", ["axes", "generator"])
def test_knockoffs_look_like_the_inputs_and_are_independent_of_them(space, monkeypatch):
    monkeypatch.setattr(scop_generator, "STEPS", 300)
    x = _pictures(400)
    code = scop.PrincipalAxes(x) if space == "axes" else scop_generator.train(x, 0)
    made = _knockoffs.knockoffs(x, code, torch.Generator().manual_seed(0)).detach()
    assert made.shape == x.shape
    assert torch.allclose(made.mean((0, 2, 3)), x.mean((0, 2, 3)), atol=0.1)
    assert torch.allclose(made.std((0, 2, 3)), x.std((0, 2, 3)), rtol=0.15)

    def neighbours(y: Tensor) -> Tensor:
        centred = y - y.mean(0)
        return (centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean()

    assert abs(float(neighbours(made) - neighbours(x))) < 0.1
    kept, own = ((a - a.mean(0)) / a.std() for a in (x, made))
    assert abs(float((kept * own).mean())) < 0.05


def test_the_generator_learns_the_inputs_and_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(scop_generator, "STEPS", 300)
    x = _pictures(300)
    before = torch.get_rng_state()
    generator = scop_generator.train(x, 0)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        left = x - generator.decode(generator.encode(x))
    assert float(left.var()) < 0.5 * float(x.var())


class Listener(nn.Module):
    """Units 0 to 3 hear the channel that tells two classes apart, units 4 to 7 another one that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(2, 8, 1), nn.Linear(8, 2)
        with torch.no_grad():
            self.a.weight.zero_()
            self.a.bias.zero_()
            for unit in range(8):
                self.a.weight[unit, unit // 4] = 1 + 0.1 * unit if unit % 2 else -1 - 0.1 * unit
            self.fc.weight[0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.1, 0.1, -0.1, -0.1])
            self.fc.weight[1] = -self.fc.weight[0]
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(x)).mean((2, 3)))


def _heard(count: int = 64) -> tuple[Network, Samples]:
    source = torch.Generator().manual_seed(2)
    targets = torch.arange(count) % 2
    x = torch.randn(count, 2, 4, 4, generator=source)
    x[:, 0] += 2.0 - 4.0 * targets.reshape(-1, 1, 1)
    x[:, 0] *= -1
    network = find_groups(capture(Listener().eval(), (x[:1],)))
    return network, Samples([(x,)], targets)


@pytest.mark.parametrize("criterion", OURS)
def test_units_that_hear_the_classes_outrank_units_that_hear_noise(criterion):
    network, samples = _heard()
    own = scores(network, samples, criterion)["a 0"]
    assert min(own[unit] for unit in range(4)) > max(own[unit] for unit in range(4, 8)), own


def test_scop_weighs_by_the_scale_of_the_norms_and_by_the_spread_where_there_is_none():
    torch.manual_seed(0)
    network = network_of(lived_in(Chain()))
    spread = torch.full((Evidence(network, some_samples()).units,), 7.0)
    scale = _knockoffs._scale(Evidence(network, some_samples()), spread)
    group = next(g for g in network.topology.offered if g.name == "a.0")
    norm = network.graph.get_submodule("a.1")
    assert torch.equal(scale[list(group.units)], norm.weight.detach())
    bare = network_of(Plain())
    spread = torch.rand(Evidence(bare, some_samples()).units)
    assert torch.equal(_knockoffs._scale(Evidence(bare, some_samples()), spread), spread)


# --- LDA deconvolution ---------------------------------------------------------------------------------------------


def test_scop_weighs_by_the_scale_of_root_mean_square_norms_too():
    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.head = nn.Linear(3, 6), nn.RMSNorm(6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.up(x.mean((2, 3)))))

    network = network_of(Rms())
    with torch.no_grad():
        network.graph.get_parameter("norm.weight").copy_(torch.linspace(-2, 1, 6))
    (group,) = network.topology.offered
    evidence = Evidence(network, some_samples())
    scale = _knockoffs._scale(evidence, torch.full((evidence.units,), 9.0))
    assert torch.allclose(scale[list(group.units)], torch.linspace(-2, 1, 6).abs())


def test_discriminability_is_between_over_within_variance():
    targets = torch.tensor([0, 0, 1, 1])
    features = torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.2, 5.0], [10.0, 0.9, 5.0], [12.0, 1.1, 5.0]])
    telling, noise, dead = discriminability(features, targets).tolist()
    assert telling == pytest.approx(25.0, rel=0.01) and noise < 0.5 and dead == 0


def test_every_cut_of_a_chain_carries_the_same_utility():
    """One scale for all groups: what the last hidden layer is worth is shared out in each layer below it."""
    torch.manual_seed(0)
    model, samples = lived_in(Chain()), some_samples(40)
    network = network_of(model)
    found = scores(network, samples, "lda-deconv")
    totals = {name: sum(own.values()) for name, own in found.items()}
    with torch.no_grad():
        features = model.b(model.a(samples.joined()[0])).mean((2, 3))
    worth = discriminability(features, samples.targets)
    assert totals["b.0 1"] == pytest.approx(float(worth.sum()), rel=1e-4)
    assert totals["a.0 0"] == pytest.approx(totals["b.0 1"], rel=1e-4)
    assert [found["b.0 1"][i] for i in range(12)] == pytest.approx(worth.tolist(), rel=1e-3)


def test_all_samples_run_once_for_features_and_classes():
    network, samples = network_of(NETS["residual identity"]()), some_samples(12)
    run: list[int] = []
    network.graph.get_submodule("head.fc").register_forward_hook(lambda m, args, y: run.append(len(y)))
    rank(Evidence(network, samples), "lda-deconv")
    assert sum(run) == 2 * 12, "once for the features, once to carry the signal down"


def test_utilities_do_not_change_when_a_channel_is_scaled_up_and_its_reader_down():
    torch.manual_seed(0)
    model = lived_in(Chain())
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.a[1].weight[3] *= 8
        scaled.a[1].bias[3] *= 8
        scaled.b[0].weight[:, 3] /= 8
    before, after = (scores(network_of(m), some_samples(), "lda-deconv") for m in (model, scaled))
    for name, own in before.items():
        assert after[name] == pytest.approx(own, rel=1e-4)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, 1, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.pool(F.relu(self.a(x))))).mean((2, 3)))


def test_the_signal_goes_down_by_transposed_convolution_rectification_and_unpooling_by_switches():
    torch.manual_seed(0)
    model, samples = Pooled(), some_samples(20)
    own = scores(network_of(model), samples, "lda-deconv")["a 0"]
    (x,) = samples.joined()
    with torch.no_grad():
        maps = F.relu(model.a(x))
        small, switches = F.max_pool2d(maps, 2, return_indices=True)
        hidden = F.relu(model.b(small))
        features = hidden.mean((2, 3))
        worth = discriminability(features, samples.targets) / features.mean(0).clamp_min(1e-30)
        top = (features > 0) * torch.where(features.mean(0) > 0, worth, 0)
        signal = (hidden > 0) * top[:, :, None, None] / hidden[0, 0].numel()
        down = F.max_unpool2d(F.conv_transpose2d(signal, model.b.weight, padding=1), switches, 2)
        seen = (down.clamp_min(0) * maps).sum((2, 3))
        read = (F.conv_transpose2d(signal, model.b.weight, padding=1) * small).clamp_min(0)
        total = (top * features).sum(1)
        share = read.sum((2, 3)) / read.sum((1, 2, 3))[:, None]
        expected = (share * total[:, None]).mean(0)
    assert torch.allclose(seen, read.sum((2, 3)), rtol=1e-4)
    assert [own[i] for i in range(6)] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)


def test_a_residual_sum_hands_its_utility_to_the_branch_and_the_skip():
    torch.manual_seed(0)
    network = network_of(lived_in(NETS["residual identity"]()))
    found = scores(network, some_samples(), "lda-deconv")
    stream, inner = found["stem.0 0"], found["conv1 1"]
    assert sum(stream.values()) > sum(inner.values()) > 0


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("transposed", torch.arange(24), "needs logits (N, classes), the network gives (N, 2, 8, 8)."),
        ("chain", torch.zeros(24), "needs a class a sample, and targets are float32 (N)."),
        ("chain", torch.zeros(24, 5), "needs a class a sample, and targets are float32 (N, 5)."),
        ("chain", torch.full((24,), 3), "needs two classes at least, all 24 targets are 3."),
    ],
)
def test_lda_deconv_says_what_it_cannot_use(name, targets, said):
    network = network_of(NETS[name]())
    with pytest.raises(UsageError) as told:
        rank(Evidence(network, Samples(some_samples().inputs, targets)), "lda-deconv")
    assert told.value.message == f"the criterion 'lda-deconv' {said}"
