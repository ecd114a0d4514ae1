"""The rows of the latency table: sites of the optimised dense graph, and a small model of any of them at any widths.

How copies are strung together, so that (t(many) - t(few)) / (many - few) is the site as it runs in the network:

    chain      output shape = input shape: copy after copy
    sum        the site ends in a convolution: all copies read the same input, and each adds the result of the one
               before to its own convolution, which runtimes fuse: y' = act(conv(x) + y)
    beside     the result is in the plain layout: copies side by side
    single     none of these: one copy with its surroundings, minus the surroundings (0, 1)

Where copies read the same input, every reader must have weights of its own: equal nodes would be run once for all.

Runtimes keep a stream of convolutions in a blocked layout. A border tensor that arrives in it (made by convolutions and
what keeps their layout) comes out of a light 1x1 convolution here too, and one that leaves in it ends in a global pool,
so that no copy pays for a change of layout that the network does not make, and each pays for those it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx

from pipeline.graph.inner import reads
from pipeline.graph.probe import FLOATING, DimShape, Forms, Resolve, find_forms
from pipeline.graph.sites import ACTIVATIONS, HEAVY, Links, Piece, find_pieces, link, result_of
from pipeline.graph.template import Builder, Template, Widths, cut_template, independent, place
from pipeline.graph.verify import true_inputs
from pipeline.nouns import Dim, Site, Topology

Mode = Literal["chain", "sum", "beside", "single"]
KEEPS_LAYOUT = frozenset({*ACTIVATIONS, "BatchNormalization", "Cast", "MaxPool", "AveragePool"})
JOINS = frozenset({"Add", "Sum", "Mul", "Concat"})
FREE = frozenset({"Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Dropout"})


@dataclass(frozen=True)
class Plan:
    """A template and how its copies are strung together. spot: the node after which the sum goes in."""

    template: Template
    mode: Mode
    spot: int | None = None

    @property
    def copies(self) -> tuple[int, int]:
        """Numbers of copies whose times are subtracted."""
        if not self.template.nodes or self.mode == "single":
            return (0, 1)
        heavies = sum(node.op_type in HEAVY for node in self.template.nodes)
        return (1, 3) if heavies > 1 else (2, 6)


class Rows:
    """`nouns.RowBuilder` over an optimised dense graph."""

    def __init__(self, model: onnx.ModelProto, topology: Topology, resolve: Resolve) -> None:
        """resolve: turns a plan into a cut of this topology. Raises DeployError where shapes cannot be found."""
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 17)
        self._links = link(model.graph, [info.name for info in true_inputs(model)])
        self._forms: Forms = find_forms(model, topology, resolve)
        self._carried: dict[str, bool] = {}
        self._plans: dict[tuple[str, bool], Plan] = {}
        self._sites: list[Site] = []
        for piece in find_pieces(self._links, topology):
            self._add(piece)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the dense graph, in execution order; together they hold each node once."""
        return tuple(self._sites)

    def copies(self, site: Site, *, dropped: bool = False) -> tuple[int, int]:
        """(few, many) copies whose difference in time measures the site."""
        return self._plans[site.id, dropped].copies

    def row(self, site: Site, widths: Widths, *, copies: int = 1, dropped: bool = False) -> bytes:
        """A runnable model of `copies` of the site. Raises ValueError for widths or copies that it cannot have."""
        plan = self._plans[site.id, dropped]
        _check(site, plan, widths, copies)
        if not plan.template.nodes:
            return self.empty()
        builder = Builder()
        _Row(self, builder, plan, widths).build(copies)
        return builder.model(self._opset) if builder.nodes else self.empty()

    def terms(self, site: Site, widths: Widths, *, dropped: bool = False) -> dict[str, float]:
        """MACs by kind of kernel (`conv3x3`, `conv1x1s2`, `depthwise3x3`, `gemm`, …) and `elements` written."""
        return work(self._plans[site.id, dropped].template, widths)

    def empty(self) -> bytes:
        """The smallest model that runs: what any measured time holds besides the network."""
        builder = Builder()
        builder.output(builder.add("Relu", [builder.input((1, 1))]), (1, 1))
        return builder.model(self._opset)

    def carried(self, name: str) -> bool:
        """Whether a tensor comes in the layout of convolutions: made by one, or by what keeps the layout of such."""
        if name not in self._carried:
            self._carried[name] = self._find_carried(name)
        return self._carried[name]

    def _find_carried(self, name: str) -> bool:
        index = self._links.makers.get(name)
        if index is None or len(self._forms.dense[name]) != 4 or self._forms.types.get(name) not in FLOATING:
            return False
        node = self._links.nodes[index]
        if node.op_type == "Conv":
            return True
        if node.op_type in KEEPS_LAYOUT:
            return self.carried(node.input[0])
        if node.op_type in JOINS:
            same = node.op_type == "Concat" or len({self._forms.dense[i] for i in node.input}) == 1
            return same and all(self.carried(i) for i in node.input)
        return False

    def _add(self, piece: Piece) -> None:
        nodes = frozenset(piece.nodes)
        outputs = result_of(self._links, sorted(nodes))
        shapes = self._shapes(nodes, outputs)
        dims = independent(shapes)
        template = cut_template(self._links, nodes, outputs, self._forms, dims, self._initializers)
        plan = self._plan(template)
        id, kind = self._name(piece, template)
        protos = tuple(self._links.nodes[index].name for index in sorted(nodes))
        site = Site(id, kind, dims, protos, piece.block, plan.mode != "single")
        self._plans[id, False] = plan
        if piece.block is not None and piece.add is not None:
            self._plans[id, True] = self._plan(self._without_branch(piece, template, outputs, dims))
        self._sites.append(site)

    def _shapes(self, nodes: frozenset[int], outputs: Sequence[str]) -> list[DimShape]:
        """Shapes in a site: border inputs first, then what the nodes make, then initializers."""
        makes = [name for index in sorted(nodes) for name in self._links.nodes[index].output if name]
        used = [name for index in sorted(nodes) for name in reads(self._links.nodes[index])]
        borders = [name for name in used if self._links.moves(name) and name not in makes]
        names = dict.fromkeys([*borders, *makes, *outputs, *used])
        return [self._forms.dims[name] for name in names if name in self._forms.dims]

    def _name(self, piece: Piece, template: Template) -> tuple[str, str]:
        heavy = [node for node in template.nodes if node.op_type in HEAVY]
        if piece.closed:
            kind = "block" if template.inputs and self._same_shape(template) else "transition"
        else:
            kind = kernel(template, heavy[0])[0] if heavy else "other"
        first = heavy[0] if heavy else template.nodes[0]
        stem = next((name for name in first.input if name in template.weights), first.name).removesuffix(".weight")
        base = piece.block or stem.strip("/")
        names = itertools.chain([base], (f"{base}#{number}" for number in itertools.count(2)))
        return next(name for name in names if (name, False) not in self._plans), kind

    def _same_shape(self, template: Template) -> bool:
        one = len(template.inputs) == 1 and len(template.outputs) == 1
        return one and self._forms.dims[template.inputs[0]] == self._forms.dims[template.outputs[0]]

    def _without_branch(
        self, piece: Piece, template: Template, outputs: Sequence[str], dims: Sequence[Dim]
    ) -> Template:
        """The site as it is when its branch is removed; without nodes where nothing is left."""
        assert piece.add is not None
        add = self._links.nodes[piece.add]
        skip = add.input[piece.skip]
        nodes = list(self._links.nodes)
        for reader in self._links.readers.get(add.output[0], ()):
            node = nodes[reader] = onnx.NodeProto.FromString(nodes[reader].SerializeToString())
            for index, name in enumerate(node.input):
                if name == add.output[0]:
                    node.input[index] = skip
        links = replace(self._links, nodes=tuple(nodes))
        results = [skip if name == add.output[0] else name for name in outputs]
        if len(results) == 1 and _is_second_relu(links, results[0], skip):
            results = [skip]
        return cut_template(links, frozenset(piece.nodes) - {piece.add}, results, self._forms, dims, self._initializers)

    def _plan(self, template: Template) -> Plan:
        if not template.nodes:
            return Plan(template, "single")
        if self._same_shape(template):
            return Plan(template, "chain")
        if not _weighted(template) or len(template.outputs) != 1:
            return Plan(template, "single")
        spot = _last_convolution(template, template.outputs[0])
        if spot is not None:
            return Plan(template, "sum", spot)
        return Plan(template, "single" if self.carried(template.outputs[0]) else "beside")


def _weighted(template: Template) -> bool:
    """Whether every reader of a border input, behind a cast or not, has weights of its own."""
    borders = set(template.inputs)
    for node in template.nodes:
        if node.op_type == "Cast" and node.input[0] in borders:
            borders.add(node.output[0])
        elif borders & set(reads(node)) and not any(name in template.weights for name in node.input):
            return False
    return True


def _check(site: Site, plan: Plan, widths: Widths, copies: int) -> None:
    if len(widths) != len(site.dims):
        raise ValueError(f"site '{site.id}' has {len(site.dims)} channel counts, {len(widths)} were given")
    if copies < 0 or (plan.mode == "single" and copies > 1 and plan.template.nodes):
        raise ValueError(f"site '{site.id}' cannot be measured with {copies} copies")
    small = [name for name in plan.template.axes if min(plan.template.shape(name, widths), default=1) < 1]
    if small:
        raise ValueError(f"site '{site.id}' has no channels left in '{small[0]}' at widths {list(widths)}")


def _is_second_relu(links: Links, result: str, skip: str) -> bool:
    """Whether `result` is the Relu of a tensor that is a Relu's result already: narrowing applies it once."""
    last, before = links.makers.get(result), links.makers.get(skip)
    if last is None or before is None or last == before:
        return False
    both = links.nodes[last].op_type == links.nodes[before].op_type == "Relu"
    return both and bool(links.nodes[last].input[0] == skip)


def _last_convolution(template: Template, result: str) -> int | None:
    """Position of a convolution whose result reaches the output in the output's shape, through activations and sums."""
    makers = {name: position for position, node in enumerate(template.nodes) for name in node.output}
    if result not in makers or template.axes[result] == ():
        return None
    node = template.nodes[makers[result]]
    if node.op_type == "Conv":
        return makers[result]
    if node.op_type in ACTIVATIONS or node.op_type == "BatchNormalization":
        return _last_convolution(template, node.input[0])
    if node.op_type in ("Add", "Mul"):
        full = [name for name in node.input if name in makers and template.axes[name] == template.axes[result]]
        spots = [_last_convolution(template, name) for name in reversed(full)]
        return next((spot for spot in spots if spot is not None), None)
    return None


class _Row:
    """One row while it is built."""

    def __init__(self, rows: Rows, builder: Builder, plan: Plan, widths: Widths) -> None:
        self.rows, self.builder, self.plan, self.widths = rows, builder, plan, widths
        self.template = plan.template

    def build(self, copies: int) -> None:
        """Stems, copies, ends."""
        borders = {name: self._border(name) for name in self.template.inputs}
        if self.plan.mode == "single":
            for name, tensor in borders.items():
                if self.rows.carried(name):
                    self._end(tensor, name)
        if self.plan.mode == "chain":
            self._chain(borders, copies)
        elif self.plan.mode == "sum":
            self._sum(borders, copies)
        else:
            for _ in range(copies):
                names = place(self.builder, self.template, self.widths, borders)
                for name in self.template.outputs:
                    self._end(names[name], name)

    def _chain(self, borders: dict[str, str], copies: int) -> None:
        (name,), (result,) = self.template.inputs, self.template.outputs
        tensor = borders[name]
        for _ in range(copies):
            tensor = place(self.builder, self.template, self.widths, {name: tensor})[result]
        if self.builder.nodes:
            self._end(tensor, result)

    def _sum(self, borders: dict[str, str], copies: int) -> None:
        assert self.plan.spot is not None
        (result,) = self.template.outputs
        tensor = self._stem(result)
        for _ in range(copies):
            tensor = place(self.builder, self.template, self.widths, borders, (self.plan.spot, tensor))[result]
        self._end(tensor, result)

    def _border(self, name: str) -> str:
        if self.rows.carried(name):
            return self._stem(name)
        return self.builder.input(self.template.shape(name, self.widths), self.template.types[name])

    def _stem(self, name: str) -> str:
        """A tensor of this shape out of a light convolution, or an input where it has no channels and pixels."""
        shape, kind = self.template.shape(name, self.widths), self.template.types[name]
        if len(shape) != 4:
            return self.builder.input(shape, kind)
        source = self.builder.input((shape[0], 1, *shape[2:]), kind)
        weight = self.builder.random((shape[1], 1, 1, 1), 1.0, kind=kind)
        return self.builder.add("Conv", [source, weight], kernel_shape=[1, 1])

    def _end(self, tensor: str, name: str) -> None:
        """Give out a tensor, pooled where it leaves the site in the layout of convolutions."""
        shape, kind = self.template.shape(name, self.widths), self.template.types[name]
        if self.rows.carried(name):
            self.builder.output(self.builder.add("GlobalMaxPool", [tensor]), (shape[0], shape[1], 1, 1), kind)
        else:
            self.builder.output(tensor, shape, kind)


# --- work --------------------------------------------------------------------------------------------------------


def kernel(template: Template, node: onnx.NodeProto) -> tuple[str, bool]:
    """Name of a heavy node's kind of kernel, and whether it is a convolution."""
    if node.op_type not in ("Conv", "ConvTranspose"):
        return node.op_type.lower(), False
    dense = template.dense[node.input[1]]
    group = next((int(a.i) for a in node.attribute if a.name == "group"), 1)
    strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [1])
    head = "deconv" if node.op_type == "ConvTranspose" else "conv"
    if group > 1:
        head = "depthwise" if dense[1] == 1 else "grouped"
    tail = f"s{max(strides)}" if max(strides) > 1 else ""
    return f"{head}{'x'.join(str(n) for n in dense[2:])}{tail}", True


def work(template: Template, widths: Widths) -> dict[str, float]:
    """Regressors of a site: multiply-accumulates by kind, elements that its operators write (activations are fused)."""
    found: dict[str, float] = {"elements": 0.0}
    for node in template.nodes:
        written = sum(_count(template, name, widths) for name in node.output if name)
        if node.op_type not in FREE and node.op_type not in ACTIVATIONS:
            found["elements"] += written
        if node.op_type in HEAVY and node.input[1] in template.axes:
            name, spatial = kernel(template, node)
            found[name] = found.get(name, 0.0) + _macs(template, node, widths, spatial)
    return found


def _count(template: Template, name: str, widths: Widths) -> float:
    return float(np.prod(template.shape(name, widths), dtype=np.int64))


def _macs(template: Template, node: onnx.NodeProto, widths: Widths, spatial: bool) -> float:
    left, right = template.shape(node.input[0], widths), template.shape(node.input[1], widths)
    if spatial:
        pixels = _count(template, node.output[0] if node.op_type == "Conv" else node.input[0], widths)
        return pixels * float(np.prod(right[1:], dtype=np.int64))
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    inner = left[0] if transposed else left[-1]
    return _count(template, node.output[0], widths) * inner
