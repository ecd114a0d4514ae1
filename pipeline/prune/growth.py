"""Growth as a record: edits that turn the user's network into the one that is pruned, and can be carried out again.

A network that was grown is not what the user's factory builds. So growth is part of the plan, before its cuts: `regrow`
does to the factory's network what was done when it grew. Groups are widened together, branches are joined one by one,
and the network is captured and grouped again each time. Weights are not part of the record: what
is built again takes them from a file, and only the shapes have to come out alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import fx

from pipeline.nouns import AddBranch, Growth, Widen
from pipeline.prune.capture import Network
from pipeline.prune.grow import branch, branchable, widen

Again = Callable[[fx.GraphModule], Network]
"""Captures and groups a grown graph as the network that it grew from was."""


def regrow(network: Network, growth: Iterable[Growth], again: Again, *, seed: int = 0) -> Network:
    """The network after these edits, in order. seed: of new weights alone. Raises what `widen` and `branch` raise."""
    widths: dict[str, int] = {}
    for edit in growth:
        if isinstance(edit, Widen):
            widths[edit.group] = edit.width
            continue
        if widths:
            network, widths = again(widen(network, widths, seed=seed)), {}
        network = again(branch(network, edit.where, edit.channels, seed=seed))
    return again(widen(network, widths, seed=seed)) if widths else network


def ordered(growth: Iterable[Growth]) -> tuple[Growth, ...]:
    """Wider groups first: a branch becomes a member of the group that it reads, whose id changes with that."""
    return tuple(sorted(growth, key=lambda edit: isinstance(edit, AddBranch)))


def joins(network: Network) -> dict[str, tuple[str, ...]]:
    """Concatenations that a branch can be joined to -> the groups that their parts are of, one a part."""
    nodes = {node.name: node for node in network.graph.graph.nodes}
    units = {unit: group.id for group in network.topology.groups for unit in group.units}
    found = {}
    for name in branchable(network):
        node = nodes.get(name)
        if node is None or (node.op == "call_module" and str(node.target) == name):
            continue
        parts = [_source(network, part, units) for part in node.all_input_nodes]
        if known := tuple(part for part in parts if part is not None):
            found[name] = known
    return found


def _source(network: Network, node: fx.Node, units: Mapping[int, str]) -> str | None:
    """The group of what the layer that a tensor comes from gives, None where it is of no group."""
    while node.op != "placeholder" and node.all_input_nodes:
        axes = network.topology.params.get(f"{node.target}.weight", {})
        weight = getattr(network.graph.get_submodule(str(node.target)), "weight", None) if axes else None
        if weight is not None and weight.dim() > 1:
            labels = axes.get(0)
            return units.get(int(labels[0])) if labels is not None and len(labels) else None
        node = node.all_input_nodes[0]
    return None
