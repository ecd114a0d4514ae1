"""What ours does on one network: capture, groups, proofs, a cut, one training step, ONNX; each with its seconds."""

from __future__ import annotations

import copy
import io
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow_file
from pipeline.graph.optimize import optimize
from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.outputs import tensors
from pipeline.prune.capture import Network, capture
from pipeline.prune.execute import MaskedRun
from pipeline.prune.groups import find_groups
from pipeline.prune.neutral import layers
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.proof import randomised
from pipeline.prune.surgery import carry_out, prune
from profiles.schema import GraphSpec, InputSpec

CUT = 0.3
"""Share of every group that is cut."""
EQUAL = 1e-8
"""Largest difference of two outputs in float64 that count as equal, relative to 1 + the largest output."""
GAIN = 0.3
"""Gain of the random weights under which outputs are compared: deep networks of unit gain are chaotic."""


class Record(dict[str, Any]):
    """One line of the table. Each step notes its seconds and the peak memory after it."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            self[f"{name}_error"] = f"{type(error).__name__}: {first}"[:300]
        finally:
            self.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.setdefault("peak_mib", {})[name] = round(peak)


def judge(record: Record, model: nn.Module, example: tuple[Tensor, ...], *, trained: bool = False) -> Network | None:
    """Run every step on one network; what was captured, or None.

    trained: its weights are real, and the cut network is compared under them as well as under random ones.
    """
    record["input"] = list(example[0].shape)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    network: Network | None = None
    with record.step("capture"):
        network = capture(model, example)
    record["captured"] = network is not None
    if network is None:
        return None
    record["leaves"] = dict(network.leaves)
    record["layers"] = len(layers(network))
    with record.step("groups"):
        network = find_groups(network, prove=False)
    bare = network.topology
    with record.step("proofs"):
        network = find_groups(network)
    topology = network.topology
    before = {g.id for g in bare.offered}
    after = {g.id for g in topology.offered}
    record |= {
        "offered": len(after),
        "refuted": dict(Counter(_plain(topology.group(id).frozen) for id in before - after)),
        "frozen": dict(Counter(_plain(g.frozen) for g in topology.groups if g.frozen).most_common(8)),
        "blocks": len(topology.removable),
    }
    if not after:
        return network
    record |= shares(network)
    plan = cut(network, CUT)
    with record.step("cut"):
        _cut(record, network, plan, trained)
    with tempfile.TemporaryDirectory() as folder, record.step("onnx"):
        _onnx(record, network, plan, Path(folder))
    return network


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference, relative to 1 + the largest output; infinite where shapes differ or numbers are none."""
    if [a.shape for a in expected] != [b.shape for b in got]:
        return float("inf")
    worst = max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(expected, got, strict=True))
    return worst if worst == worst else float("inf")


def _plain(reason: str | None) -> str:
    """A reason without the names in it."""
    words = (reason or "").split("'")
    return "'…'".join(words[::2])[:120] if len(words) > 2 else str(reason)[:120]


def cut(network: Network, share: float) -> PruningPlan:
    """Keep a random 1 - share of every offered group."""
    draw = np.random.default_rng(0)
    edits = []
    for group in network.topology.offered:
        kept = max(1, group.size - max(1, round(share * group.size)))
        edits.append(KeepUnits(group.id, tuple(sorted(int(i) for i in draw.permutation(group.size)[:kept]))))
    return PruningPlan(tuple(edits))


def shares(network: Network) -> dict[str, float]:
    """Share of parameters and of MACs of layers that a 30 % cut removes, and that one unit a group leaves removed."""
    found = {}
    dense = _work(network, None)
    for label, share in (("at_30", CUT), ("at_all", 1.0)):
        left = _work(network, cut(network, share))
        found[f"parameters_removed_{label}"] = round(1 - left[0] / dense[0], 4)
        found[f"macs_removed_{label}"] = round(1 - left[1] / dense[1], 4)
    free, total = 0, 0
    units = {u for g in network.topology.offered for u in g.units}
    for layer in network.topology.layers:
        macs = int(np.prod(layer.shape)) * layer.positions
        total += macs
        axes = network.topology.params.get(layer.weight, {})
        free += macs * any(np.isin(ids, list(units)).any() for ids in axes.values())
    return found | {"macs_touched": round(free / max(1, total), 4)}


def _work(network: Network, plan: PruningPlan | None) -> tuple[int, int]:
    """Parameters, and multiplications of convolutions and linear layers for one sample."""
    params = {} if plan is None else resolve(network.topology, plan).params
    state = dict(network.graph.named_parameters())

    def size(name: str, shape: tuple[int, ...]) -> int:
        axes = params.get(name, {})
        return int(np.prod([len(axes[a]) if a in axes else n for a, n in enumerate(shape)]))

    counted = sum(size(name, tuple(value.shape)) for name, value in state.items())
    macs = sum(size(layer.weight, layer.shape) * layer.positions for layer in network.topology.layers)
    return counted, macs


def _cut(record: Record, network: Network, plan: PruningPlan, trained: bool) -> None:
    pruned = prune(network, plan)
    with torch.no_grad():
        tensors(pruned(*network.example))
    record["cut"] = True
    record["cut_difference"] = _masked_and_cut(network, plan, randomised(network.graph, 1, GAIN))
    record["cut_equal"] = record["cut_difference"] < EQUAL
    if trained:
        record["trained_difference"] = _masked_and_cut(network, plan, copy.deepcopy(network.graph).double())
        record["cut_equal"] &= record["trained_difference"] < EQUAL
    pruned.train()
    wide = tuple(torch.cat([x, x.flip(-1)]) for x in network.example)
    optimizer = torch.optim.SGD(pruned.parameters(), 1e-3)
    loss = sum(t.square().mean() for t in tensors(pruned(*wide)) if t.is_floating_point())
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    record["trained"] = True


@torch.no_grad()
def _masked_and_cut(network: Network, plan: PruningPlan, weights: fx.GraphModule) -> float:
    """How far the cut network is from the masked dense one, under these weights in float64."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in network.example)
    keep = torch.from_numpy(kept_units(network.topology, plan))
    masked = tensors(MaskedRun(weights, network.readers, keep).run(*inputs))
    return difference(masked, tensors(carry_out(weights, resolve(network.topology, plan))(*inputs)))


def _onnx(record: Record, network: Network, plan: PruningPlan, folder: Path) -> None:
    specs = tuple(
        InputSpec(name=f"input_{i}", shape=tuple(x.shape), dtype="float32") for i, x in enumerate(network.example)
    )
    pruned = prune(network, plan)
    with redirect_stdout(io.StringIO()):  # torch prints the graph that it cannot export
        export(network.graph, specs, folder / "dense.onnx")
        export(pruned, specs, folder / "pruned.onnx")
    record["exported"] = True
    with torch.no_grad():
        expected = [t.numpy() for t in tensors(pruned(*network.example))]
    got = _run(folder / "pruned.onnx", network.example)
    record["onnx_difference"] = _difference(expected, got)
    record["onnx_equal"] = record["onnx_difference"] < 1e-3
    optimize(folder / "dense.onnx", GraphSpec().passes, folder / "optimized.onnx")
    narrow_file(folder / "optimized.onnx", resolve(network.topology, plan), folder / "narrow.onnx")
    record["narrow_difference"] = _difference(got, _run(folder / "narrow.onnx", network.example))
    record["narrow_equal"] = record["narrow_difference"] < 1e-4


def _run(path: Path, example: tuple[Tensor, ...]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {info.name: x.numpy() for info, x in zip(session.get_inputs(), example, strict=True)}
    return [np.asarray(out) for out in session.run(None, feeds)]


def _difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    return max(float(np.abs(x - y).max() / (1e-6 + np.abs(x).max())) for x, y in zip(a, b, strict=True))
