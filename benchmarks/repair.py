"""What repair without training gives back, on ResNet-56 with the inner width of every block cut alike.

    python -m benchmarks.repair [--images 1000] [--calibration 400]

The setting of a published weakness: the published CIFAR-10 weights, JPEG-re-encoded images, the first convolution of
every block cut uniformly to -24.9 % and -48.3 % of the operations, no training. Rows: criterion; columns: accuracy with
no repair, batch-norm statistics, least squares. benchmarks/results/repair.json keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data, nets
from benchmarks.builds import TOOLS, machine
from pipeline.latency.operations import Operations
from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from pipeline.prune.repair import MODES, repair
from pipeline.prune.surgery import prune
from pipeline.prune.taps import DenseTaps

RESULTS = Path(__file__).resolve().parent / "results" / "repair.json"
WEIGHTS = "cifar10_resnet_weights/resnet56-4bfd9763.th"


def main() -> None:
    """Fill the table and keep it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=400)
    parser.add_argument("--criteria", default="random,magnitude,fisher")
    asked = parser.parse_args()
    network, samples, judge = prepare(asked.images, asked.calibration)
    dense = {"accuracy": judge(network.graph), "macs": Operations(network.topology).macs()}
    rows = []
    for share in (0.249, 0.483):
        for criterion in asked.criteria.split(","):
            rows.append(row(network, samples, judge, criterion, share))
            print(rows[-1], flush=True)
    told = {
        "machine": machine(*TOOLS),
        "images": asked.images,
        "calibration": asked.calibration,
        "dense": dense,
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


def prepare(images: int, calibration: int) -> tuple[Network, Samples, Any]:
    """The network with the published weights, calibration samples, and the accuracy on test images picked by seed."""
    model = nets.resnet56()
    state = torch.load(data.EDGE_DATA / WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    pixels, _ = data.cifar10_jpeg("train")
    picked = np.random.RandomState(0).permutation(len(pixels))[:calibration]
    inputs = torch.from_numpy(data.normalise(pixels[picked], data.CIFAR_MEAN, data.CIFAR_STD))
    tests, labels = data.cifar10_jpeg("test")
    shown = np.random.RandomState(1).permutation(len(tests))[:images]
    x, y = (
        torch.from_numpy(data.normalise(tests[shown], data.CIFAR_MEAN, data.CIFAR_STD)),
        torch.from_numpy(labels[shown].astype(np.int64)),
    )

    @torch.inference_mode()
    def judge(net: torch.nn.Module) -> float:
        return float(sum((net(a).argmax(1) == b).sum() for a, b in zip(x.split(250), y.split(250), strict=True))) / len(
            y
        )

    return find_groups(capture(model.eval(), (inputs[:1],))), Samples([(batch,) for batch in inputs.split(64)]), judge


def row(network: Network, samples: Samples, judge: Any, criterion: str, share: float) -> dict[str, Any]:
    """Accuracy after each repair when every inner width loses this share."""
    rankings = rank(Evidence(network, samples), criterion)
    inner = [g for g in network.topology.offered if g.block is not None]
    plan = PruningPlan(tuple(KeepUnits(g.id, rankings[g.id].keep(round(g.size * (1 - share)))) for g in inner))
    pruned = prune(network, plan)
    counted = Operations(network.topology)
    less = 1 - counted.macs(plan.widths(network.topology.groups)) / counted.macs()
    told: dict[str, Any] = {"criterion": criterion, "macs_removed": round(less, 4)}
    taps = DenseTaps(network, samples.joined())
    for mode in MODES:
        begun = time.perf_counter()
        told[mode] = judge(repair(pruned, network, plan, samples, mode, rankings=rankings, taps=taps))
        told[f"{mode} seconds"] = round(time.perf_counter() - begun, 1)
    return told


if __name__ == "__main__":
    main()
