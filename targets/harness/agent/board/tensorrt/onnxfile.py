"""Reads of an ONNX file what the builder must know, with nothing but the standard library; weights are not read.

A board has TensorRT and no `onnx` package, and TensorRT tells of a node that it refuses little more than its number.
The file is a protobuf message: a sequence of (number << 3 | kind) and a value, where kind 0 is a varint, 1 and 5 are
8 and 4 bytes, and 2 is a length with so many bytes (protobuf.dev, "Encoding"; field numbers: onnx.proto3). The file is
mapped, so a large one costs no memory, and every length is checked: a file that lies about one is no ONNX file.
"""

import mmap
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from ..files import sha256
from .errors import BoardError

ELEMENTS = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8", 18: "float8", 19: "float8",
    20: "float8", 21: "uint4", 22: "int4", 23: "float4",
}  # fmt: skip
"""TensorProto.DataType -> a name; the four kinds of float8 count as one."""
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")

Node = NamedTuple("Node", [("name", str), ("op", str), ("outputs", Tuple[str, ...])])
Input = NamedTuple("Input", [("name", str), ("element", str), ("shape", Tuple[Optional[int], ...])])
"""An input of the network. shape: None for a free size."""
Span = Tuple[int, int]


class OnnxFile(NamedTuple("Facts", [
    ("path", str), ("opset", int), ("nodes", List[Node]), ("inputs", List[Input]), ("elements", Set[str]),
    ("external", List[str]),
])):  # fmt: skip
    """What was read. inputs: without initializers; elements: element types of inputs, outputs, weights and casts.

    external: names of the files beside it that hold weights, sorted.
    """

    __slots__ = ()

    @property
    def quantized(self) -> bool:
        """Whether it holds explicit quantisation."""
        return any(node.op in QUANTIZING for node in self.nodes)

    def label(self, number: int) -> str:
        """A node in words, by its number in the file; "" where there is none."""
        if not 0 <= number < len(self.nodes):
            return ""
        node = self.nodes[number]
        named = node.name or (node.outputs[0] if node.outputs else "") or "number %d" % number
        return "'%s' (%s)" % (named, node.op)


def read(path: str) -> OnnxFile:
    """Facts of an ONNX file. Raises BoardError for what is none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise BoardError("model", "'%s' is empty" % path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _model(path, data, (0, size))
    except OSError as error:
        raise BoardError("model", "'%s' cannot be read: %s" % (path, error.strerror)) from None
    except (ValueError, IndexError, RecursionError, UnicodeDecodeError):
        raise BoardError(
            "model", "'%s' is no ONNX file" % path, "export the network again, or check the file."
        ) from None


def digests(path: str) -> Dict[str, str]:
    """SHA-256 of an ONNX file, under "", and of every file with weights of it, by what the file calls them.

    Raises BoardError where it is none or keeps weights outside its folder, OSError where one cannot be read.
    """
    external, own = read(path).external, os.path.realpath(os.path.dirname(path))
    found = {"": sha256(path)}
    for name in external:
        place = os.path.realpath(os.path.join(own, name))
        if not place.startswith(own + os.sep):
            text = "'%s' keeps weights outside its folder, in '%s'" % (path, name)
            raise BoardError("model", text, "export it again.")
        found[name] = sha256(place)
    return found


# --- protobuf ----------------------------------------------------------------------------------------------------


def _varint(data: Any, at: int, end: int) -> Tuple[int, int]:
    """A variable-length number at a place, and the place behind it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")


def _fields(data: Any, span: Span) -> Iterator[Tuple[int, int, Span]]:
    """(number, value, where its bytes lie) of every field; value: of varints, 0 otherwise."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        value, start = 0, at
        if kind == 0:
            value, at = _varint(data, at, end)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, start = _varint(data, at, end)
            at = start + length
        else:
            raise ValueError("a field of kind %d" % kind)
        if at > end or not number:
            raise ValueError("a field beyond its message")
        yield number, value, (start, at)


def _text(data: Any, span: Span) -> str:
    return bytes(data[span[0] : span[1]]).decode("utf-8")


def _parts(data: Any, span: Span, number: int) -> Iterator[Span]:
    """Where the bytes of every field of this number lie."""
    return (where for found, _, where in _fields(data, span) if found == number)


def _number(data: Any, span: Span, number: int) -> int:
    """The last varint of this number, or 0."""
    value = 0
    for found, seen, _ in _fields(data, span):
        value = seen if found == number else value
    return value


# --- ONNX --------------------------------------------------------------------------------------------------------


def _model(path: str, data: Any, span: Span) -> OnnxFile:
    graphs, opset = [], 0
    for number, _, where in _fields(data, span):
        if number == 7:
            graphs.append(where)
        elif number == 8 and not "".join(_text(data, part) for part in _parts(data, where, 1)):
            opset = _number(data, where, 2)
    if len(graphs) != 1 or not opset:
        raise ValueError("no graph or no opset")
    nodes: List[Node] = []
    inputs: List[Input] = []
    elements: Set[int] = set()
    weights: Set[str] = set()
    external: Set[str] = set()
    for function in _parts(data, span, 25):
        for where in _parts(data, function, 7):
            _node(data, where, elements, external)
    for number, _, where in _fields(data, graphs[0]):
        if number == 1:
            nodes.append(_node(data, where, elements, external))
        elif number == 5:
            weights.add(_tensor(data, where, elements, external))
        elif number == 15:
            weights.add(_sparse(data, where, elements, external))
        elif number in (11, 12, 13):
            port = _port(data, where)
            elements.update(kind for kind, name in ELEMENTS.items() if name == port.element)
            inputs += [port] if number == 11 else []
    named = {ELEMENTS[kind] for kind in elements if kind in ELEMENTS}
    fed = [port for port in inputs if port.name not in weights]
    return OnnxFile(path, opset, nodes, fed, named, sorted(external))


def _node(data: Any, span: Span, elements: Set[int], external: Set[str]) -> Node:
    texts: Dict[int, List[str]] = {2: [], 3: [], 4: []}
    for number, _, where in _fields(data, span):
        if number in texts:
            texts[number].append(_text(data, where))
        elif number == 5:
            _attribute(data, where, elements, external)
    return Node("".join(texts[3]), "".join(texts[4]), tuple(texts[2]))


def _attribute(data: Any, span: Span, elements: Set[int], external: Set[str]) -> None:
    """Element types and files that an attribute brings in: of constants, of a Cast's target, of graphs inside."""
    name = "".join(_text(data, part) for part in _parts(data, span, 1))
    if name == "to":
        elements.add(_number(data, span, 3))
    for number, _, where in _fields(data, span):
        if number in (5, 10):
            _tensor(data, where, elements, external)
        elif number in (6, 11):
            _inner(data, where, elements, external)
        elif number in (22, 23):
            _sparse(data, where, elements, external)


def _inner(data: Any, span: Span, elements: Set[int], external: Set[str]) -> None:
    """Element types and files of a graph inside a node, as the branch of an If."""
    for number, _, where in _fields(data, span):
        if number == 1:
            _node(data, where, elements, external)
        elif number == 5:
            _tensor(data, where, elements, external)
        elif number == 15:
            _sparse(data, where, elements, external)


def _sparse(data: Any, span: Span, elements: Set[int], external: Set[str]) -> str:
    """The same of a sparse tensor: its values have its name."""
    names = [_tensor(data, where, elements, external) for where in _parts(data, span, 1)]
    for where in _parts(data, span, 2):
        _tensor(data, where, elements, external)
    return "".join(names)


def _tensor(data: Any, span: Span, elements: Set[int], external: Set[str]) -> str:
    """Name of a tensor; its element type and its file, where it has one, are added."""
    name = ""
    for number, value, where in _fields(data, span):
        if number == 2:
            elements.add(value)
        elif number == 8:
            name = _text(data, where)
        elif number == 13:
            pair = ["".join(_text(data, part) for part in _parts(data, where, key)) for key in (1, 2)]
            if pair[0] == "location":
                external.add(pair[1])
    return name


def _port(data: Any, span: Span) -> Input:
    """A ValueInfoProto: name, and the element type and shape of a tensor."""
    name, element = "", ""
    shape: List[Optional[int]] = []
    for number, _, where in _fields(data, span):
        if number == 1:
            name = _text(data, where)
        elif number == 2:
            for tensor in _parts(data, where, 1):
                element = ELEMENTS.get(_number(data, tensor, 1), "")
                for dims in _parts(data, tensor, 2):
                    shape = [_size(data, dim) for dim in _parts(data, dims, 1)]
    return Input(name, element, tuple(shape))


def _size(data: Any, span: Span) -> Optional[int]:
    for number, value, _ in _fields(data, span):
        if number == 1 and 0 < value < 1 << 62:
            return value
    return None
