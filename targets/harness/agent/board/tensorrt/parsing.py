"""One sentence for what the ONNX parser of TensorRT refuses: the node by its name, why, and what would mend it.

The parser's error objects tell the node's number since 8.0 and its name and operator since 9; before, both are read
from the file. What mends it is a step of this project where there is one: a graph pass, a key of the profile, or how
the network was quantised.
"""

import re
from typing import Any, List, NamedTuple, Optional, Sequence

from .errors import BoardError
from .onnxfile import OnnxFile

Complaint = NamedTuple("Complaint", [("node", str), ("op", str), ("text", str)])
"""node: in words, "" where the parser names none; op: its operator; text: what the parser says."""

PASS = "the pass %s removes it: --set 'graph.passes=[..., \"%s\"]'."
PASSES = {
    "Dropout": "drop-dropout", "Identity": "drop-identity", "BatchNormalization": "fold-batchnorm",
    "Shape": "fold-constants", "Size": "fold-constants", "Range": "fold-constants", "NonZero": "fold-constants",
    "ConstantOfShape": "fold-constants",
}  # fmt: skip
"""Operators that a pass of this project takes out of a graph: those of shapes where the shapes are known."""
SYMMETRIC = (
    "quantise it again with zero points of 0: symmetric signed 8-bit activations and weights "
    "(onnxruntime.quantization: ActivationSymmetric and WeightSymmetric, QuantType.QInt8, QuantFormat.QDQ)."
)
FORMAT = "quantise it again with Q/DQ pairs instead of integer operators (onnxruntime.quantization: QuantFormat.QDQ)."
INTEGER = ("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize")
"""How the operators begin that quantised networks in the other format are made of."""
MENDS = (
    (r"zero.?p(?:oin)?t|symmetric", SYMMETRIC),
    (r"only int8|UINT8|uint8", SYMMETRIC),
    (r"opset", "write the network in an older opset: --set graph.opset=%d."),
    (r"dynamic|free size|profile", "export the network with fixed sizes; only the batch may be free."),
    (r"float64|double|kDOUBLE|DOUBLE", "export the network in float32: this type runs nowhere on the GPU here."),
)
"""What the parser says -> what mends it, the first that fits."""
ELSEWHERE = 'leave this operator out of the network, or run it elsewhere: runtime = "ort".'
OPSETS = (17, 13, 11)


def refusal(title: str, model: OnnxFile, complaints: Sequence[Complaint]) -> BoardError:
    """The error for a network that the parser does not take. title: name and version of the library."""
    if not complaints:
        return BoardError("model", "%s does not take '%s' and does not say why" % (title, model.path), ELSEWHERE)
    first = complaints[0]
    where = "the node " + first.node if first.node else "'%s'" % model.path
    more = " (and %d more)" % (len(complaints) - 1) if len(complaints) > 1 else ""
    text = "%s does not take %s: %s%s" % (title, where, first.text, more)
    return BoardError("model", text, mend(first, model.opset), node=first.node, op=first.op)


def mend(complaint: Complaint, opset: int) -> str:
    """The next step for a complaint."""
    if complaint.op.startswith(INTEGER):
        return FORMAT
    quantising = complaint.op in ("QuantizeLinear", "DequantizeLinear")
    for pattern, hint in MENDS:
        if re.search(pattern, complaint.text, re.IGNORECASE) and (hint is not SYMMETRIC or quantising):
            return hint % next((known for known in OPSETS if known < opset), 11) if "%d" in hint else hint
    name = PASSES.get(complaint.op)
    return PASS % (name, name) if name else ELSEWHERE


def complaints_of(parser: Any, model: OnnxFile) -> List[Complaint]:
    """What a parser object has to complain of, errors that name a node first."""
    found = [_complaint(parser.get_error(index), model) for index in range(parser.num_errors)]
    return sorted(found, key=lambda each: not each.node)


def _complaint(error: Any, model: OnnxFile) -> Complaint:
    number = int(error.node())
    name = str(error.node_name() or "") if hasattr(error, "node_name") else ""
    op = str(error.node_operator() or "") if hasattr(error, "node_operator") else ""
    known = model.nodes[number] if 0 <= number < len(model.nodes) else None
    op = op or (known.op if known is not None else "")
    label = "'%s' (%s)" % (name, op) if name else model.label(number)
    return Complaint(label, op, sentence(str(error.desc()), op))


def complaints_in(log: Sequence[str], model: OnnxFile) -> List[Complaint]:
    """What a log of trtexec has to complain of: the number or name of a node, then lines that say why."""
    number: Optional[int] = None
    named = ""
    found: List[Complaint] = []
    for line in log:
        begun = re.search(r"(?:parsing node number|In node) (-?\d+)", line)
        if begun:
            number = int(begun.group(1))
        called = re.search(r"with name: (.+?) and operator: (\w+)", line) or re.search(r"^.*?\bname: \"(.+?)\"", line)
        named = called.group(1) if called else named
        why = re.search(
            r"(?:Assertion failed: |No importer registered for op: |UNSUPPORTED_\w+: |INVALID_\w+: ).*", line
        )
        if why and number is not None:
            op = model.nodes[number].op if 0 <= number < len(model.nodes) else ""
            label = model.label(number) or ("'%s'" % named if named else "")
            found.append(Complaint(label, op, sentence(why.group(0), op)))
            number, named = None, ""
    return found


def sentence(text: str, op: str) -> str:
    """The first thing that the parser says, as part of a sentence: no assertion's source, no codes, no full stop."""
    line = " ".join(text.split())
    missing = re.search(r"No importer registered for op: (\w+)|could not find plugin:? (\w+)|Plugin not found", line)
    if missing or re.match(r"(?:\[\d+\] )?(?:Assertion failed: )?false$", line):
        named = missing and (missing.group(1) or missing.group(2))
        return "it has no operator %s" % (named or op)
    line = re.sub(r"^(?:\[\w+\] |\w*UNSUPPORTED_\w+: |INVALID_\w+: )+", "", line)
    asserted = re.match(r"Assertion failed: (.*?)(?:: (.+))?$", line)
    if asserted:
        line = asserted.group(2) or asserted.group(1)
    first = re.split(r"(?<=[a-z)])\. (?=[A-Z])", line, maxsplit=1)[0]
    return first.strip().rstrip(".!").strip() or "without a reason"
