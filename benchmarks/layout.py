"""What it is worth that captured networks lie with channels last in memory: forward passes and training steps.

    python -m benchmarks.layout [--rounds 12]

One batch of 128 images of 32x32 on one thread, the same captured network in both layouts by turns; the median of the
ratios, channels last over channels first, and their quartiles. benchmarks/results/layout.json keeps them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import nets
from benchmarks.builds import TOOLS, machine
from pipeline.prune.capture import capture
from pipeline.prune.layout import channels_first

RESULTS = Path(__file__).resolve().parent / "results" / "layout.json"
NETS: tuple[Callable[[], nn.Module], ...] = (
    nets.resnet20, nets.resnet56, nets.mobilenetv2_signs, nets.inception_signs, nets.shufflenet, nets.efficientnet,
)  # fmt: skip
BATCH, CLASSES = 128, 10


def forward(network: nn.Module, images: Tensor, _: Tensor) -> None:
    """A pass as the search and the statistics take it."""
    with torch.no_grad():
        network.eval()(images)


def step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The gradient of a training step."""
    network.zero_grad(set_to_none=True)
    F.cross_entropy(network.train()(images), labels).backward()


def compared(make: Callable[[], nn.Module], work: Callable[..., None], rounds: int) -> dict[str, float]:
    """Ratios of one network and piece of work, taken by turns behind one round that warms up."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, CLASSES, (BATCH,))
    last = capture(make().eval(), (images[:2],)).graph.requires_grad_(True)
    first = copy.deepcopy(last)
    channels_first(first)
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for name, network in (("last", last), ("first", first))[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            work(network, images, labels)
            seconds[name] = time.perf_counter() - begun
        ratios.append(seconds["last"] / seconds["first"])
    low, middle, high = np.percentile(ratios[1:], (25, 50, 75))
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def main() -> None:
    """Compare all and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for make in NETS:
        for work in (forward, step):
            name = f"{make.__name__}, {work.__name__}"
            rows[name] = compared(make, work, asked.rounds)
            print(
                f"{name:<28} {rows[name]['ratio']:.2f} [{rows[name]['low']:.2f}, {rows[name]['high']:.2f}]", flush=True
            )
    RESULTS.write_text(json.dumps({"machine": machine(*TOOLS), "rounds": asked.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
