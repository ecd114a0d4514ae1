"""QSFM's published claim, tested: ResNet-56 on CIFAR-10 at -48.27 % operations and -57.90 % parameters, untrained.

    python -m benchmarks.qsfm                          all cells that have no result yet
    python -m benchmarks.qsfm --minutes 30             for at most that long
    python -m benchmarks.qsfm --base published --allocation search     of one base, one allocation, one --criterion
    python -m benchmarks.qsfm --images 8192            with more images for the repairs (cells of their own)
    python -m benchmarks.qsfm --table                  what there is so far

The paper (arXiv 2105.06052, abstract) loses 0.54 points of top-1 there without fine-tuning. No PNG copy of CIFAR-10 is
at hand: the images are JPEG-re-encoded, the base is either trained on them (`retrained`, 89.2 %) or the published one
(`published`, 93.39 % on the originals and about 83.5 % here), so only differences from the same base count.

A cell is (base, criterion, allocation). `qsfm-ssim` and `qsfm-psnr` are this project's forms: they compare a map with
the straight line on its twin, weigh it by what reads it and carry what was taken over. `plain-ssim` and `plain-psnr`
are the paper's, as far as it tells: maps as they are, the pair most alike first, of which the smaller filter goes.
Allocations: `inner` takes the same share of every block's inner channels until the operations fit (the parameters
follow); `stages` takes more of the last stage, so that both figures fit; `search` is this project's loop with the
larger of both figures in the place of milliseconds: the exact solver under two limits, values measured around what it
chose, residual widths and whole blocks included, on 768 images (on 192 it fits its plan to them, and the plan loses
more elsewhere than that of `stages`). Every cell is judged after each repair on the whole test set, with
1,024 training images for the repairs or as many as are asked for. benchmarks/results/qsfm.json keeps them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data, nets
from benchmarks.builds import machine
from pipeline.latency.choices import Rule, find_choices
from pipeline.latency.operations import Operations
from pipeline.latency.solvers import exact
from pipeline.latency.solvers.base import infeasible
from pipeline.nouns import (
    Dim,
    LatencyTable,
    Layer,
    Prediction,
    PruningPlan,
    Ranking,
    Sensitivity,
    Site,
    SiteCost,
    Solution,
    Topology,
    Trial,
)
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import make_plan
from pipeline.prune.ranking import rank
from pipeline.prune.repair import MODES, repair
from pipeline.prune.sensitivity import LossProbe, measure
from pipeline.prune.surgery import prune
from pipeline.prune.taps import DenseTaps
from pipeline.search import Loop, Measured, Search
from profiles.schema import PruneSpec

RESULTS = Path(__file__).resolve().parent / "results" / "qsfm.json"
MACS, PARAMETERS, CLAIM = 1 - 0.4827, 1 - 0.5790, -0.54
CALIBRATION, RANKED, VALUED = 1024, 256, 768
BASES = {"retrained": "cifar10_jpeg/resnet56.pt", "published": "cifar10_resnet_weights/resnet56-4bfd9763.th"}
PLAIN = ("plain-ssim", "plain-psnr")
CRITERIA = ("obs", "qsfm-ssim", "qsfm-psnr", *PLAIN, "fisher", "magnitude")
ALLOCATIONS = ("inner", "stages", "search")


def load(base: str, images: int) -> tuple[Network, Samples, Any]:
    """The network with the base's weights, calibration samples, and accuracy over the test images."""
    model = nets.resnet56()
    state = torch.load(data.EDGE_DATA / BASES[base], map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    pixels, labels = data.cifar10_jpeg("train")
    picked = np.random.RandomState(0).permutation(len(pixels))[:images]
    inputs = torch.from_numpy(data.normalise(pixels[picked], data.CIFAR_MEAN, data.CIFAR_STD))
    tests, wanted = data.cifar10_jpeg("test")
    x = torch.from_numpy(data.normalise(tests, data.CIFAR_MEAN, data.CIFAR_STD))
    y = torch.from_numpy(wanted.astype(np.int64))

    @torch.inference_mode()
    def judge(net: torch.nn.Module) -> float:
        right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True))
        return right / len(y)

    samples = Samples([(b,) for b in inputs.split(64)], torch.from_numpy(labels[picked].astype(np.int64)))
    return find_groups(capture(model.eval(), (inputs[:1],))), samples, judge


def shares(counted: Operations, widths: Mapping[str, int], dropped: Sequence[str] = ()) -> tuple[float, float]:
    """Operations and parameters that stay, as shares of the dense network's."""
    return counted.macs(widths, dropped) / counted.macs(), counted.parameters(widths, dropped) / counted.parameters()


# --- allocations ---------------------------------------------------------------------------------------------------


def inner(topology: Topology, counted: Operations, tilt: Sequence[float]) -> dict[str, int]:
    """The widest inner channels that keep the operations; tilt: how much each stage loses relative to the others."""
    groups = [g for g in topology.offered if g.block is not None]
    stages = sorted({g.size for g in groups})

    def cut(share: float) -> dict[str, int]:
        kept = {g.id: 1 - share * tilt[stages.index(g.size)] for g in groups}
        return {g.id: max(1, round(g.size * kept[g.id])) for g in groups}

    for share in np.linspace(0, 1, 401):
        if shares(counted, cut(share))[0] <= MACS:
            return cut(share)
    raise AssertionError("the inner channels alone cannot keep the operations")


def stages(topology: Topology, counted: Operations) -> dict[str, int]:
    """The mildest tilt towards the last stage at which the parameters fit with the operations."""
    for last in np.linspace(1.0, 2.5, 31):
        widths = inner(topology, counted, (2 - last if last < 2 else 0.0, 1.0, last))
        if shares(counted, widths)[1] <= PARAMETERS:
            return widths
    return widths


@dataclass(frozen=True)
class Figures(LatencyTable):
    """Operations in the place of milliseconds, each over what the claim leaves, and beside them parameters likewise.

    A plan keeps the claim when the larger of both sums, which is what the table predicts, is at most one.
    """

    parameters: LatencyTable | None = None

    def both(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> tuple[float, float]:
        """The two sums."""
        assert self.parameters is not None
        scale = self.correction
        return super().predict(widths, dropped).ms, self.parameters.predict(widths, dropped).ms * scale

    def predict(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> Prediction:
        """The larger of the two."""
        return Prediction(max(self.both(widths, dropped)), 0.0)

    def mixed(self, share: float) -> LatencyTable:
        """A table whose sum is that of the parameters by this share, else that of the operations."""
        assert self.parameters is not None
        costs = []
        for macs, parameters in zip(self.sites, self.parameters.sites, strict=True):
            ms = {key: (1 - share) * macs.ms[key] + share * parameters.ms[key] for key in macs.ms}
            costs.append(SiteCost(macs.site, ms, dict.fromkeys(ms, 0.0) if macs.site.block else {}))
        return LatencyTable(tuple(costs), self.choices, self.grid, self.dense_ms, correction=self.correction)


class Both:
    """The exact solver under two limits: a Lagrange multiplier between them, bisected until neither is left unused.

    Everett (1963): the answer at a multiplier is the best of all plans that need no more of either figure.
    """

    TRIES, VALUES = False, True
    TURNS = 5

    @classmethod
    def solve(
        cls, rankings: Sequence[Ranking], sensitivity: Sensitivity, table: LatencyTable, topology: Topology,
        budget_ms: float, spec: PruneSpec, trial: Trial | None = None,
    ) -> Solution:  # fmt: skip
        """The plan of least loss, of those that a multiplier finds, whose two figures are within the budget."""
        assert isinstance(table, Figures)
        for tighter in (1.0, 0.98, 0.95, 0.9, 0.8):
            low, high, fitting = 0.0, 1.0, []
            for _ in range(cls.TURNS):
                share = (low + high) / 2
                mixed = table.mixed(share)
                found = exact.solve(rankings, sensitivity, mixed, topology, budget_ms * tighter, spec, trial)
                macs, parameters = table.both(found.widths, found.dropped)
                if max(macs, parameters) <= budget_ms:
                    fitting.append(replace(found, predicted_ms=max(macs, parameters)))
                low, high = (low, share) if macs > parameters else (share, high)
            if fitting:
                return min(fitting, key=lambda s: s.loss)
        raise infeasible(budget_ms, max(macs, parameters))


def figures(topology: Topology, counted: Operations) -> Figures:
    """Operations and parameters of every layer at every width that may be chosen."""
    every = {layer.weight: counted.axes[layer.weight] for layer in topology.layers}
    dims = {w: {a: Dim(terms, fixed) for a, (fixed, terms) in axes.items()} for w, axes in every.items()}
    choices = find_choices(topology, (d for axes in dims.values() for d in axes.values()), Rule(2, 2, {}))
    homes = {name: block.id for block in topology.blocks for name in block.params}

    def table(cost: Callable[[Layer, int], float]) -> LatencyTable:
        costs = []
        for layer in topology.layers:
            own = dims[layer.weight]
            seen = tuple(dict.fromkeys(own.values()))
            ms = {}
            for key in itertools.product(*(choices.values[dim] for dim in seen)):
                shape = [key[seen.index(own[a])] if a in own else size for a, size in enumerate(layer.shape)]
                ms[key] = cost(layer, math.prod(shape))
            site = Site(layer.weight, "layer", seen, (layer.weight,), homes.get(layer.weight))
            costs.append(SiteCost(site, ms, dict.fromkeys(ms, 0.0) if site.block else {}))
        return LatencyTable(tuple(costs), choices.widths, 2, 0.0)

    macs = table(lambda layer, weights: weights * layer.positions / (counted.macs() * MACS))
    parameters = table(lambda layer, weights: weights / (counted.parameters() * PARAMETERS))
    bare = Figures(macs.sites, macs.choices, 2, 0.0, parameters=parameters)
    return replace(bare, dense_ms=bare.predict({group.id: group.size for group in topology.groups}).ms)


def search(network: Network, counted: Operations, rankings: Mapping[str, Ranking], samples: Samples) -> PruningPlan:
    """The plan of least loss after least squares that keeps both figures, by the loop of a build."""
    topology, table = network.topology, figures(network.topology, counted)
    probe = LossProbe(network, samples.first(VALUED))
    values: Sensitivity = measure(probe, rankings, table.choices)

    def taken(name: str, plans: Sequence[PruningPlan]) -> list[Measured]:
        found = []
        for plan in plans:
            macs, parameters = shares(counted, plan.widths(topology.groups), sorted(plan.dropped))
            ratio = max(macs / MACS, parameters / PARAMETERS) / table.dense_ms
            found.append(Measured(ratio, ratio, ratio, table.dense_ms))
        return found

    loop = Loop(
        topology=topology, rankings=rankings, solver=Both, spec=PruneSpec(solver_seconds=2),
        loss=probe.loss, recovered=probe.loss,
        plan_for=lambda widths, dropped: make_plan(topology, rankings, widths, dropped),
        measure=taken, progress=lambda text: print(f"  {text}", flush=True),
    )  # fmt: skip
    chosen = Search(loop, table, values, 1 / table.dense_ms).run().chosen
    assert chosen is not None
    return chosen.plan


# --- the plain reading ---------------------------------------------------------------------------------------------


def plain(evidence: Evidence, criterion: str) -> dict[str, Ranking]:
    """Rankings by the similarity of maps as they are: of the pair most alike the smaller filter goes."""
    found = {}
    for name, ranking in rank(evidence, "magnitude").items():
        norms = np.zeros(len(ranking.removal_order))
        norms[list(ranking.removal_order)] = ranking.marginal_loss
        found[name] = alike(name, apart(evidence.maps[name][0].flatten(2).double(), criterion), norms)
    return found


def alike(group: str, distance: np.ndarray[Any, Any], norms: np.ndarray[Any, Any]) -> Ranking:
    """The order in which pairs are broken up, from distances (units, units); the larger one of a pair is the twin."""
    left, order, losses, twins = list(range(len(norms))), list[int](), list[float](), list[int]()
    while len(left) > 1:
        own = distance[np.ix_(left, left)] + np.diag(np.full(len(left), np.inf))
        pair = [left[i] for i in np.unravel_index(int(own.argmin()), own.shape)]
        goes, stays = sorted(pair, key=lambda unit: (norms[unit], unit))
        left.remove(goes)
        order, losses, twins = [*order, goes], [*losses, float(own.min())], [*twins, stays]
    return Ranking(group, (*order, *left), (*losses, float(np.max(distance))), (*twins, -1))


def apart(maps: torch.Tensor, criterion: str) -> np.ndarray[Any, Any]:
    """Distances of maps (samples, units, positions): 1 - SSIM, or the squared error that the mean PSNR stands for."""
    mean, top = maps.mean(2), float(maps.abs().max()) or 1.0
    if criterion == "plain-psnr":
        square = maps.square().mean(2)
        error = square[:, :, None] + square[:, None] - 2 * maps @ maps.transpose(1, 2) / maps.shape[2]
        return (error.clamp_min(1e-12 * top**2).log().mean(0).exp() / top**2).numpy()
    centred = maps - mean[:, :, None]
    covariance = centred @ centred.transpose(1, 2) / maps.shape[2]
    variance = covariance.diagonal(dim1=1, dim2=2)
    level, contrast = (0.01 * top) ** 2, (0.03 * top) ** 2
    means = (2 * mean[:, :, None] * mean[:, None] + level) / (
        mean.square()[:, :, None] + mean.square()[:, None] + level
    )
    shape = (2 * covariance + contrast) / (variance[:, :, None] + variance[:, None] + contrast)
    return (1 - (means * shape).mean(0)).clamp_min(0).numpy()


# --- cells ---------------------------------------------------------------------------------------------------------


def cell(loaded: tuple[Network, Samples, Any], criterion: str, allocation: str) -> dict[str, Any]:
    """Accuracy after each repair."""
    network, samples, judge = loaded
    topology, counted, begun = network.topology, Operations(network.topology), time.perf_counter()
    evidence = Evidence(network, samples.first(RANKED))
    rankings = plain(evidence, criterion) if criterion in PLAIN else rank(evidence, criterion)
    if allocation == "search":
        plan = search(network, counted, rankings, samples)
    else:
        widths = stages(topology, counted) if allocation == "stages" else inner(topology, counted, (1.0, 1.0, 1.0))
        plan = make_plan(topology, rankings, widths, frozenset())
    macs, parameters = shares(counted, plan.widths(topology.groups), sorted(plan.dropped))
    row: dict[str, Any] = {"macs": macs, "parameters": parameters, "blocks removed": sorted(plan.dropped)}
    if allocation == "search":
        row["images to choose by"] = VALUED
    row["seconds to choose"] = round(time.perf_counter() - begun, 1)
    pruned, taps = prune(network, plan), DenseTaps(network, samples.joined())
    for mode in MODES:
        row[mode] = judge(repair(pruned, network, plan, samples, mode, rankings=rankings, taps=taps))
    return row


def main() -> int:
    """Fill what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--base", choices=tuple(BASES))
    parser.add_argument("--allocation", choices=ALLOCATIONS)
    parser.add_argument("--criterion", choices=CRITERIA)
    parser.add_argument("--images", type=int, default=CALIBRATION, help="for the repairs")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    loaded: dict[str, Any] = {}
    bases = tuple(BASES) if asked.base is None else (asked.base,)
    allocations = ALLOCATIONS if asked.allocation is None else (asked.allocation,)
    criteria = CRITERIA if asked.criterion is None else (asked.criterion,)
    for base, allocation, criterion in itertools.product(bases, allocations, criteria):
        name = f"{base}/{allocation}/{criterion}"
        if asked.images != CALIBRATION:
            name += f" ({asked.images} images)"
        if asked.table or name in results or time.monotonic() > end:
            continue
        if base not in loaded:
            loaded = {base: load(base, asked.images)}
            results[base] = {"accuracy": loaded[base][2](loaded[base][0].graph), "machine": machine()}
        results[name] = cell(loaded[base], criterion, allocation)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(line(name, results), flush=True)
    print("\n".join(line(name, results) for name in sorted(results) if "/" in name))
    return 0


def line(name: str, results: Mapping[str, Any]) -> str:
    """A cell: what stays, and points lost against its base after each repair (the claim: -0.54)."""
    row, base = results[name], results[name.split("/")[0]]["accuracy"]
    told = "  ".join(f"{mode} {100 * (row[mode] - base):+6.2f}" for mode in MODES)
    return f"{name:<32} operations {row['macs']:.3f}, parameters {row['parameters']:.3f}: {told}"


if __name__ == "__main__":
    sys.exit(main())
