"""Weights as they are, in safetensors: every tensor in its own precision, no loss and no packing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.release.encoders.base import Tensors
from profiles.errors import DeployError

SUFFIX = ".safetensors"


def encode(tensors: Tensors) -> bytes:
    """The safetensors file; tensors in the order of their names, so that equal networks give equal bytes."""
    return bytes(save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}))


def decode(data: bytes) -> dict[str, NDArray[Any]]:
    """Parameter name -> array. Raises DeployError for bytes that are no safetensors file."""
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DeployError(f"the weights are no safetensors file: {error}.", "deploy build makes them anew.") from None
