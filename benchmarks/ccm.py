"""CCM's ladder: a network trained to gather its redundancy, pruned by independence, one share tau for all groups.

    python -m benchmarks.ccm                            ResNet-20 on GTSRB, all cells that have no result yet
    python -m benchmarks.ccm --net resnet56_cifar10_jpeg --epochs 10
    python -m benchmarks.ccm --table                    what there is so far

As in the source (Wang et al., Enhanced Linear Representation Redundancy, 2023): trained from nothing, with the hook
`ccm` or without it (the control); every group keeps the fewest channels that hold more than tau of its independence;
fine-tuned without the hook. Whole coupled groups are chosen, where their code chose the two sides of a shortcut
independently. Beside the source: the accuracy right after the cut, with no repair and after least squares. Epochs are
picked by the validation split; what is told is the accuracy on the test images.

The schedules are SHORT ones: 5 epochs and 2 of fine-tuning where the source takes 400 and 600, so that differences
between the arms count and no absolute figure does. benchmarks/results/ccm.json keeps the cells.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.builds import ROOT, TOOLS, machine
from benchmarks.frontier.arena import Arena, Pace
from benchmarks.frontier.bisection import Steps
from benchmarks.frontier.dense import LEARNING_RATE
from pipeline.latency.operations import Operations
from pipeline.nouns import Ranking
from pipeline.project import predict_torch
from pipeline.prune.capture import capture
from pipeline.prune.evidence import Evidence
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import make_plan
from pipeline.prune.ranking import rank
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune

RESULTS = Path(__file__).resolve().parent / "results" / "ccm.json"
WORK = ROOT / "runs" / "ccm"
ARMS: dict[str, tuple[str, ...]] = {"plain": (), "ccm": ("ccm",)}
TAUS = (0.9, 0.8, 0.7, 0.6)
EPOCHS, TUNING = 5, 2


def width(ranking: Ranking, tau: float) -> int:
    """The fewest of its units whose scores sum to more than tau of all."""
    scores = np.array(ranking.marginal_loss[::-1])
    held = np.cumsum(scores) / scores.sum()
    return int(np.searchsorted(held, tau, side="right")) + 1 if tau < 1 else len(scores)


class Ladder:
    """One arm: its trained network, and the steps of the ladder."""

    def __init__(self, net: str, arm: str, epochs: int, seed: int) -> None:
        recover = {"max_minutes": 600, "patience": 1000, "hooks": list(ARMS[arm]), "seed": seed}
        pace = Pace({"recover": recover}, Steps(), sparse_epochs=0, most_epochs=epochs)
        self.arena = Arena(net, pace, WORK / net / arm, trained=False)
        self.trained = self._train(epochs)

    def _train(self, epochs: int) -> nn.Module:
        """From nothing, from labels alone."""
        model = self.arena.project.model()
        done = self.arena.recovered(model, distilled=False, epochs=epochs, learning_rate=LEARNING_RATE)
        return done.module.eval()

    def dense(self) -> dict[str, Any]:
        """What was trained, before anything is removed."""
        return {"test": self._tested(self.trained)}

    def _tested(self, model: nn.Module) -> float:
        """Accuracy on the test images."""
        return float(self.arena.project.evaluate(predict_torch(model)) or 0.0)

    def step(self, tau: float) -> dict[str, Any]:
        """Cut at a tau, repaired in two ways, and fine-tuned from the cut as it is."""
        arena = self.arena
        network = find_groups(capture(self.trained, arena.project.example()))
        topology, counted = network.topology, Operations(network.topology)
        begun = time.perf_counter()
        rankings = rank(Evidence(network, arena.samples.first(256)), "independence")
        seconds = time.perf_counter() - begun
        widths = {name: width(ranking, tau) for name, ranking in rankings.items()}
        plan = make_plan(topology, rankings, widths, frozenset())
        kept = plan.widths(topology.groups)
        row: dict[str, Any] = {
            "macs": 1 - counted.macs(kept) / counted.macs(),
            "parameters": 1 - counted.parameters(kept) / counted.parameters(),
            "rank_s": round(seconds, 1),
        }
        cut = prune(network, plan)
        for mode in ("none", "least-squares"):
            row[mode] = self._tested(repair(cut, network, plan, arena.samples, mode, rankings=rankings))
        tuned = arena.recovered(cut, distilled=False, epochs=TUNING, hooks=())
        row["tuned"] = self._tested(tuned.module)
        return {key: round(value, 5) for key, value in row.items()}


def line(name: str, row: dict[str, Any]) -> str:
    """A cell in words; accuracies are those of the test images."""
    if "macs" not in row:
        return f"{name:<52} test {100 * row['test']:.2f} %"
    told = ", ".join(f"{key} {100 * row[key]:.2f} %" for key in ("none", "least-squares", "tuned"))
    return f"{name:<52} operations -{100 * row['macs']:.1f} %, parameters -{100 * row['parameters']:.1f} %: {told}"


def main() -> int:
    """Fill what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--net", default="resnet20_gtsrb")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for seed in range(0 if asked.table else asked.seeds):
        for arm in ARMS:
            head = f"{asked.net}/{asked.epochs}+{TUNING} epochs (short)/seed {seed}/{arm}"
            steps = {f"{head}/{tau}": tau for tau in TAUS}
            if all(name in results for name in (head, *steps)):
                continue
            ladder = Ladder(asked.net, arm, asked.epochs, seed)
            for name, tau in {head: None, **steps}.items():
                results[name] = ladder.dense() if tau is None else ladder.step(tau)
                results["machine"] = machine(*TOOLS)
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                print(line(name, results[name]), flush=True)
    print("\n".join(line(name, row) for name, row in sorted(results.items()) if name != "machine"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
