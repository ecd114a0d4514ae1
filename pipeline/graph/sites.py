"""Cut a graph into sites, the pieces that are rows of the latency table. Every node is in exactly one.

    residual block   what lies between the tensor where two branches part and the addition where they meet, and the
                     activation after it; removable blocks of the topology first, then other additions
    layer            elsewhere, one heavy operator with the cheap ones after it, up to the next heavy one; what is
                     cheap and comes before any heavy one goes with the first that reads it

The parting tensor is found as the immediate dominator of the addition: the last node that every path to it passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from pipeline.graph.inner import reads
from pipeline.nouns import Topology

HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
ACTIVATIONS = frozenset(
    {"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Elu", "Selu", "HardSigmoid", "HardSwish", "Mish", "Gelu"}
)
MOST_HEAVY = 12
"""Heavy operators of the largest addition that is taken for one block where the topology does not say so."""

Index = int


@dataclass(frozen=True)
class Links:
    """Who makes and who reads what, along tensors that depend on the network's input.

    nodes: in execution order. makers: tensor -> node index. readers: tensor -> node indices. inputs, outputs: of the
    graph. dynamic: indices of nodes that depend on the input; the others only turn parameters into others.
    """

    nodes: tuple[onnx.NodeProto, ...]
    makers: Mapping[str, Index]
    readers: Mapping[str, tuple[Index, ...]]
    inputs: frozenset[str]
    outputs: frozenset[str]
    dynamic: frozenset[Index]

    def moves(self, name: str) -> bool:
        """Whether a tensor depends on the network's input."""
        return name in self.inputs or self.makers.get(name) in self.dynamic

    def sources(self, index: Index) -> list[Index]:
        """Nodes that make the dynamic inputs of a node, in input order."""
        made = (self.makers.get(name) for name in reads(self.nodes[index]))
        return list(dict.fromkeys(i for i in made if i is not None and i in self.dynamic))


@dataclass
class Piece:
    """A site in the making: node indices, and what it is. block: id of the removable block, add: its addition."""

    nodes: set[Index]
    heavy: bool
    block: str | None = None
    add: Index | None = None
    skip: int = 1
    closed: bool = field(default=False)


def link(graph: onnx.GraphProto, inputs: Iterable[str]) -> Links:
    """Read the links of a graph; `inputs` are its true inputs."""
    nodes = tuple(graph.node)
    fed = frozenset(inputs)
    moving, dynamic = set(fed), set()
    makers: dict[str, Index] = {}
    readers: dict[str, list[Index]] = {}
    for index, node in enumerate(nodes):
        if any(name in moving for name in reads(node)):
            dynamic.add(index)
            moving.update(name for name in node.output if name)
        for name in node.output:
            if name:
                makers[name] = index
        for name in reads(node):
            readers.setdefault(name, []).append(index)
    frozen = {name: tuple(found) for name, found in readers.items()}
    return Links(nodes, makers, frozen, fed, frozenset(info.name for info in graph.output), frozenset(dynamic))


def find_pieces(links: Links, topology: Topology) -> list[Piece]:
    """All sites in execution order."""
    pieces: list[Piece] = []
    owner: dict[Index, Piece] = {}
    for piece in _blocks(links, topology):
        if not piece.nodes & owner.keys():
            _absorb_tail(links, piece, owner)
            _claim(pieces, owner, piece)
    for index in sorted(links.dynamic - owner.keys()):
        _place(links, index, pieces, owner)
    _place_weights(links, owner)
    return sorted((piece for piece in pieces if piece.nodes), key=lambda piece: min(piece.nodes & links.dynamic))


def _claim(pieces: list[Piece], owner: dict[Index, Piece], piece: Piece) -> None:
    pieces.append(piece)
    owner.update((index, piece) for index in piece.nodes)


def _place(links: Links, index: Index, pieces: list[Piece], owner: dict[Index, Piece]) -> None:
    """A layer's node: heavy ones open a site, cheap ones join the site that made their input last."""
    makers = sorted((i for i in links.sources(index) if not owner[i].closed), reverse=True)
    heavy = links.nodes[index].op_type in HEAVY
    light = next((owner[i] for i in makers if not owner[i].heavy), None)
    if heavy:
        target = light or Piece(set(), True)
        target.heavy = True
    else:
        target = owner[makers[0]] if makers else Piece(set(), False)
    if not target.nodes:
        pieces.append(target)
    target.nodes.add(index)
    owner[index] = target


def _place_weights(links: Links, owner: dict[Index, Piece]) -> None:
    """Nodes that only turn parameters into others go with the first node that reads them."""
    for index in reversed(range(len(links.nodes))):
        if index in owner:
            continue
        readers = [i for name in links.nodes[index].output for i in links.readers.get(name, ()) if i in owner]
        if readers:
            owner[index] = owner[min(readers)]
            owner[index].nodes.add(index)


# --- residual blocks -------------------------------------------------------------------------------------------------


def _blocks(links: Links, topology: Topology) -> list[Piece]:
    """Candidates for blocks: removable ones first, the small before the large."""
    parents = _dominators(links)
    adds = {f"/{block.add}/": (block.id, block.skip) for block in topology.removable}
    found = []
    for index, node in enumerate(links.nodes):
        if node.op_type != "Add" or index not in links.dynamic:
            continue
        nodes = _between(links, parents[index], index)
        if nodes is None:
            continue
        id, skip = adds.get(node.name[: node.name.find("/", 1) + 1], (None, 1))
        heavies = sum(links.nodes[i].op_type in HEAVY for i in nodes)
        both = all(links.moves(name) for name in node.input)
        if id is not None or (both and 1 <= heavies <= MOST_HEAVY):
            found.append(Piece(nodes, True, id, index, skip, closed=True))
    return sorted(found, key=lambda piece: (piece.block is None, len(piece.nodes)))


def _dominators(links: Links) -> dict[Index, Index]:
    """Immediate dominator of every dynamic node; -1 is the network's input."""
    parents: dict[Index, Index] = {}
    depth: dict[Index, int] = {-1: 0}
    for index in sorted(links.dynamic):
        sources = links.sources(index)
        if any(name in links.inputs for name in reads(links.nodes[index])):
            sources = [-1, *sources]
        meet = sources[0]
        for other in sources[1:]:
            meet = _common(meet, other, parents, depth)
        parents[index] = meet
        depth[index] = depth[meet] + 1
    return parents


def _common(a: Index, b: Index, parents: Mapping[Index, Index], depth: Mapping[Index, int]) -> Index:
    while a != b:
        if depth[a] >= depth[b]:
            a = parents[a]
        else:
            b = parents[b]
    return a


def _between(links: Links, start: Index, end: Index) -> set[Index] | None:
    """Nodes after `start` up to `end`, None if anything but the end's result is read outside."""
    found, stack = {end}, [end]
    while stack:
        for source in links.sources(stack.pop()):
            if source != start and source not in found:
                found.add(source)
                stack.append(source)
    for index in found - {end}:
        for name in links.nodes[index].output:
            if name in links.outputs or any(reader not in found for reader in links.readers.get(name, ())):
                return None
    return found


def _absorb_tail(links: Links, piece: Piece, owner: Mapping[Index, Piece]) -> None:
    """Take the activation after the addition, also in the form x * sigmoid(x)."""
    assert piece.add is not None
    result = links.nodes[piece.add].output[0]
    if result in links.outputs:
        return
    readers = links.readers.get(result, ())
    kinds = {links.nodes[i].op_type for i in readers}
    if len(readers) == 1 and kinds <= ACTIVATIONS and readers[0] not in owner:
        piece.nodes.add(readers[0])
    elif len(readers) == 2 and "Mul" in kinds and kinds - {"Mul"} <= ACTIVATIONS:
        first, last = sorted(readers)
        made = links.nodes[first].output[0]
        if links.readers.get(made, ()) == (last,) and not {first, last} & owner.keys():
            piece.nodes.update((first, last))


def result_of(links: Links, nodes: Sequence[Index]) -> list[str]:
    """Tensors of these nodes that are read outside of them or are outputs of the graph."""
    inside = set(nodes)
    names = []
    for index in sorted(inside):
        for name in links.nodes[index].output:
            if name and (name in links.outputs or any(reader not in inside for reader in links.readers.get(name, ()))):
                names.append(name)
    return names
