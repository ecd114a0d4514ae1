"""Channel groups and removable blocks of a captured network.

Labels are propagated through every operator, their connected components are the units, and units that touch the same
axes of the same tensors form a group. A block is a residual branch: the nodes that reach an addition only through one
of its operands, with one entry and at least one layer that mixes channels. Everything is then proved (proof.py); what
fails is frozen with its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from pipeline.nouns import Block, ChannelGroup, Constant, Topology, Units
from pipeline.prune import operators
from pipeline.prune.capture import Network, apart, weight_count
from pipeline.prune.labels import NONE, Ids, Labels, LabelSpace, Op, Reader
from pipeline.prune.neutral import describe, layers
from pipeline.prune.own_rules import apply_own
from pipeline.prune.rules.base import rules, unknown


def propagate(network: Network, *, heads: bool = False) -> LabelSpace:
    """Run every rule over the network. heads: cut attention by whole heads instead of channels of every head."""
    space, table = LabelSpace(_aliases(network), heads=heads), rules()
    for op in describe(network):
        if op.kind == "input":
            ids = space.fresh(op.out_shape[1]) if len(op.out_shape) > 1 else np.zeros(0, dtype=np.int64)
            space.tensors[op.output] = Labels.channels(ids) if ids.size else NONE
            space.freeze(ids, "it is an input of the network")
        elif op.kind == "output":
            for name in op.inputs:
                space.freeze(space.tensors[name], "it is an output of the network")
        elif op.kind == "parameter":
            _parameter(op, space)
        elif op.kind == "piece":
            space.tensors.setdefault(op.output, NONE)
        elif op.kind in network.rules:
            apply_own(network, op, space)
        else:
            table.get(op.kind, unknown)(op, space)
    return space


def _aliases(network: Network) -> dict[str, str]:
    """Name of a parameter that has several -> the first of them."""
    first: dict[int, str] = {}
    graph = network.graph
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(value), name) for name, value in named}


def _parameter(op: Op, space: LabelSpace) -> None:
    """A parameter used directly (layer scale, position embedding): a label along every axis longer than one."""
    name = op.params["value"]
    space.direct[op.output] = name
    found = {}
    for axis, size in enumerate(op.out_shape):
        if size > 1:
            known = space.params.get((space.aliases.get(name, name), axis))
            found[axis] = space.fresh(size) if known is None else known
            space.param(name, axis, found[axis])
    space.tensors[op.output] = Labels(found)


def find_groups(
    network: Network, *, freeze: Sequence[str] = (), prove: bool = True, seed: int = 0, heads: bool = False
) -> Network:
    """The network with its topology: proved groups and blocks.

    freeze: names of layers (prefixes) that stay as they are. heads: whole attention heads are the units of attention,
    instead of the channels of every head alike (those of q and k, and those of v).
    """
    space = propagate(network, heads=heads)
    component = space.units()
    topology, readers = _topology(network, space, component)
    topology = _freeze_named(topology, freeze)
    found = dataclasses.replace(network, topology=topology, readers=readers)
    if not prove:
        return found
    from pipeline.prune.proof import refute

    reasons = refute(found, seed=seed)
    groups = tuple(dataclasses.replace(g, frozen=g.frozen or reasons.get(g.id)) for g in topology.groups)
    blocks = tuple(dataclasses.replace(b, frozen=b.frozen or reasons.get(b.id)) for b in topology.blocks)
    return dataclasses.replace(found, topology=dataclasses.replace(topology, groups=groups, blocks=blocks))


def _freeze_named(topology: Topology, names: Sequence[str]) -> Topology:
    def named(group: ChannelGroup) -> str | None:
        hit = next((n for n in names for m in group.members if m == n or m.startswith(f"{n}.")), None)
        return f"prune.freeze names '{hit}'" if hit else None

    groups = tuple(dataclasses.replace(g, frozen=g.frozen or named(g)) for g in topology.groups)
    return dataclasses.replace(topology, groups=groups)


def _topology(network: Network, space: LabelSpace, component: Ids) -> tuple[Topology, tuple[Reader, ...]]:
    def units(ids: Ids | None) -> Units | None:
        if ids is None:
            return None
        return (
            np.where(ids >= 0, component[np.maximum(ids, 0)], -1).astype(np.int32)
            if component.size
            else ids.astype(np.int32)
        )

    params: dict[str, dict[int, Units]] = defaultdict(dict)
    for (name, axis), ids in space.params.items():
        params[name][axis] = units(ids)  # type: ignore[assignment]
    frozen: dict[int, str] = {}
    for ids, reason in space.frozen:
        for unit in np.unique(component[ids]):
            frozen.setdefault(int(unit), reason)
    constants = tuple(
        Constant(c.node, c.kind, c.axis, tuple(units(ids) for ids in c.ids), c.sizes, c.indices)  # type: ignore[arg-type]
        for c in space.constants
        if any(set(np.unique(component[ids[ids >= 0]])) - frozen.keys() for ids in c.ids if ids is not None)
    )
    blocks = find_blocks(network)
    produced = {f"{name}[{axis}]" for name, axis in space.produced}
    # a frozen group of nothing but tables and scales tells nobody anything; a layer's weight that stays does
    own = {name: params.get(name, {}) for name in space.direct.values()}
    weights = {f"{name}[{axis}]" for name, axes in own.items() for axis in (0, 1) if axis in axes and _is_weight(name)}
    direct = {f"{name}[{axis}]" for name, axes in own.items() for axis in axes} - weights
    made = produced | {slot for slot in weights if slot.endswith("[0]")}
    found = _groups(params, produced, made, frozen, blocks)
    groups = tuple(g for g in found if not g.frozen or set(g.members) - direct)
    read = {node.name: node.all_input_nodes[:1] for node in network.graph.graph.nodes}
    along = {name: network.samples.get(sources[0].name, 0) for name, sources in read.items() if sources}
    stacked = {name for name, sources in read.items() if sources and sources[0].name in network.stacked}
    readers = tuple(
        dataclasses.replace(r, ids=units(r.ids), samples=along[r.op], stacked=r.op in stacked)  # type: ignore[arg-type]
        for r in space.readers
    )
    leaves = tuple(network.leaves.items())
    count = int(component.max(initial=-1)) + 1
    made_by = frozenset(space.produced)
    return Topology(groups, blocks, dict(params), constants, leaves, layers(network), count, made_by), readers


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] == "weight"


def _groups(
    params: dict[str, dict[int, Units]],
    produced: set[str],
    made: set[str],
    frozen: dict[int, str],
    blocks: tuple[Block, ...],
) -> tuple[ChannelGroup, ...]:
    touched: dict[int, list[tuple[str, int]]] = defaultdict(list)
    first: dict[int, tuple[int, int]] = {}
    slots = [(f"{name}[{axis}]", ids) for name, axes in params.items() for axis, ids in axes.items()]
    for number, (slot, ids) in enumerate(slots):
        present, counts = np.unique(ids[ids >= 0], return_counts=True)
        for unit, times in zip(present.tolist(), counts.tolist(), strict=True):
            touched[unit].append((slot, times))
        if slot in produced:
            for position, unit in enumerate(ids.tolist()):
                first.setdefault(unit, (number, position))
    by_members: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for unit, members in touched.items():
        by_members[tuple(sorted(members))].append(unit)
    order = {unit: first.get(unit, (len(slots), unit)) for unit in touched}
    numbers = {slot: number for number, (slot, _) in enumerate(slots)}
    homes = {name: block.id for block in blocks for name in block.params}
    found = [
        _group(key, sorted(ids, key=order.__getitem__), numbers, produced, made, frozen, homes)
        for key, ids in by_members.items()
    ]
    return tuple(sorted(found, key=lambda g: order[g.units[0]]))


def _group(
    key: tuple[tuple[str, int], ...],
    units: list[int],
    numbers: Mapping[str, int],
    produced: set[str],
    made: set[str],
    frozen: dict[int, str],
    homes: Mapping[str, str],
) -> ChannelGroup:
    """numbers: slot -> its place among all. made: slots whose layer gives the group its name, produced or not.

    homes: parameter -> the block that it leaves with.
    """
    members = tuple(sorted((slot for slot, _ in key), key=numbers.__getitem__))
    makers = [slot for slot in members if slot in produced]
    reason = next((frozen[u] for u in units if u in frozen), None)
    if reason is None and not makers:
        reason = "no layer produces it"
    if reason is None and len(units) == 1:
        reason = "it is a single unit"
    named = [slot for slot in members if slot in made]
    layer = (named or members)[0].rsplit("[", 1)[0].rsplit(".", 1)[0]
    home = {homes.get(member.rsplit("[", 1)[0]) for member in members}
    block = home.pop() if len(home) == 1 else None
    digest = hashlib.sha256(repr(sorted(key)).encode()).hexdigest()[:12]
    return ChannelGroup(digest, layer if named else f"input of {layer}", tuple(units), members, reason, block)


# --- blocks --------------------------------------------------------------------------------------------------------


def find_blocks(network: Network) -> tuple[Block, ...]:
    """Residual branches that can be removed whole, in execution order; of nested ones the inner."""
    graph = network.graph.graph
    modules = dict(network.graph.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], operators.ResidualAdd):
            block = _branch(network, node, calls)
            if block is not None:
                found.append(block)
    taken: set[str] = set()
    kept: list[Block] = []
    for block in sorted(found, key=lambda b: len(b.nodes)):
        if not taken & set(block.nodes):
            taken |= set(block.nodes)
            kept.append(block)
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    return tuple(sorted(kept, key=lambda b: position[b.nodes[-1]]))


def _branch(network: Network, add: fx.Node, calls: Mapping[Any, int]) -> Block | None:
    """The heavier operand of an addition, where it can go. calls: how often each module is called in all."""
    a, b = (arg for arg in add.args if isinstance(arg, fx.Node))
    if a is b or network.shapes[a.name] != network.shapes[b.name]:
        return None
    only = apart(a, b)
    work = [weight_count(network.graph, nodes) for nodes in only]
    if work[0] == work[1]:
        return None
    branch = 0 if work[0] > work[1] else 1
    nodes, end = only[branch], (a, b)[branch]
    entries = {n for node in nodes for n in node.all_input_nodes if n not in nodes and n.op != "get_attr"}
    closed = all(user in nodes or (node is end and user is add) for node in nodes for user in node.users)
    if len(entries) != 1 or not closed or any(node.op in ("placeholder", "get_attr") for node in nodes):
        return None
    ordered = sorted(nodes)
    inside = Counter(node.target for node in nodes if node.op == "call_module")
    params = tuple(
        f"{node.target}.{name}"
        for node in ordered
        if node.op == "call_module" and calls[node.target] == inside[node.target]
        for name, _ in [
            *network.graph.get_submodule(str(node.target)).named_parameters(),
            *network.graph.get_submodule(str(node.target)).named_buffers(),
        ]
    )
    weights = [p.rsplit(".", 2)[0] for p in params if p.endswith(".weight")]
    common = _common_prefix(weights)
    return Block(common or str(add.target), str(add.target), 1 - branch, tuple(n.name for n in ordered), params)


def _common_prefix(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    prefix = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) != 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)
