"""NVIDIA TensorRT for RTX: builds engines for GeForce and RTX cards, also on a machine that has none."""

from __future__ import annotations

from targets.runtimes.base import Runtime
from targets.runtimes.tensorrt import TensorRT


def runtime() -> Runtime:
    """The plug-in."""
    return TensorRT("tensorrt-rtx")
