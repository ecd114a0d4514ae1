"""What the engine inspector tells of an engine's layers and ports, in one form for all versions.

Before TensorRT 11 ports are a list of names under `Bindings`, and `Format/Datatype` is one text; from 11 on ports are
tables under `I/O Tensors`, and `Format` and `Datatype` are two (docs.nvidia.com, "Migrating IEngineInspector Usage from
TensorRT 10.x to 11.x"). An engine that was built with less than detailed verbosity names its layers only.
"""

import json
from typing import Any, List

from .errors import BoardError, Table
from .library import Library

FORMATS = ("Format/Datatype", "Datatype", "DataType")


def read(text: str) -> Table:
    """Layers and ports in an inspector's JSON: layers with name, op, precision and outputs; ports with their names."""
    try:
        table = json.loads(text)
        if not isinstance(table, dict):
            table = {"Layers": table}
        layers = [_layer(layer) for layer in table.get("Layers", [])]
        ports = table.get("I/O Tensors", table.get("Bindings", []))
        return {"layers": layers, "ports": [_port(port) for port in ports]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BoardError("model", "the engine inspector gave no readable description of the layers") from None


def _layer(layer: Any) -> Table:
    if isinstance(layer, str):
        return {"name": layer, "op": "", "precision": "", "outputs": []}
    outputs = [_tensor(each) for each in layer.get("Outputs", [])]
    precision = outputs[0]["type"] if outputs else ""
    return {"name": layer["Name"], "op": layer.get("LayerType", ""), "precision": precision, "outputs": outputs}


def _tensor(table: Any) -> Table:
    said = next((str(table[key]) for key in FORMATS if key in table), "")
    return {"name": table.get("Name", ""), "shape": list(table.get("Dimensions", [])), "type": precision_of(said)}


def precision_of(text: str) -> str:
    """float32, float16, int8 and the like in a description as `Channel major FP16 format`, "" where none is named."""
    words = text.lower().replace("kfloat", "float").replace("khalf", "half").replace("kint8", "int8")
    named = (
        ("int8", "int8"), ("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("fp8", "float8"),
        ("fp32", "float32"), ("float", "float32"), ("int32", "int32"), ("int64", "int64"), ("bool", "bool"),
    )  # fmt: skip
    return next((name for word, name in named if word in words), "")


def _port(port: Any) -> str:
    return str(port["Name"] if isinstance(port, dict) else port)


def inspect(library: Library, engine: Any) -> Table:
    """Layers and ports of an engine."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(library.api.LayerInformationFormat.JSON)
    return read(str(text))


def names(layers: List[Table]) -> List[str]:
    """Names of layers."""
    return [str(layer["name"]) for layer in layers]
