"""ONNX Runtime: the artifact is the ONNX file itself, with weights that lie beside it, checked to open and run.

Session settings are those of the measuring agent: sequential execution, one inter-op thread, all graph optimisations,
no spinning.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import DeployError
from profiles.schema import MeasureSpec, Profile
from targets.harness import building
from targets.harness.agent.board import providers
from targets.harness.agent.board.base import AgentError
from targets.harness.agent.board.model import NUMPY_TYPES, error_text, runtime_errors
from targets.harness.agent.board.tensorrt import onnxfile
from targets.harness.agent.board.tensorrt.errors import BoardError
from targets.harness.engines import model_digest
from targets.runtimes.base import Array, Opened, Port, Runtime

LARGEST = (1 << 31) - (1 << 20)
"""Bytes of the largest file: protobuf ends at 2 GiB."""


def copy_whole(onnx: Path, out: Path) -> Path:
    """Copy an ONNX file to `out`; weights that it keeps in files beside it, as torch's exporter does, go inside.

    So the artifact is one file that its hash names. Raises DeployError where weights are missing or outside the folder
    of the file, where they are too many for one file, or where `out` cannot be written.
    """
    if not onnx.is_file():
        raise DeployError(f"there is no file '{onnx}'.")
    if onnx.resolve() == out.resolve():
        return out
    beside = _weights_beside(onnx)
    size = sum(path.stat().st_size for path in (onnx, *beside))
    if beside and size > LARGEST:
        message = f"'{onnx}' has {size / (1 << 30):.2f} GiB with its weights, and one ONNX file holds less than 2 GiB."
        raise DeployError(message, "export a smaller network, or in half precision.")
    from onnx import load

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if beside:
            out.write_bytes(load(str(onnx)).SerializeToString())
        else:
            shutil.copyfile(onnx, out)
    except OSError as error:
        raise DeployError(f"cannot write '{out}': {error.strerror}.", "free space or choose another folder.") from None
    return out


def _weights_beside(onnx: Path) -> list[Path]:
    try:
        if not onnxfile.read(str(onnx)).external:
            return []
    except BoardError:
        return []  # what is no ONNX file, the runtime says when it opens the copy
    return [onnx.parent / name for name in model_digest(onnx) if name]


class OnnxRuntime(Runtime):
    """ONNX Runtime, on the processor or through a provider of its on a GPU."""

    name = "onnxruntime"

    def __init__(self, state: Path | None = None) -> None:
        self.state = state

    def fitted(self, profile: Profile, state: Path) -> Runtime:
        """The same with a state folder."""
        return OnnxRuntime(state)

    def options(self) -> dict[str, Any]:
        """Where the TensorRT provider may keep engines; a board has a folder of its own for them."""
        return {"engine_cache": str((self.state / "engines").resolve())} if self.state is not None else {}

    def manner(self, names: Sequence[str], spec: MeasureSpec, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """The providers, and on a GPU the protocol's id."""
        timed = providers.protocol({"providers": names, "spin": spec.spin})
        return (*names, timed) if timed else tuple(names)

    def version(self) -> str:
        """Version of the installed wheel."""
        for wheel in ("onnxruntime", "onnxruntime-gpu"):
            try:
                return metadata.version(wheel)
            except metadata.PackageNotFoundError:
                continue
        raise DeployError("onnxruntime is not installed.", "pip install onnxruntime")

    def build(self, onnx: Path, out: Path, providers: Sequence[str], threads: int) -> Path:
        """Copy the ONNX file to `out`, all weights inside, after opening it and running it once on zeros."""
        opened = self.open(onnx, providers, threads)
        arrays = [np.zeros([1 if size is None else size for size in port.shape], port.dtype) for port in opened.inputs]
        try:
            opened.run(arrays)
        except runtime_errors() as error:
            raise DeployError(
                f"'{onnx}' opens in ONNX Runtime {self.version()} but does not run: {error_text(error)}."
            ) from None
        return copy_whole(onnx, out)

    def open(self, artifact: Path, providers: Sequence[str], threads: int) -> Opened:
        """Open an ONNX file."""
        if not artifact.is_file():
            raise DeployError(f"there is no file '{artifact}'.")
        try:
            return OrtSession(artifact, {"providers": list(providers), **self.options()}, threads)
        except AgentError as error:
            if error.kind == "device":
                raise building.refused(error.to_table(), self.name) from None
            raise unreadable(str(artifact), self.version(), error.message) from None
        except runtime_errors() as error:
            raise unreadable(str(artifact), self.version(), error_text(error)) from None


class OrtSession(Opened):
    """An ONNX file opened by ONNX Runtime. options: providers and engine_cache."""

    def __init__(self, path: Path, options: Mapping[str, Any], threads: int) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = providers.opened(str(path), settings, dict(options))
        self.inputs = tuple(_port(value) for value in self._session.get_inputs())
        self.outputs = tuple(_port(value) for value in self._session.get_outputs())

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for arrays of the declared shapes."""
        feeds = {port.name: array for port, array in zip(self.inputs, arrays, strict=True)}
        return list(self._session.run(None, feeds))


def _port(value: Any) -> Port:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Port(value.name, shape, NUMPY_TYPES.get(value.type, value.type))


def unreadable(path: str, version: str, why: str) -> DeployError:
    """The error for a model that ONNX Runtime does not open."""
    return DeployError(
        f"ONNX Runtime {version} cannot open '{path}': {why}.",
        "export the network again, or check the file.",
    )


def runtime() -> Runtime:
    """The plug-in."""
    return OnnxRuntime()
