"""The contract of an encoder: how the pruned network's weights are written into a bundle, and read back.

An encoder is a file of this folder with

    SUFFIX    the file is called `pruned<SUFFIX>`
    encode    parameter name -> array, to the bytes of that file; equal tensors give equal bytes
    decode    the inverse; runs no code from the file and raises DeployError for what it cannot read

A lossy encoder decodes to what the device computes with, so that `deploy verify` compares like with like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from profiles import plugins

Tensors = Mapping[str, NDArray[Any]]


class Encoder(Protocol):
    """What a file of this folder offers."""

    SUFFIX: str

    def encode(self, tensors: Tensors) -> bytes:
        """The file's bytes."""
        ...

    def decode(self, data: bytes) -> dict[str, NDArray[Any]]:
        """Parameter name -> array. Raises DeployError for bytes that are no such file."""
        ...


def load_encoder(name: str) -> Encoder:
    """An encoder by its file name. Raises UsageError for an unknown one."""
    return cast(Encoder, plugins.load("pipeline.release.encoders", name))
