"""What a runtime does: tell its version, build an artifact from ONNX, and open it for inference on the host's side.

A runtime is a file of this folder with `runtime() -> Runtime`; what it imports is imported when it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from profiles import plugins
from profiles.errors import DeployError
from profiles.schema import MeasureSpec, Profile
from targets.harness.building import Site

Array = NDArray[Any]
CHUNK = 64
"""Samples run at once where the artifact leaves the batch free."""


@dataclass(frozen=True)
class Port:
    """An input or output. shape: None for a free size; dtype: numpy's name."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class Opened(ABC):
    """An artifact that is ready to infer."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @abstractmethod
    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for arrays of exactly the declared shapes, one an input."""

    @property
    def batch(self) -> int | None:
        """The fixed batch of the artifact, or None where it is free."""
        return self.inputs[0].shape[0] if self.inputs[0].shape else None


class Runtime(ABC):
    """A library that runs networks. suffix: of its artifacts."""

    name: str
    suffix = ".onnx"

    def fitted(self, profile: Profile, state: Path) -> Runtime:
        """Itself as a profile asks for it; state: the `.deploy` folder, where artifacts may be kept."""
        return self

    def options(self) -> dict[str, Any]:
        """What the agent has to know to open and time its artifacts; nothing for ONNX Runtime."""
        return {}

    def manner(self, providers: Sequence[str], spec: MeasureSpec, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """What a fingerprint says of how artifacts are built, run and timed: the profile's providers for ONNX Runtime.

        facts: what `agent.facts` reads on the device.
        """
        return tuple(providers)

    def order(self, site: Site, device: Callable[[], str]) -> dict[str, Any] | None:
        """What an agent has to be asked for so that it can time ONNX files: nothing for ONNX Runtime.

        site: where it is; device: gives the digest of its fingerprint.
        """
        return None

    @abstractmethod
    def version(self) -> str:
        """Version of the library that is installed."""

    @abstractmethod
    def build(self, onnx: Path, out: Path, providers: Sequence[str], threads: int) -> Path:
        """Make the artifact at `out` and open it once. Raises DeployError where the runtime refuses the model."""

    @abstractmethod
    def open(self, artifact: Path, providers: Sequence[str], threads: int) -> Opened:
        """Open an artifact. Raises DeployError where it cannot be read."""


def load_runtime(name: str) -> Runtime:
    """The runtime of this name, as it is without a profile. Raises UsageError for an unknown one."""
    return cast(Runtime, plugins.load("targets.runtimes", name).runtime())


def infer(opened: Opened, batch: Sequence[Array], name: str) -> list[Array]:
    """Run a batch of any size, batch axis first, one array an input.

    An artifact with a fixed batch is run over it, the last part padded with its last sample.
    name: of the artifact, for messages. Raises DeployError where arrays and inputs do not fit.
    """
    _check(opened, batch, name)
    total, step = int(batch[0].shape[0]), opened.batch or CHUNK
    parts: list[list[Array]] = []
    for start in range(0, total, step):
        arrays = [
            np.ascontiguousarray(a[start : start + step], dtype=p.dtype)
            for a, p in zip(batch, opened.inputs, strict=True)
        ]
        count = int(arrays[0].shape[0])
        fill = step - count if opened.batch else 0
        if fill:
            arrays = [np.concatenate([a, np.repeat(a[-1:], fill, axis=0)]) for a in arrays]
        outputs = opened.run(arrays)
        for output, port in zip(outputs, opened.outputs, strict=True):
            if output.ndim == 0 or output.shape[0] != count + fill:
                raise DeployError(
                    f"output '{port.name}' of '{name}' has shape {output.shape}, so no batch axis of {count + fill}."
                )
        parts.append([output[:count] for output in outputs])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _check(opened: Opened, batch: Sequence[Array], name: str) -> None:
    if len(batch) != len(opened.inputs):
        raise DeployError(f"'{name}' has {len(opened.inputs)} inputs, {len(batch)} arrays were given.")
    for array, port in zip(batch, opened.inputs, strict=True):
        fits = array.ndim == len(port.shape) and all(
            want is None or want == have for want, have in zip(port.shape[1:], array.shape[1:], strict=True)
        )
        if not fits or not array.shape[0]:
            asked = tuple("any" if size is None else size for size in ("any", *port.shape[1:]))
            raise DeployError(
                f"input '{port.name}' of '{name}' takes {_text(asked)}, an array of {_text(array.shape)} was given."
            )
    if len({int(a.shape[0]) for a in batch}) > 1:
        raise DeployError(
            f"the arrays for '{name}' have different batches: {', '.join(str(a.shape[0]) for a in batch)}."
        )


def _text(shape: Sequence[object]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
