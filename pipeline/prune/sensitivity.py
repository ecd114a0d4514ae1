"""What a cut costs in accuracy, measured: the calibration divergence after local repair, by least squares or as asked.

One edit at a time: a group at a few of its widths, or one block removed. Everything behind the edit is refitted and run
again (what lies before is as in the dense network): refitting only the next layer overstates the cost of a block up to
thirty-fold (ResNet-20/GTSRB, layer2.1: 0.0438 against 0.0012 nats). Fewer rows and ReLU turns than the final repair
uses. The same for whole plans: their loss tells how far single values fall short of adding up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from pipeline.nouns import Cut, DropBlock, KeepUnits, PruningPlan, Ranking, Sensitivity, Topology
from pipeline.prune.capture import Network
from pipeline.prune.evidence import Answers, Samples, answers, divergence, outputs_of
from pipeline.prune.maps import grams
from pipeline.prune.merge import channel_grams
from pipeline.prune.origins import origins, to_compute, worth_keeping
from pipeline.prune.plan import resolve
from pipeline.prune.repair import SequentialFit, repair
from pipeline.prune.surgery import carry_out
from pipeline.prune.taps import DenseTaps, aims, find_tap, is_layer, is_relu

KEEP_MIB = 768
ROWS, FEWEST_ROWS = 2560, 1024
FIT_MACS = 64e9
"""Multiply-accumulates of refitting the whole network once, up to which a probe takes all its rows; ResNet-56: 22e9."""
TURNS = 2
JUDGES = 3
"""One of so many samples judges a refit and is not refitted on."""

LOOKS = ("ends", "middle", "next")
"""Where the two widths lie that `around` tries: at the ends of what a group may have, half-way to them, or next to the
present one. Far ones find other valleys, near ones the bottom of this one."""


def to_fit(samples: int) -> int:
    """How many of the samples, the first ones, a probe refits layers on; all of them where they are very few."""
    return samples - samples // JUDGES


class LossProbe:
    """Measures the loss of edits against the dense network on fixed calibration samples.

    The last third of the samples judges, the others are refitted on: a wide layer refitted on few samples gives back
    their outputs whatever was cut before it (a head of 2,048 inputs on 32 images: 5e-7 nats for half a ResNet-50).
    Holds the dense activations that edits start from, and those of the last plan as far as the next one shares its
    repair (each up to KEEP_MIB; what does not fit is computed again).
    """

    def __init__(self, network: Network, samples: Samples) -> None:
        self.network = network
        self.inputs = samples.joined()
        rows, self.turns = rows_worth(network)
        fitted = to_fit(samples.count)
        self.taps = DenseTaps(network, self.inputs, rows, fitted)
        self.values = _dense_values(network.graph, self.inputs)
        self.dense = answers(self.values[_output(network.graph)], samples.count, network.answers)
        self.judged = slice(fitted if fitted < samples.count else 0, None)
        self.whole = resolve(network.topology, PruningPlan())
        self.last: dict[str, object] = {}

    @torch.no_grad()
    def loss(self, plan: PruningPlan) -> float:
        """Mean divergence of a plan after repair of every layer that it changes or that lies behind.

        Infinite if not finite.
        """
        cut = resolve(self.network.topology, plan)
        pruned = carry_out(self.network.graph, cut)
        dirty = _reached(pruned, _changed(self.network, pruned, cut, self.whole))
        clean = [node for node in pruned.graph.nodes if node not in dirty and node.name in self.values]
        fit = _Fit(pruned, self.network, cut, self.taps, turns=self.turns, only=dirty, known=[n.name for n in clean])
        outputs, self.last = fit.begun(self.inputs, {node: self.values[node.name] for node in clean}, self.last, dirty)
        said = answers(outputs, len(self.inputs[0]), self.network.answers)
        loss = float(divergence(said, self.dense)[self.judged].mean())
        return loss if math.isfinite(loss) else math.inf


class _Fit(SequentialFit):
    """Refits what earlier values do not spare it, and keeps the values that a later plan may share."""

    def begun(
        self, inputs: tuple[Tensor, ...], clean: Mapping[fx.Node, object], last: Mapping[str, object],
        dirty: set[fx.Node],
    ) -> tuple[object, dict[str, object]]:  # fmt: skip
        """The outputs, and values by origin. clean: dense values; last: those of the plan before."""
        self.origins = origins(self.pruned, self.cut, dirty, self.aimed)
        shared = {node: last[came] for node, came in self.origins.items() if node not in clean and came in last}
        self.keeping = _Held(KEEP_MIB << 20)
        known = {**clean, **shared}
        wanted = to_compute(self.pruned, known)
        for node, value in shared.items():
            self.keeping.hold(self.origins[node], value)
        nodes = [node for node in self.pruned.graph.nodes if node.op != "placeholder" and node not in wanted]
        outputs = self.run(*inputs, initial_env={node: known.get(node) for node in nodes})
        return outputs, self.keeping.values

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if n in self.origins and worth_keeping(self.pruned, n):
            self.keeping.hold(self.origins[n], value)
        return value


class _Held:
    """Values by name, as many as fit. left: bytes, below 0 once one was held that had to be."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.values: dict[str, object] = {}

    def hold(self, name: str, value: object, *, always: bool = False) -> None:
        """Hold a value where there is room for it, or always."""
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        if always or size <= self.left:
            self.left -= size
            self.values[name] = value


class RepairProbe:
    """Repairs plans in whole, in any way, and measures what they lose then; as slow as that repair.

    samples: what losses are measured on. fitted: what the repair learns from, the first of them, which then do not
    judge; none at all where there is no data.
    """

    def __init__(
        self, network: Network, samples: Samples, fitted: Samples, mode: str, rankings: Mapping[str, Ranking]
    ) -> None:
        self.network, self.fitted, self.mode, self.rankings = network, fitted, mode, rankings
        judged = fitted.count if fitted.count < samples.count else 0
        self.inputs = tuple(x[judged:] for x in samples.joined())
        with torch.no_grad():
            self.dense = self._said(network.graph)
        self.taps = DenseTaps(network, fitted.joined()) if mode == "least-squares" and fitted.count else None
        self.moments = grams(network, fitted.joined()) if mode == "layerwise" else None
        self.reads = channel_grams(network, fitted.joined()) if mode == "merge" and fitted.count else None
        self.outputs = outputs_of(network.graph, fitted, network.answers)

    def loss(self, plan: PruningPlan) -> float:
        """Mean divergence of a plan after repair; infinite if not finite."""
        return self.judged(self.repaired(plan))

    def repaired(self, plan: PruningPlan) -> fx.GraphModule:
        """The network cut and repaired on the fitted samples."""
        pruned = carry_out(self.network.graph, resolve(self.network.topology, plan))
        return repair(
            pruned, self.network, plan, self.fitted, self.mode,
            rankings=self.rankings, taps=self.taps, moments=self.moments, reads=self.reads,
            dense=self.outputs,
        )  # fmt: skip

    @torch.no_grad()
    def judged(self, model: nn.Module) -> float:
        """Mean divergence of a network on the samples that judge; infinite if not finite."""
        loss = float(divergence(self._said(model), self.dense).mean())
        return loss if math.isfinite(loss) else math.inf

    def _said(self, model: nn.Module) -> Answers:
        return answers(model(*self.inputs), len(self.inputs[0]), self.network.answers)


Probe = LossProbe | RepairProbe


def _output(graph: fx.GraphModule) -> str:
    name: str = next(node.name for node in graph.graph.nodes if node.op == "output")
    return name


def _owner(topology_name: str) -> str:
    return topology_name.rpartition(".")[0]


def _changed(network: Network, pruned: fx.GraphModule, cut: Cut, whole: Cut) -> frozenset[str]:
    """Nodes whose own result an edit changes, and layers that will be refitted although nothing before them changes.

    whole: the cut that takes nothing away.
    """
    owners = {_owner(name) for name in cut.params} | {
        node for node, constant in cut.constants.items() if constant != whole.constants[node]
    }
    changed = set()
    for node in pruned.graph.nodes:
        if (node.op == "call_module" and str(node.target) in owners) or (
            node.op == "get_attr" and str(node.target) in cut.params
        ):
            changed.add(node.name)
    for block in cut.dropped:
        changed |= _behind(network, pruned, block.add)
    return frozenset(changed | _aimed_layers(network, pruned, set(aims(network, cut.dropped))))


def _aimed_layers(network: Network, pruned: fx.GraphModule, adds: set[str]) -> set[str]:
    """The layers whose output lands in one of these additions."""
    found: set[str] = set()
    done: set[str] = set()
    for node in pruned.graph.nodes:
        if is_layer(pruned, node) and find_tap(network, pruned, node, done).node in adds:
            found.add(node.name)
        done.add(node.name)
    return found


def _behind(network: Network, pruned: fx.GraphModule, add: str) -> set[str]:
    """Nodes of the pruned graph that read the skip in place of a removed addition."""
    node = next(n for n in network.graph.graph.nodes if n.op == "call_module" and n.target == add)
    readers = {user.name for user in node.users}
    return {n.name for n in pruned.graph.nodes if n.name in readers}


def _reached(pruned: fx.GraphModule, changed: frozenset[str]) -> set[fx.Node]:
    """Nodes that a change reaches, and the output."""
    dirty: set[fx.Node] = set()
    for node in pruned.graph.nodes:
        if node.op == "output" or node.name in changed or any(n in dirty for n in node.all_input_nodes):
            dirty.add(node)
    return dirty


class _Keeping(fx.Interpreter):
    """Keeps the results that edits start from.

    These are what a layer or an addition reads, not what lies inside a layer, its norm and its ReLU.
    """

    def __init__(self, graph: fx.GraphModule, limit: int) -> None:
        super().__init__(graph)
        self.given = graph
        self.held = _Held(limit)

    def _inside(self, n: fx.Node) -> bool:
        if len(n.users) != 1:
            return False
        module = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        layer = isinstance(module, nn.Conv1d | nn.Conv2d | nn.modules.batchnorm._BatchNorm)
        return layer or is_relu(self.given, next(iter(n.users)))

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.op == "output" or not self._inside(n):
            self.held.hold(n.name, value, always=n.op == "output")
        return value


@torch.no_grad()
def _dense_values(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, object]:
    run = _Keeping(graph, KEEP_MIB << 20)
    run.run(*inputs)
    return run.held.values


def rows_worth(network: Network) -> tuple[int, int]:
    """Rows of patches that a probe refits each layer on, and how often: less where wide layers take long to solve."""
    shapes = [m.weight.shape for m in network.graph.modules() if isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear)]
    depths = [math.prod(shape[1:]) for shape in shapes]

    def macs(rows: int) -> float:
        return sum(rows * d * min(rows, d) + min(rows, d) ** 3 / 3 for d in depths)

    rows = next((rows for rows in range(ROWS, FEWEST_ROWS, -256) if macs(rows) <= FIT_MACS), FEWEST_ROWS)
    return rows, TURNS if macs(rows) <= FIT_MACS else 1


def affordable(network: Network) -> int:
    """How many samples a probe can hold: those whose kept activations together take KEEP_MIB."""
    keeping = _Keeping(network.graph, 0)
    nodes = [node for node in network.graph.graph.nodes if node.name in network.shapes and not keeping._inside(node)]
    each = sum(4 * math.prod(network.shapes[node.name][1:]) for node in nodes)
    return max(16, (KEEP_MIB << 20) // max(1, each))


def measure(
    probe: Probe,
    rankings: Mapping[str, Ranking],
    choices: Mapping[str, Sequence[int]],
    *,
    widths: int = 3,
    progress: Callable[[float], None] | None = None,
) -> Sensitivity:
    """Added loss of every offered group at `widths` of its choices, and of every removable block.

    choices: group id -> widths that the device's grid allows, ascending, the full one last.
    """
    topology = probe.network.topology
    edits = list(_edits(topology, rankings, choices, widths))
    groups: dict[str, dict[int, float]] = {g.id: {g.size: 0.0} for g in topology.offered}
    blocks: dict[str, float] = {}
    for number, edit in enumerate(edits):
        loss = probe.loss(PruningPlan((edit,)))
        if isinstance(edit, DropBlock):
            blocks[edit.block] = loss
        else:
            groups[edit.group][len(edit.kept)] = loss
        if progress is not None:
            progress((number + 1) / len(edits))
    return Sensitivity({id: _monotone(curve) for id, curve in groups.items()}, blocks)


def around(
    loss: Callable[[Mapping[str, int], frozenset[str]], float],
    topology: Topology,
    choices: Mapping[str, Sequence[int]],
    widths: Mapping[str, int],
    dropped: frozenset[str],
    before: Sensitivity,
    *,
    look: str = "ends",
    blocks: bool = True,
) -> Sensitivity:
    """Values of every edit while all the others are as in one choice of widths and removed blocks.

    Single cuts of the dense network look harmless, since everything behind them takes over; together they are not
    (ResNet-20/GTSRB at 0.5x: 0.0018 nats believed, 0.055 measured). Each group is tried whole and at two other widths
    (look: see LOOKS), each block the other way round. With a block the values of what is cut inside it go too, so that
    its own has them added. loss: of a choice after repair. before: stands in for groups of removed blocks, and where
    the loss of a choice is infinite for every edit that does not mend it, which then tells nothing. blocks: whether
    any may go.
    """
    here = loss(widths, dropped)
    groups: dict[str, Mapping[int, float]] = {}
    for group in topology.offered:
        if group.block in dropped:
            groups[group.id] = before.groups[group.id]
            continue
        now = widths[group.id]
        others = {*_seen_from(now, [w for w in choices[group.id] if w != group.size], look), group.size} - {now}
        curve = {now: here} | {w: loss({**widths, group.id: w}, dropped) for w in sorted(others)}
        whole = curve[group.size]
        if math.isinf(whole):
            groups[group.id] = before.groups[group.id]
        else:
            groups[group.id] = _monotone({w: max(0.0, value - whole) for w, value in curve.items()})
    edits = Sensitivity(groups, {})
    gone: dict[str, float] = {}
    for block in topology.removable if blocks else ():
        other = loss(widths, dropped ^ {block.id})
        if math.isinf(here) and math.isinf(other):
            gone[block.id] = before.blocks[block.id]
        elif block.id in dropped:
            gone[block.id] = max(0.0, here - other)
        elif math.isinf(here):
            gone[block.id] = other
        else:
            inside = sum(edits.loss(g.id, widths[g.id]) for g in topology.offered if g.block == block.id)
            gone[block.id] = max(0.0, other - here + inside)
    return Sensitivity(groups, gone)


def _edits(
    topology: Topology, rankings: Mapping[str, Ranking], choices: Mapping[str, Sequence[int]], widths: int
) -> Iterable[KeepUnits | DropBlock]:
    for group in topology.offered:
        for width in spread([w for w in choices.get(group.id, ()) if w < group.size], widths):
            yield KeepUnits(group.id, rankings[group.id].keep(width))
    for block in topology.removable:
        yield DropBlock(block.id)


def spread(widths: Sequence[int], count: int) -> list[int]:
    """At most `count` of the widths, the narrowest and the widest among them, evenly spread."""
    if len(widths) <= count:
        return list(widths)
    if count == 1:
        return [widths[len(widths) // 2]]
    return sorted({widths[round(i * (len(widths) - 1) / (count - 1))] for i in range(count)})


def _seen_from(now: int, widths: Sequence[int], look: str) -> set[int]:
    """The widths that a look tries beside the present one, at most two of them."""
    narrower, wider = [w for w in widths if w < now], [w for w in widths if w > now]
    if look == "ends":
        return set(spread(narrower + wider, 2))
    if look == "middle":
        return {*narrower[len(narrower) // 2 :][:1], *wider[: (len(wider) + 1) // 2][-1:]}
    return {*narrower[-1:], *wider[:1]}


def _monotone(curve: Mapping[int, float]) -> dict[int, float]:
    """Loss that does not rise with width: noise of a few samples must not make a narrower group look better."""
    result, floor = {}, 0.0
    for width in sorted(curve, reverse=True):
        floor = max(floor, curve[width])
        result[width] = floor
    return dict(sorted(result.items()))
