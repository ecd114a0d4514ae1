"""Where the values of a cut network's nodes come from, while its layers are refitted one after the other.

Two plans that differ late in the network are repaired alike up to there. The origin of a node names all that its value
depends on: what it does, how its parameters are cut, the layer's tap and aim where it is refitted, and the origins of
what it reads. Equal origins are equal values, so that those of the last plan spare a probe their part of the next one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Mapping

from torch import fx, nn

from pipeline.nouns import Cut
from pipeline.prune.taps import Tap, is_layer, is_relu


def origins(
    pruned: fx.GraphModule, cut: Cut, dirty: Container[fx.Node], aimed: Mapping[fx.Node, tuple[Tap, str]]
) -> dict[fx.Node, str]:
    """The origin of every node whose value repeats.

    dirty: nodes that the cut changes or that lie behind; the others have the dense network's values. aimed: of each
    layer its tap and the dense node that it is refitted to. A layer that is called twice, or shares its parameters with
    another, remembers what it was refitted to before: it has no origin, nor has anything behind it.
    """
    cuts = _cuts(cut)
    again = _shared(pruned)
    found: dict[fx.Node, str] = {}
    named: dict[str, str] = {}
    for node in pruned.graph.nodes:
        if node not in dirty:
            found[node] = named[node.name] = f"dense {node.name}"
            continue
        if any(n not in found for n in node.all_input_nodes) or (node.op == "call_module" and node.target in again):
            continue
        told = [node.op, str(node.target), repr(fx.node.map_arg((node.args, node.kwargs), lambda n: _Named(found[n])))]
        if node.op in ("call_module", "get_attr"):
            told += cuts(str(node.target))
        if node in aimed:
            tap, aim = aimed[node]
            other = "" if tap.other is None else named.get(tap.other)
            if other is None:
                continue
            told += [repr(tap), aim, other, *(cuts(tap.norm) if tap.norm else ())]
        found[node] = named[node.name] = hashlib.blake2b("\n".join(told).encode()).hexdigest()
    return found


class _Named(str):
    """An origin among a node's arguments: never equal to a text that is an argument itself."""

    def __repr__(self) -> str:
        return f"<{self}>"


def _cuts(cut: Cut) -> Callable[[str], list[str]]:
    """How a module's parameters and constants, or one parameter, are cut, in words."""
    every: dict[str, list[str]] = {}
    for name, axes in cut.params.items():
        kept = [f"{axis}:{positions.tobytes().hex()}" for axis, positions in sorted(axes.items())]
        path = name
        while path:  # a module has those of the modules inside it
            every.setdefault(path, []).append(f"{name} {' '.join(kept)}")
            path = path.rpartition(".")[0]
    for node, constant in cut.constants.items():
        every.setdefault(node, []).append(repr(constant))
    return lambda path: every.get(path, [])


def _shared(pruned: fx.GraphModule) -> set[str]:
    """Modules that are called more than once, and those that have a parameter with another one in common."""
    calls = Counter(str(node.target) for node in pruned.graph.nodes if node.op == "call_module")
    owners: dict[int, set[str]] = {}
    for path, module in pruned.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(path)
    twins = {path for paths in owners.values() if len(paths) > 1 for path in paths}
    return {path for path, count in calls.items() if count > 1} | twins


def worth_keeping(pruned: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a later plan may begin at this value: not at what a layer gives before its norm, addition and ReLU."""
    if node.op in ("placeholder", "output") or is_layer(pruned, node):
        return False
    module = pruned.get_submodule(str(node.target)) if node.op == "call_module" else None
    inside = isinstance(module, nn.modules.batchnorm._BatchNorm) or any(is_relu(pruned, user) for user in node.users)
    return not (len(node.users) == 1 and inside)


def to_compute(pruned: fx.GraphModule, values: Mapping[fx.Node, object]) -> set[fx.Node]:
    """Nodes that have to be computed for the output, where these are known."""
    found: set[fx.Node] = set()
    for node in reversed(pruned.graph.nodes):
        read = node.op == "output" or any(user in found for user in node.users)
        if read and node.op != "placeholder" and node not in values:
            found.add(node)
    return found
