"""What is done to the dense network before it is pruned: it grows where that is asked for, and is trained with hooks.

    values and table ─► proposals ─► each measured ─► those taken measured together ─► train (push) ─► prune

Grow, push, prune (Tian, Arbel, Clark, arXiv 2009.13716) in that order: growth comes first, as in the paper, and
pruning decides what of it stays. It may take `grow_to` times the user's network's latency, or times the budget where
that is larger: where the budget leaves slack it is filled, and a little more, so that pruning has a choice.

What grows, each place once: a group by one step of the grid, a quarter or half of its units, or by more where the limit
is above 2.25 (all groups s times as wide cost s², so that s = √limit would fill it); of these the widest that the limit
allows it alone, the narrower ones too where few places compete; and a concatenation by an Inception branch of its
parts' mean size.
The worth of a unit is the measured loss of the smallest cut of its group, per unit; of a branch's, the mean over the
groups that it is set beside. The proposals of most worth per millisecond (of the table) are built whole and measured on
the device beside the user's network, ordered by worth per millisecond as measured, and taken in turn; what is taken
is measured together again, and the longest run of them whose upper bound keeps the limit is what the network grows by.

The user's own network stays what latency and accuracy are counted from, and what every training follows: the
promise is made about its outputs, and a preparation that went astray then teaches nobody.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import onnx
from safetensors.torch import load_file, save
from torch import Tensor, fx, nn

from pipeline import precision
from pipeline.graph.export import export
from pipeline.graph.optimize import optimize
from pipeline.graph.rewriting import Timing
from pipeline.nouns import AddBranch, ChannelGroup, Growth, LatencyTable, PruningPlan, Sensitivity, Widen
from pipeline.project import Project, predict_torch
from pipeline.prune.capture import Network
from pipeline.prune.growth import joins, ordered, regrow
from pipeline.prune.surgery import prune, restore
from pipeline.recover.train import RecoverData, recover
from pipeline.report import numbers
from pipeline.stage import Outcome
from pipeline.work import Prepared, Work, captured
from profiles.errors import DeployError
from profiles.schema import PrepareSpec

TOOLS = ("torch", "numpy", "scipy")
MOST = 6
"""Networks that are measured in one session, beside the user's."""
SHARES = (0.25, 0.5)
"""What a group may grow by, of its units, beside one step of the grid."""

Timings = Callable[[str, Mapping[str, Path]], Mapping[str, Timing]]
"""Times of models against the user's network in one named session, by label."""


@dataclass(frozen=True)
class Proposal:
    """Something to grow by. name: for people. worth: calibration loss that its units promise. ms: by the table."""

    edit: Growth
    name: str
    worth: float
    ms: float

    @property
    def place(self) -> str:
        """Where it grows: a group, or a concatenation."""
        return self.edit.group if isinstance(self.edit, Widen) else self.edit.where


@dataclass(frozen=True)
class Grown:
    """A network before it is trained. slower: latency over that of the given one. told: a sentence on its growth."""

    network: Network
    growth: tuple[Growth, ...] = ()
    slower: float = 1.0
    told: str = ""


def lessons(project: Project) -> RecoverData:
    """What a project's networks are trained on. Only for projects with `data.train`."""

    def validate(model: nn.Module) -> float:
        return float(project.validate(predict_torch(model)) or 0.0)

    assert project.train is not None
    return RecoverData(project.train, project.loss, validate if project.validates else None)


# --- training ------------------------------------------------------------------------------------------------------


def trained(work: Work, grown: Grown) -> Work:
    """The work with its network trained as the profile says, starting from `grown`, as a stage."""
    spec, project, start = work.profile.prepare, work.project, grown.network.graph

    def make(folder: Path) -> dict[str, Any]:
        data, checkpoint = lessons(project), work.scratch("prepare.checkpoint")
        allowed = project.max_drop if project.validates else math.inf
        with work.run.progress("prepare", 1) as step:
            done = recover(start, work.given.graph, data, spec, checkpoint, lambda *_: step(), allowed_drop=allowed)
        (folder / "prepared.safetensors").write_bytes(save(state(done.module)))
        return {"weights": folder / "prepared.safetensors", **done.to_table()}

    inputs = {**work.taught, "growth": PruningPlan(grown.growth).to_json(), "start": hashes(start)}
    done = work.run.stage(
        work.by_data("prepare"), spec, inputs, make, tools=TOOLS,
        detail=gain,
    )  # fmt: skip
    graph = restore(prune(grown.network, PruningPlan()), load_file(done.path("weights")), "the prepared network")
    told = tuple(text for text in (grown.told, _told(spec, done)) if text)
    return replace(
        work, network=replace(grown.network, graph=graph), notes=(*work.notes, *told), rankings={},
        prepared=Prepared(work.given, done.files["weights"], grown.growth, grown.slower),
    )  # fmt: skip


def gain(done: Outcome) -> str:
    """What a training came to, of `Recovered.to_table`, in a few words."""
    return f"{len(done['history'])} epochs, {in_words(done['from'])} -> {in_words(done['to'])}"


def in_words(score: float | None) -> str:
    """A score of a training as people read it."""
    return f"{score:.4f}" if score is not None and math.isfinite(score) else "not finite"


def hashes(graph: fx.GraphModule) -> dict[str, str]:
    """SHA-256 of every tensor of a network, by name."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state(graph).items()}


def state(graph: nn.Module) -> dict[str, Tensor]:
    """A network's tensors by name, free of everything that they are views of."""
    return {name: value.detach().clone().contiguous() for name, value in graph.state_dict().items()}


def _told(spec: PrepareSpec, done: Outcome) -> str:
    """What the training came to, in a sentence."""
    hooks = f" with {' and '.join(spec.hooks)}" if spec.hooks else ""
    ran = f"before pruning the network was trained for {len(done['history'])} epochs{hooks}"
    before, after = in_words(done["from"]), in_words(done["to"])
    if done["kept"] is None:
        return f"{ran}, none of which kept its score of {before}: it is pruned as it was ({done['stopped']})."
    return f"{ran}, its score went from {before} to {after}; the recovery follows the given network."


# --- growing -------------------------------------------------------------------------------------------------------


def grow(work: Work, table: LatencyTable, values: Sensitivity, budget: float, timings: Timings) -> Grown:
    """The network grown by what is measured to fit. budget: relative to it. table, values: of it, before it grows.

    Without anything that fits the network stays as it is, and `told` says so.
    """
    limit = work.profile.prepare.grow_to * max(1.0, budget)
    built: dict[str, tuple[Proposal, Path]] = {}
    for proposal in propose(work.network, table, values, limit)[:MOST]:
        try:
            built[f"growth-{len(built) + 1}"] = (proposal, _built(work, (proposal,), f"growth-{len(built) + 1}"))
        except DeployError as error:
            work.run.console.print(f"  {error.message}", markup=False, highlight=False, soft_wrap=True)
    found = timings("growth", {label: file for label, (_, file) in built.items()}) if built else {}
    order = chosen([(proposal, found[label].ratio) for label, (proposal, _) in built.items()], limit)
    together = [order[:count] for count in range(1, len(order) + 1)]
    alone = dict(built.values())
    files = {
        f"grown-{len(each)}": alone[each[0]] if len(each) == 1 else _built(work, each, f"grown-{len(each)}")
        for each in together
    }
    measured = timings("growth together", files) if files else {}
    fits = [each for each in together if measured[f"grown-{len(each)}"].high <= limit]
    if not fits:
        least = min((timing.ratio for timing in found.values()), default=None)
        why = "nothing of it can grow" if least is None else f"the least that it could grow by takes {least:.3f}x"
        return Grown(work.network, told=f"the network did not grow: {why}, the limit is {limit:.3f}x.")
    taken, timing = fits[-1], measured[f"grown-{len(fits[-1])}"]
    names = ", ".join(proposal.name for proposal in taken)
    bounds = numbers.bounds((timing.low, timing.high), "x")
    told = f"the network grew by {names}: {timing.ratio:.3f}x ({bounds}) of its latency, the limit is {limit:.3f}x."
    growth = ordered(proposal.edit for proposal in taken)
    return Grown(_regrown(work, growth), growth, timing.ratio, told)


def propose(network: Network, table: LatencyTable, values: Sensitivity, limit: float) -> list[Proposal]:
    """All that could grow, most worth per millisecond of the table first; nothing that costs or is worth nothing.

    limit: latency that the whole may grow to, over that of the network. Of a group's widths the widest that the table
    allows it alone lies with the first, the next narrower one behind the first of all places, and so on.
    """
    shares = (0.0, *SHARES, max(SHARES[-1], math.sqrt(limit) - 1))
    groups = {group.id: group for group in network.topology.offered}
    units = {id: known for id, group in groups.items() if (known := _unit(group, table, values.finite({}))) is not None}
    found: list[tuple[int, Proposal]] = []
    for id, (worth, ms) in units.items():
        size, name = groups[id].size, groups[id].name
        widths = sorted({_stepped(max(size + 1, size * (1 + share)), table.grid) for share in shares})
        fits = [width for width in widths if ms * (width - size) <= (limit - 1) * table.dense_ms]
        for turn, width in enumerate(reversed(fits or widths[:1])):
            more = width - size
            found.append((turn, Proposal(Widen(id, width), f"{name} {size} -> {width}", worth * more, ms * more)))
    for where, parts in joins(network).items():
        if beside := [id for id in parts if id in units]:
            channels = _stepped(fmean(groups[id].size for id in beside), table.grid)
            worth, ms = (channels * fmean(units[id][column] for id in beside) for column in (0, 1))
            found.append((0, Proposal(AddBranch(where, channels), f"a branch of {channels} at {where}", worth, ms)))
    order = sorted(found, key=lambda pair: (pair[0], -pair[1].worth / pair[1].ms))
    return [proposal for _, proposal in order if proposal.worth > 0]


def chosen(measured: Sequence[tuple[Proposal, float]], limit: float) -> tuple[Proposal, ...]:
    """Proposals to take, in order of worth per latency measured, while their costs together keep the limit.

    measured: with the latency of the network that grew by it alone, over that before. Of one place the proposal of most
    worth that fits is taken, in the first one's turn.
    """
    least = 1e-3  # of the latency: below it a session tells no cost from none
    order = sorted(measured, key=lambda pair: -pair[0].worth / max(pair[1] - 1, least))
    taken: dict[str, Proposal] = {}
    costs: dict[str, float] = {}
    for proposal, ratio in order:
        place = proposal.place
        tried = {**costs, place: max(ratio - 1, 0.0)}
        if sum(tried.values(), 1.0) <= limit and (place not in taken or proposal.worth > taken[place].worth):
            taken[place], costs = proposal, tried
    return tuple(taken.values())


def _unit(group: ChannelGroup, table: LatencyTable, values: Sensitivity) -> tuple[float, float] | None:
    """Loss and milliseconds that a unit of a group stands for, by its smallest measured cut; None where unknown."""
    full = {id: choices[-1] for id, choices in table.choices.items()}
    narrower = [width for width in values.groups.get(group.id, {}) if width < group.size]
    if not narrower:
        return None
    width = max(narrower)
    try:
        saved = table.predict(full).ms - table.predict({**full, group.id: width}).ms
    except KeyError:
        return None
    cut = group.size - width
    return (values.loss(group.id, width) / cut, saved / cut) if saved > 0 else None


def _stepped(channels: float, grid: int) -> int:
    """Channels rounded up to the grid, on which every channel is paid for anyway."""
    return max(grid, math.ceil(channels / grid - 1e-9) * grid)


def _regrown(work: Work, growth: Sequence[Growth]) -> Network:
    spec, seed = work.profile.prune, work.profile.prepare.seed
    return regrow(work.network, growth, lambda graph: captured(work.project, graph, spec).network, seed=seed)


def _built(work: Work, proposals: Sequence[Proposal], name: str) -> Path:
    """The network grown by these, as the device would run it. Raises DeployError where it cannot grow so."""
    network, spec = _regrown(work, ordered(proposal.edit for proposal in proposals)), work.profile.graph
    raw = export(network.graph, work.project.inputs, work.scratch(f"{name}.raw.onnx"), spec.opset)
    file = work.scratch(f"{name}.onnx")
    optimize(raw, spec.passes, file)
    onnx.save_model(precision.in_precision(work, onnx.load_model(str(file))), str(file))
    return file
