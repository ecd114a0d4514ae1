"""RED, which sees no data: how much it removes before half a point is lost, and whether separation is ever faster.

    python -m benchmarks.red                     what has no result yet (about an hour and a half)
    python -m benchmarks.red --only merge        one part: merge, hash, separate
    python -m benchmarks.red --table             what there is so far

merge     Units go in the order of their scores over all groups, more and more of them, until MOST points are lost.
          `red` with the repair `merge` and no data is the method; `none` leaves out the merging, magnitude (which names
          no twins) is the control, and `merge on images`, `bn` and `least-squares` show what calibration images would
          add to it.
hash      Every convolution's weights are hashed to a relative error: how many distinct values and kernels are left, and
          what that costs.
separate  Uneven depthwise separation is offered wherever it needs fewer operations after hashing, and measured on the
          device beside the network without it, as `graph.candidates` does; taken where its upper bound is below 1.

On ResNet-56 points are those of accuracy on 5,000 JPEG-re-encoded CIFAR-10 images. MobileNetV1 (visual wake words) is
here without its images: points are enlarged traffic signs, in per cent, for which it says otherwise than the dense
network whether a person is likelier than on half of them. benchmarks/results/red.json keeps the figures.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks import data
from benchmarks.builds import ROOT, TOOLS, machine
from benchmarks.frontier.arena import FULL, Arena
from pipeline.graph.candidates.uneven_depthwise import separate
from pipeline.graph.rewriting import Timing, choose
from pipeline.latency.operations import Operations
from pipeline.nouns import Ranking
from pipeline.project import predict_torch
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.hashing import adaptive
from pipeline.prune.plan import make_plan
from pipeline.prune.ranking import rank
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune
from pipeline.prune.taps import DenseTaps

RESULTS = Path(__file__).resolve().parent / "results" / "red.json"
WORK = ROOT / "runs" / "red"
NETS = ("resnet56_cifar10_jpeg", "mobilenetv1_vww")
PARTS = ("merge", "hash", "separate")
ARMS = (
    ("red", "merge"), ("red", "none"), ("magnitude", "none"), ("red", "merge on images"), ("red", "bn"),
    ("red", "least-squares"),
)  # fmt: skip
DATA_FREE = ("merge", "none")
SHARES = (0.5, 1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90)
"""Removed units, in per cent of those that may go."""
LOST, MOST = 0.5, 5.0
ERRORS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
SEPARATED = (0.01, 0.05, 0.1, 0.2)
AT_ONCE = 4
SIGNS = 1000


class Judged:
    """A network of the benchmarks with its judge: points lost against the dense one."""

    def __init__(self, net: str) -> None:
        self.arena = Arena(net, FULL, WORK / net)
        self.network: Network = find_groups(capture(self.arena.model, self.arena.project.example()))
        if net == "mobilenetv1_vww":
            self.images = data.enlarge(data.gtsrb("test")[0][:SIGNS], 96)
            scores = self._scores(predict_torch(self.network.graph))
            self.half = np.median(scores)
            self.decided = scores > self.half
        else:
            self.accuracy = self.arena.project.evaluate(predict_torch(self.network.graph))

    def lost(self, predict: data.Predict) -> float:
        """Points of accuracy, or per cent of images that are told apart otherwise."""
        if hasattr(self, "decided"):
            return 100 * float(((self._scores(predict) > self.half) != self.decided).mean())
        return 100 * float(self.accuracy - self.arena.project.evaluate(predict))

    def _scores(self, predict: data.Predict) -> Any:
        """How much likelier a person is than none, for each image."""
        parts = np.array_split(self.images, -(-len(self.images) // 250))
        outputs = np.concatenate([np.asarray(predict(part)) for part in parts])
        return outputs[:, 1] - outputs[:, 0]


# --- merging -------------------------------------------------------------------------------------------------------


def removals(rankings: Sequence[Ranking]) -> Iterator[str]:
    """Group ids in the order in which units go: by score, a group's own order kept, the last unit of each left."""

    def of(ranking: Ranking) -> Iterator[tuple[float, str]]:
        scores = np.maximum.accumulate(ranking.marginal_loss) * ranking.weight
        return ((float(score), ranking.group) for score in scores[:-1])

    return (group for _, group in heapq.merge(*(of(ranking) for ranking in rankings)))


def merging(judged: Judged, criterion: str, mode: str) -> dict[str, Any]:
    """What is lost at every share of removed units, until it is too much."""
    network = judged.network
    topology, counted = network.topology, Operations(network.topology)
    samples: Samples = Samples([]) if mode in DATA_FREE else judged.arena.samples
    mode = mode.partition(" ")[0]
    begun = time.perf_counter()
    rankings = rank(Evidence(network, samples), criterion)
    told: dict[str, Any] = {"rank_s": round(time.perf_counter() - begun, 2), "points": []}
    taps = DenseTaps(network, samples.joined()) if mode == "least-squares" else None
    order = list(removals(list(rankings.values())))
    units = sum(group.size for group in topology.offered)
    for share in SHARES:
        gone = order[: round(share / 100 * units)]
        widths = {group.id: group.size - gone.count(group.id) for group in topology.offered}
        plan = make_plan(topology, rankings, widths, frozenset())
        model = repair(prune(network, plan), network, plan, samples, mode, rankings=rankings, taps=taps)
        kept = plan.widths(topology.groups)
        point = {
            "units": len(gone) / units,
            "parameters": 1 - counted.parameters(kept) / counted.parameters(),
            "macs": 1 - counted.macs(kept) / counted.macs(),
            "lost": judged.lost(predict_torch(model)),
        }
        told["points"].append({key: round(value, 5) for key, value in point.items()})
        if point["lost"] > MOST:
            break
    return told


def most(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """The last point before more than LOST is lost; nothing removed where the first one loses it."""
    best = {"units": 0.0, "parameters": 0.0, "macs": 0.0, "lost": 0.0}
    for point in points:
        if point["lost"] > LOST:
            break
        best = point
    return best


# --- hashing and separation ----------------------------------------------------------------------------------------


def hashed(model: onnx.ModelProto, error: float) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Every convolution's weights hashed, and how many distinct values and kernels they have left, as shares."""
    result, shares = onnx.ModelProto(), []
    result.CopyFrom(model)
    wanted = {node.input[1]: node for node in model.graph.node if node.op_type == "Conv"}
    for tensor in result.graph.initializer:
        if tensor.name not in wanted:
            continue
        before = numpy_helper.to_array(tensor)
        after = adaptive(before, error).weights.astype(before.dtype) if error else before
        kernels = before.shape[0] * before.shape[1]
        repeated = before[0, 0].size > 1 and before.shape[1] > 1
        shares.append((np.unique(after).size / after.size, len(separate(after).sources) / kernels if repeated else 1.0))
        tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
    values, kernels_left = np.mean(shares, axis=0)
    return result, {"values": round(float(values), 4), "kernels": round(float(kernels_left), 4)}


def hashing(judged: Judged, error: float) -> dict[str, Any]:
    """What is left of weights hashed to an error, and what is lost."""
    model, told = hashed(onnx.load_model(str(judged.arena.onnx)), error)
    file = judged.arena.folder / "hashed.onnx"
    onnx.save_model(model, str(file))
    return told | {"lost": round(judged.lost(lambda inputs: judged.arena.target.infer(file, [inputs])[0]), 3)}


def separation(judged: Judged, error: float) -> dict[str, Any]:
    """Every separation that is offered at an error, measured beside the network without it."""
    arena = judged.arena

    def measured(models: Sequence[onnx.ModelProto]) -> list[Timing]:
        found = []
        for start in range(0, len(models), AT_ONCE):
            files = {}
            for number, model in enumerate(models[start : start + AT_ONCE]):
                files[f"offer-{number}"] = arena.folder / f"offer-{number}.onnx"
                onnx.save_model(model, str(files[f"offer-{number}"]))
            times = arena.sit(files).times
            found += [Timing(0.0, 0.0, *times[name]) for name in files]
        return found

    choice = choose(
        onnx.load_model(str(arena.onnx)), ["uneven-depthwise"], measured,
        lambda weights: adaptive(weights, error).weights,
    )  # fmt: skip
    tried: list[dict[str, Any]] = [
        {"nodes": [node for _, node in each.edits], "ratio": each.timing.ratio, "high": each.timing.high,
         "low": each.timing.low, "taken": each.taken}
        for each in choice.tried
    ]  # fmt: skip
    return {"offered": sum(len(each["nodes"]) == 1 for each in tried), "tried": tried}


# --- cells ---------------------------------------------------------------------------------------------------------


def cells(part: str) -> list[tuple[Any, ...]]:
    """What is run of a part."""
    every: dict[str, list[tuple[Any, ...]]] = {
        "merge": list(ARMS),
        "hash": [(error,) for error in ERRORS],
        "separate": [(error,) for error in SEPARATED],
    }
    return every[part]


def line(name: str, row: dict[str, Any]) -> str:
    """A cell in words."""
    if "points" in row:
        at = most(row["points"])
        told = ", ".join(f"{100 * at[key]:.1f} % of {key}" for key in ("units", "parameters", "macs"))
        return f"{name:<52} {told} at {at['lost']:.2f} points; ranked in {row['rank_s']} s"
    if "tried" in row:
        best = min((each["ratio"] for each in row["tried"]), default=None)
        taken = sum(each["taken"] for each in row["tried"])
        return f"{name:<52} {row['offered']} offered, {taken} taken" + (f", best {best:.3f}x" if best else "")
    told = f"{100 * row['values']:.1f} % of values, {100 * row['kernels']:.1f} % of kernels are distinct"
    return f"{name:<52} {told}; {row['lost']:.2f} points"


def main() -> int:
    """Fill what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    work: dict[str, Any] = {"merge": merging, "hash": hashing, "separate": separation}
    for net in () if asked.table else NETS:
        judged = None
        for part in PARTS if asked.only is None else (asked.only,):
            for given in cells(part):
                name = "/".join((net, part, *map(str, given)))
                if name in results:
                    continue
                judged = judged or Judged(net)
                results[name] = work[part](judged, *given)
                results["machine"] = machine(*TOOLS)
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                print(line(name, results[name]), flush=True)
    print("\n".join(line(name, results[name]) for name in sorted(results) if "/" in name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
