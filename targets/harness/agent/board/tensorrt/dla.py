"""What of an engine runs on a DLA core, and what fell back to the GPU.

While it builds, the library says of each part where it runs: `[DlaLayer] {ForeignNode[conv1...relu5]}` for layers that
are one part on the DLA, `[GpuLayer] POOLING: pool` (github.com/NVIDIA-AI-IOT/jetson_dla_tutorial, README.md). Where it
says nothing, the engine's layers tell: a part on the DLA has such a name there too (github.com/NVIDIA/TensorRT, issue
3143), and one that the GPU's own compiler made of several layers has the name and an operator of that compiler.
"""

import re
from typing import List, Sequence, Tuple

from .errors import Table
from .onnxfile import OnnxFile

PLACED = re.compile(r"\[(Dla|Gpu)Layer\]\s*(.+?)[,\s]*$", re.MULTILINE)
PART, COMPILED = "{ForeignNode[", ("myelin", "kgen", "gpu")
"""How the name of a part begins; what the operator of one that runs on the GPU has in it, in small letters."""
NOTHING = "nothing runs on the DLA core"
MOST = 4
"""Names that a note holds."""


def placed(text: str) -> List[Tuple[str, str]]:
    """(dla or gpu, name) of each part, as the library tells in its log."""
    return [(device.lower(), name) for device, name in PLACED.findall(text)]


def by_layers(layers: Sequence[Table]) -> List[Tuple[str, str]]:
    """The same by an engine's layers."""
    found = []
    for layer in layers:
        name, op = str(layer["name"]), str(layer["op"]).lower()
        there = op == "dla" or (name.startswith(PART) and not any(word in op for word in COMPILED))
        found.append(("dla" if there else "gpu", name))
    return found


def used(index: int, log: str, layers: Sequence[Table], model: OnnxFile) -> Tuple[Table, str]:
    """What runs where, and the same as a note. log: what the library said; layers: of the engine, where they are known.

    The table: core, known, and the names of parts on the DLA (`dla`) and on the GPU (`gpu`).
    """
    found = placed(log) or by_layers(layers)
    parts = {device: [name for where, name in found if where == device] for device in ("dla", "gpu")}
    table: Table = {"core": index, "known": bool(found), "dla": parts["dla"], "gpu": parts["gpu"]}
    if not found:
        return table, "what runs on the DLA core %d is not known: the library does not tell" % index
    if parts["dla"]:
        rest = "; the GPU runs %s" % named(parts["gpu"]) if parts["gpu"] else ""
        return table, "the DLA core %d runs %s%s" % (index, named(parts["dla"]), rest)
    note = "%s %d but everything on the GPU" % (NOTHING, index)
    if "float16" not in model.elements and not model.quantized:
        note += ", since '%s' is float32 and a DLA computes in float16 and int8: precision = \"fp16\"" % model.path
    return table, note


def named(parts: Sequence[str]) -> str:
    """How many parts, and the first of their names."""
    more = ", …" if len(parts) > MOST else ""
    return "%d part%s (%s%s)" % (len(parts), "" if len(parts) == 1 else "s", ", ".join(parts[:MOST]), more)
