"""What networks give: a tensor, or tuples, lists and dicts of them, in the order in which ONNX files give them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def parts(value: Any) -> list[Any]:
    """Everything that an output holds, through tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in parts(part)] if isinstance(value, tuple | list) else [value]


def tensors(value: Any) -> list[Tensor]:
    """The tensors among it."""
    return [part for part in parts(value) if isinstance(part, Tensor)]
