"""Parameters that have no initializer of their own any more, kept as a list in the model's metadata.

Batch-norm parameters vanish into a convolution, a shared parameter is stored once. Narrowing has to tell those from a
name that was lost by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import onnx

KEY = "edge_deploy.absorbed"


def absorbed(model: onnx.ModelProto) -> frozenset[str]:
    """Names of parameters that other initializers stand in for."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), "[]")
    return frozenset(str(name) for name in json.loads(text))


def absorb(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Add names to the list of a model, in place."""
    every = sorted(absorbed(model) | set(names))
    if not every:
        return
    entry = next((e for e in model.metadata_props if e.key == KEY), None) or model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(every)
