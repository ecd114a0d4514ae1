"""NVIDIA TensorRT: the artifact is an engine, built where it runs, kept by a key that holds all that it depends on."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import DeployError
from profiles.schema import MeasureSpec, Profile, TensorRTSpec
from targets.harness import building
from targets.harness.agent.board.tensorrt import engine, library, running, trtexec
from targets.harness.agent.board.tensorrt.errors import BoardError
from targets.runtimes.base import Array, Opened, Port, Runtime


def builder_options(spec: TensorRTSpec) -> dict[str, Any]:
    """The keys of a profile that the builder is given: all of them are part of an engine's key."""
    return {name: getattr(spec, name) for name in engine.OPTIONS}


def running_options(spec: TensorRTSpec) -> dict[str, Any]:
    """The keys of a profile that say how an engine is opened, run and timed; how it is timed is the protocol's id."""
    return {name: getattr(spec, name) for name in ("cuda_graph", "spin", "copies", "dla_core", "version_compatible")}


class TensorRT(Runtime):
    """TensorRT, or TensorRT for RTX. spec: how engines are built and run; state: where they are kept."""

    suffix = ".plan"

    def __init__(self, name: str, spec: TensorRTSpec | None = None, state: Path | None = None) -> None:
        self.name, self.spec, self.state = name, spec or TensorRTSpec(), state

    def fitted(self, profile: Profile, state: Path) -> Runtime:
        """The same with a profile's keys and its state folder."""
        return TensorRT(self.name, profile.tensorrt, state)

    def options(self) -> dict[str, Any]:
        """The library, and how its engines are run."""
        return {"library": self.name, **running_options(self.spec)}

    def manner(self, providers: Sequence[str], spec: MeasureSpec, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """The protocol's id, of trtexec where only that is there; what the builder is asked for beyond its defaults."""
        timed = trtexec if facts["runtime"] == "trtexec" else running
        usual, asked = builder_options(TensorRTSpec()), builder_options(self.spec)
        other = [f"{name}={value}" for name, value in sorted(asked.items()) if value != usual[name]]
        return (timed.protocol(running_options(self.spec)), *other)

    def version(self) -> str:
        """Version of the library that is loaded."""
        try:
            return library.load(self.name).version
        except BoardError as error:
            raise building.refused(error.to_table(), self.name) from None

    def build(self, onnx: Path, out: Path, providers: Sequence[str], threads: int) -> Path:
        """Build the engine at `out`, or take it from the state folder. It is opened where this machine can run it."""
        self.built(onnx, out)
        return out

    def order(self, site: building.Site, device: Callable[[], str]) -> dict[str, Any]:
        """What a builder there is asked for."""
        return building.order(self.name, builder_options(self.spec), self.spec.timing_cache, site, device())

    def built(self, onnx: Path, out: Path, progress: building.Progress | None = None) -> building.Built:
        """As `build`, with a progress bar and the record of what was done."""
        return self.built_each({onnx: out}, progress)[0]

    def built_each(
        self,
        models: Mapping[Path, Path],
        progress: building.Progress | None = None,
        site: building.Site | None = None,
        device: Callable[[], str] | None = None,
    ) -> list[building.Built]:
        """The engines of ONNX files, each at its own place; those not kept from before are built in one go.

        site: where, this machine if left out; device: gives the digest of a fingerprint, the GPU alone if left out.
        """
        for onnx in models:
            if not onnx.is_file():
                raise DeployError(f"there is no file '{onnx}'.")
        with contextlib.ExitStack() as stack:
            state = self.state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            site, where = site or building.Here(state), device() if device else None
            timing = self.spec.timing_cache and self.state is not None
            asked = building.order(self.name, builder_options(self.spec), timing, site, where)
            return building.build_each(models, asked, state, site, where, progress)

    def open(self, artifact: Path, providers: Sequence[str], threads: int) -> Opened:
        """Open an engine on this machine's GPU."""
        if not artifact.is_file():
            raise DeployError(f"there is no file '{artifact}'.")
        options = {"library": self.name, "seed": 0, **running_options(self.spec)}
        try:
            return EngineOpened(running.EngineModel(str(artifact), options))
        except BoardError as error:
            raise building.refused(error.to_table(), self.name) from None


class EngineOpened(Opened):
    """An engine with its buffers on the GPU of this machine."""

    def __init__(self, model: running.EngineModel) -> None:
        self._model, self._session = model, running.EngineSession(model)
        self.inputs = tuple(_port(port) for port in model.ports if port.fed)
        self.outputs = tuple(_port(port) for port in model.ports if not port.fed)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for arrays of the declared shapes."""
        feeds = {port.name: np.asarray(array) for port, array in zip(self.inputs, arrays, strict=True)}
        try:
            return self._session.run(None, feeds)
        except BoardError as error:
            raise building.refused(error.to_table(), "tensorrt") from None


def _port(port: running.Port) -> Port:
    return Port(port.name, port.shape, port.dtype)


def runtime() -> Runtime:
    """The plug-in."""
    return TensorRT("tensorrt")
