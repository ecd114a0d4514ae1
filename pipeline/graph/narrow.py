"""Make the ONNX of a pruned network out of the dense one by slicing initializers: milliseconds, no export.

    parameters      W[kept, …] along every axis that the cut names; a bias that the network has not follows its weight
    constants       amounts of Pad, sizes of Split, target of Reshape, indices of Gather, range of Slice, by node scope
    convolutions    groups follow the weight: a depthwise one keeps its outputs per group, others the number of groups
    removed blocks  the addition `/<block.add>/Add` is replaced by its skip operand; what nothing reads any more goes

The order is: export the dense network once, optimize it once, narrow the result for every candidate. Every name of the
cut has to be found in the model, or noted there as absorbed by another parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.graph.absorbed import absorbed
from pipeline.graph.inner import forget_shapes, graphs, reads
from pipeline.graph.passes.shortcut_conv import SELECTION, selection
from pipeline.nouns import Block, ConstantValue, Cut
from profiles.errors import DeployError

Kept = NDArray[np.int64]
AGAIN = "export and optimize the dense network again."
LAYERS = ("Conv", "ConvTranspose", "Gemm")
LAYER_NORM = "LayerNormalization"


def narrow_file(dense: Path, cut: Cut, out: Path) -> Path:
    """`narrow` from file to file."""
    onnx.save_model(narrow(onnx.load_model(str(dense)), cut), str(out))
    return out


def narrow(model: onnx.ModelProto, cut: Cut) -> onnx.ModelProto:
    """The model with the cut applied, without stored intermediate shapes. The model that comes in is left as it is.

    A float parameter may be an initializer or, in a model without weights, an input of the graph with its shape.
    Raises DeployError for a name of the cut that the model does not hold.
    """
    slices = _with_biases(model, cut)
    result = shell(model)
    graph = result.graph
    forget_shapes(graph)
    _slice_parameters(model, graph, slices)
    found = set(slices) & ({t.name for t in graph.initializer} | {i.name for i in graph.input})
    lost = set(cut.params) - found - absorbed(model) - {name for block in cut.dropped for name in block.params}
    lost = {name for name in lost if not name.endswith("num_batches_tracked")}
    if lost:
        raise DeployError(f"the parameter '{min(lost)}' is not in the exported graph.", AGAIN)
    _drop_blocks(graph, cut.dropped)
    for node, (kind, axis, value) in cut.constants.items():
        _rewrite_constant(graph, node, kind, axis, value, {name for block in cut.dropped for name in block.nodes})
    _remove_dead(graph)
    _resize_shortcuts(graph)
    _fix_groups(graph, model)
    _reopen(graph)
    return result


def _with_biases(model: onnx.ModelProto, cut: Cut) -> dict[str, Mapping[int, Kept]]:
    """The cut's parameters, and biases that the network has not: they follow the weight beside them.

    fold-batchnorm makes such ones of a layer, whose axis 0 is the weight's output axis, and the export zeros for a
    LayerNorm that has no bias, of the same axes as its weight.
    """
    slices: dict[str, Mapping[int, Kept]] = dict(cut.params)
    shapes: dict[str, list[int]] = {}
    for node in model.graph.node:
        known = node.op_type in (*LAYERS, LAYER_NORM)
        if not known or len(node.input) < 3 or not node.input[2] or node.input[2] in slices:
            continue
        axes = cut.params.get(node.input[1])
        if axes and node.op_type == LAYER_NORM:
            slices[node.input[2]] = axes
        elif axes:
            shapes = shapes or _shapes(model.graph)
            kept = _outputs_kept(node, axes, shapes[node.input[1]])
            if kept is not None:
                slices[node.input[2]] = {0: kept}
    return slices


def _outputs_kept(node: onnx.NodeProto, axes: Mapping[int, Kept], shape: list[int]) -> Kept | None:
    """Output positions that stay, read off the cut of a layer's weight."""
    if node.op_type == "Gemm":
        return axes.get(0 if _attribute(node, "transB", 0) else 1)
    group = _attribute(node, "group", 1)
    if node.op_type == "Conv":
        return axes.get(0)
    if group > 1 and group == shape[0]:  # depthwise: each input makes shape[1] outputs in a row
        return (axes[0][:, None] * shape[1] + np.arange(shape[1])).ravel() if 0 in axes else None
    if 1 not in axes:
        return None
    return np.concatenate([axes[1] + shape[1] * index for index in range(group)])


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Shapes of initializers and inputs."""
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.input}
    return shapes | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def shell(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without initializers, and without the shapes of what lies between inputs and outputs."""
    result = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    result.functions.extend(model.functions)
    graph = result.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    return result


def _slice_parameters(model: onnx.ModelProto, graph: onnx.GraphProto, slices: Mapping[str, Mapping[int, Kept]]) -> None:
    for tensor in model.graph.initializer:
        axes = slices.get(tensor.name)
        if not axes:
            graph.initializer.append(tensor)
            continue
        array = numpy_helper.to_array(tensor)
        for axis, kept in sorted(axes.items(), key=lambda item: len(item[1]) / array.shape[item[0]]):
            array = array.take(kept, axis=axis)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    for info in graph.input:
        for axis, kept in slices.get(info.name, {}).items():
            info.type.tensor_type.shape.dim[axis].dim_value = len(kept)


# --- removed blocks ------------------------------------------------------------------------------------------------


class _Wires:
    """Who makes and who reads each tensor of a graph, kept up to date while readers are moved."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.look()

    def look(self) -> None:
        """Find everything."""
        graph = self.graph
        self.results = {info.name for info in graph.output}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in reads(node):
                self.readers.setdefault(name, []).append(node)

    def redirect(self, old: str, new: str) -> None:
        """As `_redirect`, by the readers alone; where an output of the graph is renamed, all is looked at again."""
        if old in self.results:
            _redirect(self.graph, old, new)
            self.look()
            return
        moved = self.readers.pop(old, [])
        for node in moved:
            _rename_in(node, old, new, outputs=False)
        self.readers.setdefault(new, []).extend(moved)


def _drop_blocks(graph: onnx.GraphProto, blocks: Sequence[Block]) -> None:
    """Let the readers of each addition read its skip operand; an activation applied twice in a row is applied once."""
    if not blocks:
        return
    wires = _Wires(graph)
    adds: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type == "Add":
            adds.setdefault(node.name[: node.name.find("/", 1) + 1], node)
    for block in blocks:
        add = adds.get(f"/{block.add}/")
        if add is None:
            raise DeployError(f"the addition '{block.add}' of block '{block.id}' is not in the exported graph.", AGAIN)
        skip = add.input[block.skip]
        wires.redirect(add.output[0], skip)
        producer = wires.makers.get(skip)
        if producer is None or producer.op_type != "Relu":
            continue
        for reader in wires.readers.get(skip, []):  # grows while it is gone through
            if reader.op_type == "Relu" and reader.input[0] == skip:
                wires.redirect(reader.output[0], skip)


def _redirect(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Read `new` wherever `old` was read. An output of the graph keeps its name: then what made `new` makes it."""
    results = {info.name for info in graph.output}
    made = {name for node in graph.node for name in node.output}
    if old not in results:
        _rename(graph, old, new, outputs=False)
    elif new in made and new not in results:
        _rename(graph, old, f"{old}/dropped", outputs=True)
        _rename(graph, new, old, outputs=True)
        _rename(graph, f"{old}/dropped", old, outputs=False)
    else:
        _rename(graph, old, f"{old}/dropped", outputs=True)
        graph.node.append(onnx.helper.make_node("Identity", [new], [old], name=f"/{old}/Identity"))


def _rename(graph: onnx.GraphProto, old: str, new: str, *, outputs: bool) -> None:
    for node in graph.node:
        _rename_in(node, old, new, outputs=outputs)


def _rename_in(node: onnx.NodeProto, old: str, new: str, *, outputs: bool) -> None:
    for inner in graphs(node):
        _rename(inner, old, new, outputs=False)
    for names in (node.input, node.output) if outputs else (node.input,):
        for index, name in enumerate(names):
            if name == old:
                names[index] = new


def _remove_dead(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on."""
    needed = {info.name for info in graph.output}
    dead = []
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if needed.isdisjoint(node.output):
            dead.append(index)
        else:
            needed.update(reads(node))
    for index in dead:
        del graph.node[index]
    for index in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]


# --- constants ---------------------------------------------------------------------------------------------------


def _rewrite_constant(
    graph: onnx.GraphProto, scope: str, kind: str, axis: int, value: ConstantValue, gone: set[str]
) -> None:
    ops, rewrite = REWRITES[kind]
    nodes = [node for node in graph.node if node.name.startswith(f"/{scope}/") and node.op_type in ops]
    if not nodes and scope not in gone:
        raise DeployError(f"the operation '{scope}' ({kind}) is not in the exported graph.", AGAIN)
    for node in nodes:
        rewrite(graph, node, axis, value)


def _pad(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int, value: ConstantValue) -> None:
    if not any(value) and _only_pads_channels(graph, node, axis):
        _redirect(graph, node.output[0], node.input[0])
        return
    if node.op_type == "Conv":
        _select(graph, node, value)
        return
    pads = _integers(graph, node, 1)
    axis %= len(pads) // 2
    pads[axis], pads[axis + len(pads) // 2] = value
    _set(graph, node, 1, "pads", pads)


def _only_pads_channels(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int) -> bool:
    """Whether the node does nothing once it adds no channels."""
    if node.op_type == "Conv":
        strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [1])
        return max(strides) == 1
    pads = _integers(graph, node, 1)
    rank = len(pads) // 2
    return not any(count for index, count in enumerate(pads) if index % rank != axis % rank)


def _select(graph: onnx.GraphProto, node: onnx.NodeProto, value: ConstantValue) -> None:
    """The selection weight of shortcut-conv for the channels that its input now has."""
    name = f"{node.name.rsplit('/', 1)[0]}/{SELECTION}"
    stored = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    if stored is None:
        raise DeployError(f"the convolution '{node.name}' has no selection weight.", AGAIN)
    inside = _channels(graph, node.input[0])
    if list(stored.dims[:2]) != [value[0] + inside + value[1], inside]:
        weight = selection(value[0], inside, value[1]).astype(numpy_helper.to_array(stored).dtype)
        stored.CopyFrom(numpy_helper.from_array(weight, name))


def _resize_shortcuts(graph: onnx.GraphProto) -> None:
    """Selection weights of shortcuts that add no channels: no constant of the cut counts for them."""
    square = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] == tensor.dims[1]}
    for node in graph.node:
        name = f"{node.name.rsplit('/', 1)[0]}/{SELECTION}"
        if node.op_type == "Conv" and node.input[1] == name and name in square:
            _select(graph, node, (0, 0))


def _split(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int, value: ConstantValue) -> None:
    """Sizes are an attribute before opset 13, an input since then, and may be a number of equal parts since 18."""
    for attribute in node.attribute:
        if attribute.name == "split":
            attribute.ints[:] = value
            return
        if attribute.name == "num_outputs":
            node.attribute.remove(attribute)
            break
    _set(graph, node, 1, "split", value)


def _reshape(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int, value: ConstantValue) -> None:
    _set(graph, node, 1, "shape", value)


def _gather(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int, value: ConstantValue) -> None:
    _set(graph, node, 1, "indices", value)


def _slice(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int, value: ConstantValue) -> None:
    starts, ends = _integers(graph, node, 1), _integers(graph, node, 2)
    axes = _integers(graph, node, 3) if len(node.input) > 3 and node.input[3] else list(range(len(starts)))
    if axis not in axes:
        return
    at = axes.index(axis)
    starts[at], ends[at] = value
    _set(graph, node, 1, "starts", starts)
    _set(graph, node, 2, "ends", ends)


Rewrite = Callable[[onnx.GraphProto, onnx.NodeProto, int, ConstantValue], None]

REWRITES: Mapping[str, tuple[tuple[str, ...], Rewrite]] = {
    "pad": (("Pad", "Conv"), _pad),
    "split": (("Split",), _split),
    "reshape": (("Reshape",), _reshape),
    "gather": (("Gather",), _gather),
    "slice": (("Slice",), _slice),
}


def _integers(graph: onnx.GraphProto, node: onnx.NodeProto, index: int) -> list[int]:
    name = node.input[index]
    for tensor in graph.initializer:
        if tensor.name == name:
            return [int(n) for n in numpy_helper.to_array(tensor).ravel()]
    raise DeployError(f"input {index} of '{node.name}' is not a constant.", "run fold-constants before narrowing.")


def _set(graph: onnx.GraphProto, node: onnx.NodeProto, index: int, label: str, value: Iterable[int]) -> None:
    """Give one input of a node a constant of its own."""
    name = f"{node.name}/{label}"
    array = np.asarray(list(value), dtype=np.int64)
    graph.initializer.append(numpy_helper.from_array(array, name))
    while len(node.input) <= index:
        node.input.append("")
    node.input[index] = name


# --- channel counts ------------------------------------------------------------------------------------------------

KEEPS_CHANNELS = frozenset({"Relu", "Clip", "Sigmoid", "LeakyRelu", "HardSwish", "Cast", "MaxPool", "AveragePool"})


def _channels(graph: onnx.GraphProto, name: str) -> int:
    """Size of axis 1 of a tensor: from the weight that made it where that is near, else by shape inference."""
    made = {out: node for node in graph.node for out in node.output}
    weights = _shapes(graph)
    tensor = name
    while tensor in made:
        node = made[tensor]
        if node.op_type == "Conv" and node.input[1] in weights:
            return int(weights[node.input[1]][0])
        if node.op_type == "Add":
            branches = [operand for operand in node.input if operand in made]
            near = next((o for o in branches if made[o].op_type == "Conv"), branches[0] if len(branches) == 2 else None)
            if near is None:
                break
            tensor = near
        elif node.op_type in KEEPS_CHANNELS:
            tensor = node.input[0]
        else:
            break
    return _inferred_channels(graph, name)


def _inferred_channels(graph: onnx.GraphProto, name: str) -> int:
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for info in (*inferred.graph.value_info, *inferred.graph.input):
        if info.name == name and len(info.type.tensor_type.shape.dim) > 1:
            return int(info.type.tensor_type.shape.dim[1].dim_value)
    hint = "take shortcut-conv out of graph.passes."
    raise DeployError(f"the number of channels of '{name}' cannot be inferred.", hint)


def _reopen(graph: onnx.GraphProto) -> None:
    """Folded shapes of tensors that have no constant of their own: behind group norms, and of resized maps.

    A group norm is written as reshape, instance norm, reshape: the second takes the channels that there are. A resize
    to a size names its channels too.
    """
    if not {"InstanceNormalization", "Resize"} & {node.op_type for node in graph.node}:
        return
    makers = {out: node for node in graph.node for out in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Reshape" and node.input[1] in stored:
            source = makers.get(node.input[0])
            target = _integers(graph, node, 1)
            if source is not None and source.op_type == "InstanceNormalization" and min(target) > 0 and len(target) > 2:
                _set(graph, node, 1, "shape", [target[0], -1, *target[2:]])
        elif node.op_type == "Resize" and len(node.input) > 3 and node.input[3] in stored:
            sizes, channels = _integers(graph, node, 3), _channels(graph, node.input[0])
            if sizes[1] != channels:
                _set(graph, node, 3, "sizes", [sizes[0], channels, *sizes[2:]])


def _fix_groups(graph: onnx.GraphProto, dense: onnx.ModelProto) -> None:
    """Set `group` of convolutions whose weight changed."""
    shapes, before = _shapes(graph), _shapes(dense.graph)
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in shapes:
            continue
        old, new = before.get(node.input[1]), shapes[node.input[1]]
        group = next((a for a in node.attribute if a.name == "group"), None)
        if group is None or group.i == 1 or old is None or old == new:
            continue
        if old[1] != 1 and not (node.op_type == "ConvTranspose" and group.i == old[0]):
            continue
        group.i = new[0] * group.i // old[0]
