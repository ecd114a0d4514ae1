"""QSFM, FPGM, RED and HASTE on networks whose redundancy is known, the hash of weights, and HASTE's dynamic module."""

import copy
import importlib

import numpy as np
import pytest
import torch
from prune_nets import Chain, Depthwise, Head, Residual, conv, example, lived_in
from torch import Tensor, nn

from benchmarks.haste import HasteConv, Spent, replace
from pipeline.nouns import ChannelGroup, KeepUnits, PruningPlan, Ranking
from pipeline.prune import hashing
from pipeline.prune.capture import Network, capture
from pipeline.prune.criteria import _similarity, haste, qsfm_psnr, qsfm_ssim, red
from pipeline.prune.criteria._filters import filters, parts
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.merge import merge
from pipeline.prune.ranking import rank
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune

PAIRS = ["qsfm-psnr", "qsfm-ssim", "red", "haste"]
MAPS = ["qsfm-psnr", "qsfm-ssim"]


def inputs(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def evidence_of(model: nn.Module) -> Evidence:
    network = find_groups(capture(model, example()), prove=False)
    return Evidence(network, Samples([(batch,) for batch in inputs().split(16)]))


def group_of(evidence: Evidence, name: str) -> ChannelGroup:
    return next(group for group in evidence.topology.offered if group.name == name)


def ranked(evidence: Evidence, criterion: str, name: str) -> Ranking:
    return rank(evidence, criterion)[group_of(evidence, name).id]


@torch.no_grad()
def copy_unit(block: nn.Sequential, source: int, to: int, scale: float = 1.0) -> None:
    """One output of a convolution with its batch norm becomes another one, `scale` times as large behind a ReLU."""
    block[0].weight[to] = block[0].weight[source]
    for value in (block[1].weight, block[1].bias, block[1].running_mean, block[1].running_var):
        value[to] = value[source]
    block[1].weight[to] *= scale
    block[1].bias[to] *= scale


def gap(model: nn.Module, network: Network) -> float:
    with torch.no_grad():
        return float((model(inputs(8)) - network.graph(inputs(8))).abs().max())


def cut(evidence: Evidence, ranking: Ranking, width: int) -> PruningPlan:
    return PruningPlan((KeepUnits(ranking.group, ranking.keep(width)),))


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", PAIRS)
def test_copies_go_first_and_their_merge_leaves_the_network_as_it_was(criterion):
    torch.manual_seed(0)
    model = lived_in(Chain())
    copy_unit(model.a, 1, 6)
    copy_unit(model.a, 2, 7)
    evidence = evidence_of(model)
    ranking = ranked(evidence, criterion, "a.0")
    pairs = {frozenset(pair) for pair in zip(ranking.removal_order[:2], ranking.twin[:2], strict=True)}
    assert pairs == {frozenset((1, 6)), frozenset((2, 7))}
    assert max(ranking.marginal_loss[:2]) < 1e-3 < 10 * ranking.marginal_loss[2]
    plan = cut(evidence, ranking, 6)
    merged = merge(evidence.network, plan, {ranking.group: ranking}, (inputs(),))
    assert gap(merged, evidence.network) < 1e-4 < 0.01 * gap(prune(evidence.network, plan), evidence.network)


@pytest.mark.parametrize("criterion", [*MAPS, "haste"])
def test_a_scaled_copy_is_as_similar_as_a_copy_because_the_merge_gives_it_a_gain(criterion):
    torch.manual_seed(0)
    model = lived_in(Chain())
    copy_unit(model.a, 1, 6, scale=3.0)
    evidence = evidence_of(model)
    ranking = ranked(evidence, criterion, "a.0")
    assert {ranking.removal_order[0], ranking.twin[0]} == {1, 6} and ranking.marginal_loss[0] < 1e-4
    merged = merge(evidence.network, cut(evidence, ranking, 7), {ranking.group: ranking}, (inputs(),))
    assert gap(merged, evidence.network) < 1e-4


@pytest.mark.parametrize("criterion", [*MAPS, "haste"])
def test_a_dead_channel_goes_before_all_others(criterion):
    torch.manual_seed(0)
    model = lived_in(Chain())
    with torch.no_grad():
        model.a[1].weight[5], model.a[1].bias[5] = 0.0, -1.0
    ranking = ranked(evidence_of(model), criterion, "a.0")
    assert ranking.removal_order[0] == 5 and ranking.marginal_loss[0] < 1e-3


@pytest.mark.parametrize("criterion", MAPS)
def test_a_channel_that_no_weight_reads_goes_first(criterion):
    torch.manual_seed(0)
    model = lived_in(Chain())
    with torch.no_grad():
        model.b[0].weight[:, 3] = 0.0
    ranking = ranked(evidence_of(model), criterion, "a.0")
    assert ranking.removal_order[0] == 3 and ranking.marginal_loss[0] == 0


@pytest.mark.parametrize("criterion", MAPS)
def test_losses_do_not_depend_on_the_scale_of_a_layer(criterion):
    """The whole layer is a hundred times as large and read by weights a hundred times as small."""
    torch.manual_seed(0)
    model = lived_in(Chain())
    first = ranked(evidence_of(model), criterion, "a.0")
    with torch.no_grad():
        model.a[1].weight *= 100
        model.a[1].bias *= 100
        model.b[0].weight /= 100
    again = ranked(evidence_of(model), criterion, "a.0")
    assert again.removal_order == first.removal_order and again.twin == first.twin
    assert np.allclose(again.marginal_loss, first.marginal_loss, rtol=1e-3)


@pytest.mark.parametrize("criterion", MAPS)
def test_losses_never_fall_along_the_order_and_a_mean_unit_alone_counts_one(criterion):
    torch.manual_seed(0)
    ranking = ranked(evidence_of(lived_in(Chain())), criterion, "a.0")
    assert list(ranking.marginal_loss) == sorted(ranking.marginal_loss)
    assert ranking.twin[-1] == -1 and ranking.marginal_loss[-1] >= 1


class BothRead(nn.Module):
    """Units that a norm over channels reads as well as the layer behind it."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.a, self.relu, self.c, self.head = conv(3, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), Head(6)
        self.norm = nn.GroupNorm(1, 8) if normed else nn.Identity()

    def forward(self, x):
        x = self.a(x)
        return self.head(torch.relu(self.c(self.relu(self.norm(x)))))


@pytest.mark.parametrize("criterion", MAPS)
def test_a_reader_without_weights_makes_no_unit_worth_less(criterion):
    """A mean unit read by one layer is a loss of about 1, whether a norm over channels reads it before or not."""
    last = {}
    for normed in (False, True):
        torch.manual_seed(0)
        ranking = ranked(evidence_of(lived_in(BothRead(normed=normed))), criterion, "a.0")
        last[normed] = ranking.marginal_loss[-1]
    assert last[True] > 0.8 * last[False] >= 0.8


@pytest.mark.parametrize("criterion", [*PAIRS, "fpgm"])
def test_a_unit_of_a_separable_convolution_is_filter_and_kernel_and_column_together(criterion):
    """Equal pointwise filters with other depthwise kernels are no copies; with equal kernels they are."""
    torch.manual_seed(0)
    model = lived_in(Depthwise())
    copy_unit(model.a, 1, 6)
    apart = ranked(evidence_of(model), criterion, "a.0")
    copy_unit(model.dw, 1, 6)
    evidence = evidence_of(model)
    alike = ranked(evidence, criterion, "a.0")
    if criterion != "fpgm":
        assert apart.marginal_loss[0] > 1e-2
        assert {alike.removal_order[0], alike.twin[0]} == {1, 6} and alike.marginal_loss[0] < 1e-3
    pruned = prune(evidence.network, cut(evidence, alike, 5)).state_dict()
    assert [len(pruned[f"{layer}.weight"]) for layer in ("a.0", "a.1", "dw.0", "dw.1")] == [5] * 4
    assert pruned["pw.0.weight"].shape == (12, 5, 1, 1)


@pytest.mark.parametrize("criterion", PAIRS)
def test_a_residual_stream_is_merged_only_where_all_its_layers_agree(criterion):
    """Units of the stream are copies once both layers that write to it say so."""
    torch.manual_seed(0)
    model = lived_in(Residual("identity"))
    copy_unit(model.stem, 1, 6)
    apart = ranked(evidence_of(model), criterion, "stem.0")
    copy_unit(nn.Sequential(model.conv2, model.bn2), 1, 6)
    alike = ranked(evidence_of(model), criterion, "stem.0")
    assert {alike.removal_order[0], alike.twin[0]} == {1, 6} and alike.marginal_loss[0] < 1e-3
    assert apart.marginal_loss[0] > 10 * alike.marginal_loss[0]


# --- similarity of maps ---------------------------------------------------------------------------------------------


def some_maps(height: int = 6, width: int = 5) -> Tensor:
    source = torch.Generator().manual_seed(0)
    maps = torch.randn(9, 4, height, width, generator=source).relu()
    maps[:, 3] = 0.5 * maps[:, 0] + 0.1 * torch.randn(9, height, width, generator=source)
    return maps


def fitted(maps: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """F_i and a F_j + b by ordinary least squares."""
    y, x = maps[:, i].double(), maps[:, j].double()
    table = torch.stack([x.flatten(), torch.ones(x.numel(), dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(table, y.reshape(-1, 1)).solution
    return y, (table @ solution).reshape(y.shape)


def test_the_error_of_psnr_is_that_of_least_squares():
    maps = some_maps()
    got = qsfm_psnr.unexplained(_similarity.lines(maps))
    for i, j in ((0, 3), (3, 0), (1, 2)):
        y, line = fitted(maps, i, j)
        assert float(got[i, j]) == pytest.approx(float((y - line).square().mean() / y.var(correction=0)), abs=1e-5)


def test_ssim_is_its_formula_image_by_image():
    maps = some_maps()
    got = qsfm_ssim.unlike(_similarity.lines(maps))
    extent = float(maps.max() - maps.min())
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    for i, j in ((0, 3), (3, 0), (1, 2)):
        values = []
        for x, y in zip(*fitted(maps, i, j), strict=True):
            mean, spread = (x.mean(), y.mean()), (x.var(correction=0), y.var(correction=0))
            both = ((x - mean[0]) * (y - mean[1])).mean()
            values.append(
                (2 * mean[0] * mean[1] + c1) * (2 * both + c2) / (mean[0] ** 2 + mean[1] ** 2 + c1) / (sum(spread) + c2)
            )
        assert float(got[i, j]) == pytest.approx(1 - float(torch.stack(values).mean()), abs=1e-4)


def test_ssim_of_many_images_does_not_depend_on_how_many_are_taken_at_once(monkeypatch):
    seen = _similarity.lines(some_maps())
    whole = qsfm_ssim.unlike(seen)
    monkeypatch.setattr(qsfm_ssim, "LIVE", 32)
    assert torch.allclose(qsfm_ssim.unlike(seen), whole, atol=1e-6)


def test_maps_of_one_position_are_compared_over_samples():
    maps = some_maps(1, 1).repeat(4, 1, 1, 1)
    seen = _similarity.lines(maps)
    assert seen.maps.shape == (1, 4, 36)
    assert torch.equal(seen.maps[0], maps[:, :, 0, 0].T)


def test_a_unit_that_stands_in_carries_what_it_took_over():
    """Without carrying, the twin of three copies would be as cheap as any other unit of its size."""
    group = ChannelGroup("id", "name", (0, 1, 2, 3), ())
    apart = np.array([[0.0, 0.0, 0.9, 0.9], [0.0, 0.0, 0.9, 0.9], [0.8, 0.9, 0.0, 0.9], [0.9, 0.9, 0.95, 0.0]])
    ranking = _similarity.paired(group, np.ones(4), apart, 1 - apart)
    assert ranking.removal_order[0] in (0, 1) and ranking.marginal_loss[0] == 0
    carrier = ranking.twin[0]
    assert ranking.removal_order[1] == 2, "the carrier counts double, and unit 2 is cheaper than it"
    assert ranking.marginal_loss[1] == pytest.approx(0.8 if carrier == 0 else 0.9)
    free = _similarity.paired(group, np.ones(4), apart, np.zeros((4, 4)))
    assert sum(free.marginal_loss) < sum(ranking.marginal_loss)


def test_pairs_are_those_of_a_search_through_all_of_them():
    source = np.random.default_rng(0)
    group = ChannelGroup("id", "name", tuple(range(12)), ())
    share, apart, kept = source.random(12) + 0.5, source.random((12, 12)), source.random((12, 12))
    ranking = _similarity.paired(group, share, apart, kept)
    left, weights, order = set(range(12)), share.copy(), []
    while len(left) > 1:
        loss, i, j = min((weights[i] * apart[i, j], i, j) for i in left for j in left if i != j)
        order.append((i, j, loss))
        weights[j] += kept[i, j] * weights[i]
        left.remove(i)
    found = list(zip(ranking.removal_order, ranking.twin, ranking.marginal_loss, strict=True))
    assert [(i, j) for i, j, _ in found[:-1]] == [(i, j) for i, j, _ in order]
    assert np.allclose([loss for *_, loss in found[:-1]], [loss for *_, loss in order])


def test_similar_maps_are_merged_with_less_harm_than_random_ones():
    """What QSFM is for: after the merge its choice is nearer to the dense network than a random one."""
    torch.manual_seed(0)
    model = lived_in(Chain())
    with torch.no_grad():  # half of the channels are near copies
        for unit in range(4):
            copy_unit(model.a, unit, unit + 4, scale=0.7)
            model.a[0].weight[unit + 4] += 0.02 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(unit))
    evidence = evidence_of(model)
    gaps = {}
    for criterion in ("qsfm-ssim", "qsfm-psnr", "random"):
        ranking = ranked(evidence, criterion, "a.0")
        plan, samples = cut(evidence, ranking, 4), evidence.samples
        fixed = repair(
            prune(evidence.network, plan), evidence.network, plan, samples, "merge", rankings={ranking.group: ranking}
        )
        gaps[criterion] = gap(fixed, evidence.network)
    assert max(gaps["qsfm-ssim"], gaps["qsfm-psnr"]) < 0.3 * gaps["random"]


# --- filters, FPGM and RED ------------------------------------------------------------------------------------------


def test_filters_hold_every_layer_that_makes_a_unit():
    torch.manual_seed(0)
    evidence = evidence_of(lived_in(Depthwise()))
    found = filters(parts(evidence.network), group_of(evidence, "a.0"))
    assert found.shape == (8, 27 + 2 + 9 + 2)  # filter, norm, kernel, norm
    assert np.square(found).sum(1).mean() == pytest.approx(1)


def test_fpgm_takes_the_filter_at_the_geometric_median_first():
    torch.manual_seed(0)
    model = lived_in(Chain())
    with torch.no_grad():
        others = [unit for unit in range(8) if unit != 4]
        model.a[0].weight[4] = model.a[0].weight[others].mean(0)
    ranking = ranked(evidence_of(model), "fpgm", "a.0")
    assert ranking.removal_order[0] == 4 and ranking.twin is None
    flat = model.a[0].weight.detach().flatten(1).double()
    flat = flat / flat.square().sum(1).mean().sqrt()
    expected = torch.cdist(flat, flat).mean(1).sort().values
    assert np.allclose(ranking.marginal_loss, expected.numpy(), atol=1e-6)


def test_red_merges_by_wards_rule():
    """Two tight clusters and one unit apart: each cluster goes to one unit, then the small one goes."""
    group = ChannelGroup("id", "name", tuple(range(6)), ())
    vectors = np.array([[4, 0, 0], [4.1, 0, 0], [4, 0.1, 0], [0, 4, 0], [0, 4.1, 0], [0, 0, 0.5]], dtype=float)
    ranking = red.merged(group, vectors)
    assert ranking.merged == "mean" and sorted(ranking.removal_order) == list(range(6))
    steps = dict(zip(ranking.removal_order, ranking.twin, strict=True))
    assert set(ranking.removal_order[:3]) < {0, 1, 2, 3, 4} and steps[5] == -1
    left = set(range(6)) - set(ranking.removal_order[:3])
    assert len(left & {0, 1, 2}) == 1 and len(left & {3, 4}) == 1 and 5 in left
    assert ranking.removal_order[3] == 5 and ranking.marginal_loss[3] == pytest.approx(0.25)
    means = [np.mean(vectors[:3], 0), np.mean(vectors[3:5], 0)]
    within = sum(np.square(vectors[:3] - means[0]).sum(1)) + sum(np.square(vectors[3:5] - means[1]).sum(1))
    assert sum(ranking.marginal_loss[:3]) == pytest.approx(within)
    assert sum(ranking.marginal_loss) == pytest.approx(np.square(vectors).sum()), "in the end nothing is left of it"


def test_red_needs_no_data_and_says_which_criteria_do():
    torch.manual_seed(0)
    network = find_groups(capture(lived_in(Chain()), example()), prove=False)
    assert rank(Evidence(network, Samples([])), "red") and rank(Evidence(network, Samples([])), "fpgm")
    for criterion in (*MAPS, "haste"):
        assert importlib.import_module(f"pipeline.prune.criteria.{criterion.replace('-', '_')}").NEEDS == ("inputs",)


# --- hashing --------------------------------------------------------------------------------------------------------


def clustered(seed: int = 0) -> np.ndarray:
    source = np.random.default_rng(seed)
    centres = np.array([-1.0, -0.2, 0.3, 1.1])
    return (centres[source.integers(4, size=(16, 3, 3, 3))] + 0.01 * source.standard_normal((16, 3, 3, 3))).astype(
        float
    )


def test_the_density_of_clustered_weights_has_one_value_a_cluster():
    weights = clustered()
    found = hashing.by_density(weights, 0.03)
    assert found.distinct == 4 and found.codes.shape == weights.shape
    assert np.allclose(found.values, [-1.0, -0.2, 0.3, 1.1], atol=0.02)
    assert np.abs(found.weights - weights).max() < 0.06


def test_a_hash_is_no_coarser_than_its_bandwidth_asks():
    weights = np.random.default_rng(0).standard_normal((32, 27))
    counts = [hashing.by_density(weights, h).distinct for h in (0.0, 0.002, 0.01, 0.05, 1.0)]
    assert counts[0] == weights.size and counts[-1] == 1
    assert counts == sorted(counts, reverse=True)
    errors = [hashing.by_density(weights, h).error(weights) for h in (0.0, 0.002, 0.01, 0.05)]
    assert errors == sorted(errors) and errors[0] == 0


def test_the_adaptive_bandwidth_keeps_the_error_below_its_bound_and_uses_it():
    weights = np.random.default_rng(0).standard_normal((64, 64, 3, 3))
    for bound in (0.005, 0.02):
        found = hashing.adaptive(weights, bound)
        assert 0.3 * bound < found.error(weights) <= bound
        assert found.distinct < weights.size / 50
    assert hashing.adaptive(clustered(), 0.05).distinct == 4


def test_k_means_has_less_error_at_as_many_values():
    weights = np.random.default_rng(0).standard_normal((64, 27))
    by_density = hashing.adaptive(weights, 0.02)
    by_means = hashing.by_means(weights, by_density.distinct)
    assert by_means.distinct <= by_density.distinct and by_means.error(weights) < by_density.error(weights)
    assert np.allclose(hashing.by_means(clustered(), 4).values, [-1.0, -0.2, 0.3, 1.1], atol=0.01)
    for code in range(by_means.distinct):
        assert by_means.values[code] == pytest.approx(weights[by_means.codes == code].mean())


@pytest.mark.parametrize("weights", [np.zeros((4, 3)), np.full((2, 2), 0.7), np.array([[1.5]])])
def test_weights_of_one_value_stay_as_they_are(weights):
    for found in (
        hashing.by_density(weights, 0.1), hashing.adaptive(weights), hashing.by_means(weights, 5)
    ):  # fmt: skip
        assert found.distinct == 1 and np.allclose(found.weights, weights) and found.error(weights) < 1e-9
    assert hashing.median_gap(weights) == 0


def test_the_median_gap_is_that_of_neighbouring_values():
    assert hashing.median_gap([[3.0, 1.0, 1.0], [2.5, 7.0, 1.5]]) == pytest.approx(0.75)


# --- HASTE ----------------------------------------------------------------------------------------------------------


def test_hyperplanes_are_sparse_and_ternary():
    planes = haste.hyperplanes(3000, 8, 0)
    assert set(planes.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert float((planes == 0).float().mean()) == pytest.approx(2 / 3, abs=0.02)
    assert abs(float(planes.mean())) < 0.02


def test_codes_do_not_see_level_or_scale_but_sign_and_shape():
    tiles = torch.randn(5, 3, 36, generator=torch.Generator().manual_seed(0))
    planes = haste.hyperplanes(36, 20, 0)
    codes, flat = haste.hashed(tiles, planes)
    again, _ = haste.hashed(4.0 * tiles + 2.0, planes)
    turned, _ = haste.hashed(-tiles, planes)
    assert torch.equal(codes, again) and not flat.any()
    assert torch.equal(codes + turned, torch.full_like(codes, (1 << 20) - 1))
    assert len(codes.unique()) == codes.numel()


def test_flat_patches_do_not_count_as_agreement():
    tiles = torch.zeros(6, 2, 16)
    tiles[:2] = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    tiles[2, 0] = torch.arange(16.0)
    same, seen = haste.agreements(tiles, 0)
    assert same[0, 1] == 2 and seen[0, 1] == 3


def test_patches_are_tiles_of_the_maps():
    maps = torch.arange(2 * 3 * 16 * 8.0).reshape(2, 3, 16, 8)
    tiles = haste.patches(maps, 3)
    assert tiles.shape == (4, 3, 64)
    assert torch.equal(tiles[1, 2], maps[0, 2, 8:, :].flatten())
    assert haste.patches(torch.randn(40, 3, 1, 1), 3).shape == (1, 3, 40)


def test_static_haste_names_no_twin_for_pairs_that_hold_in_too_few_patches():
    torch.manual_seed(0)
    ranking = ranked(evidence_of(lived_in(Chain())), "haste", "a.0")
    assert ranking.merged == "absorb" and set(ranking.twin) == {-1}
    assert ranking.marginal_loss[0] > 1 - haste.HOLDS


def grown(weight: Tensor, stride: int, bias: bool) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride, 1, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize(("size", "stride", "bias"), [((16, 16), 1, False), ((16, 16), 2, True), ((13, 9), 1, True)])
@torch.no_grad()
def test_dynamic_haste_is_the_convolution_where_no_codes_are_equal(size, stride, bias):
    source = torch.Generator().manual_seed(0)
    layer = grown(torch.randn(6, 8, 3, 3, generator=source), stride, bias)
    module = HasteConv(layer, 40, tile=4)
    x = torch.randn(3, 8, *size, generator=source)
    assert torch.allclose(module(x), layer(x), atol=1e-4)
    high, wide = (-(-side // stride) for side in size)
    padded = -(-high // 4) * -(-wide // 4) * 16 / (high * wide)
    assert module.spent.dense == 3 * high * wide * layer.weight.numel(), "what the layer takes, not what tiles add"
    assert module.spent.convolution == pytest.approx(padded * module.spent.dense) and module.spent.overhead > 0


@torch.no_grad()
def test_dynamic_haste_convolves_copies_at_half_the_depth_and_loses_nothing():
    source = torch.Generator().manual_seed(0)
    layer = grown(torch.randn(6, 8, 3, 3, generator=source), 1, True)
    x = torch.randn(3, 4, 16, 16, generator=source).repeat(1, 2, 1, 1)
    module = HasteConv(layer, 40, tile=8)
    assert torch.allclose(module(x), layer(x), atol=1e-4)
    assert module.spent.dense == 3 * 6 * 8 * 9 * 256 and module.spent.convolution == module.spent.dense / 2


@torch.no_grad()
def test_dynamic_haste_averages_channels_of_equal_code_and_sums_their_slices():
    """The same as the convolution of inputs in which every channel is the mean of its bucket, tile by tile."""
    source = torch.Generator().manual_seed(0)
    layer = grown(torch.randn(6, 8, 3, 3, generator=source), 1, False)
    x = torch.randn(2, 8, 8, 8, generator=source)
    module = HasteConv(layer, 2, tile=8)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    codes, _ = haste.hashed(padded.flatten(2), haste.hyperplanes(100, 2, 0))
    for sample in range(2):
        for code in codes[sample].unique():
            members = codes[sample] == code
            padded[sample, members] = padded[sample, members].mean(0)
    assert torch.allclose(module(x), nn.functional.conv2d(padded, layer.weight), atol=1e-4)
    buckets = sum(len(own.unique()) for own in codes)
    assert module.spent.convolution == buckets * 6 * 9 * 64 < module.spent.dense


@torch.no_grad()
def test_the_overhead_of_dynamic_haste_is_counted_from_its_steps():
    layer = grown(torch.ones(6, 8, 3, 3), 1, False)
    module = HasteConv(layer, 5, tile=8)
    module(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1, 1))
    planes = int(haste.hyperplanes(100, 5, 0).count_nonzero())
    buckets = round(module.spent.convolution / (6 * 9 * 64))
    additions = 8 * (100 + 100 + planes) + (8 - buckets) * (100 + 6 * 9)
    assert 1 <= buckets <= 4 and module.spent.overhead == additions / 2 + buckets * 100


@torch.no_grad()
def test_wide_convolutions_are_replaced_and_grouped_or_narrow_ones_are_not():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 8, 1))
    dense = copy.deepcopy(model)
    (only,) = replace(model, 40)
    assert only is model[2] and isinstance(model[1], nn.Conv2d)
    x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x), dense(x), atol=1e-4)
    assert only.spent + Spent(1.0, 2.0, 3.0) == Spent(
        only.spent.dense + 1, only.spent.convolution + 2, only.spent.overhead + 3
    )
