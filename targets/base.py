"""What a device can be asked: who it is, its state, to build an artifact, to measure it and to run it.

A target is a file of this folder with `target(profile, state) -> Target`. It knows nothing of torch or of pruning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from profiles import plugins
from profiles.schema import MeasureSpec, Profile
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.measurement import Session

Array = NDArray[Any]
Progress = Callable[[float], None]
"""Called with the done share of the work, 0 to 1, about once a second."""


@dataclass(frozen=True, eq=False)
class RowTimes:
    """Times of small models measured together with their reference, in turn, in one process.

    ms: milliseconds, shape (models, rounds): the median of one block of inferences. reference_ms: shape (groups,
    rounds): the median over several sessions of the reference model in the same round, so that
    `ms / reference_ms[group]` is a ratio free of the drift between rounds. group: shape (models,): models that the
    device cannot hold at once are measured in several groups, each beside the reference; equal paths share one. again:
    why groups were measured more than once, in words; nothing of what was disturbed is in here.
    """

    ms: NDArray[np.float64]
    reference_ms: NDArray[np.float64]
    group: NDArray[np.int64]
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerTime:
    """A layer's time per inference under the runtime's profiler.

    name and op: of the node that the runtime runs, after its own optimisations; ms: per inference. The profiler slows
    the run by a third to a half and counts whole microseconds (measurement.md, section 7): good for saying which layer
    moved, and no latency.
    """

    name: str
    op: str
    ms: float


class Target(ABC):
    """A device with a runtime. profile: what is asked of it; state: the `.deploy` folder, for temporary files.

    All methods raise DeployError for what the user can mend: unreadable models, lost processes, too little memory.
    """

    def __init__(self, profile: Profile, state: Path) -> None:
        self.profile = profile
        self.state = state

    @contextmanager
    def resumable(self, name: str) -> Iterator[None]:
        """Have what the body of a `with` asks for found again where this process is killed meanwhile.

        It is found by who asks the same in the same order under the same name. Where work ends with who asked for it
        there is nothing to find.
        """
        yield

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Who the device is; equal between runs on the same device with the same runtime."""

    @abstractmethod
    def preflight(self) -> Preflight:
        """What could spoil a measurement now."""

    @abstractmethod
    def build(self, onnx: Path, out: Path, progress: Progress | None = None) -> Path:
        """Turn an ONNX file into the runtime's artifact at `out`, opened once to be sure; returns its path.

        An engine takes minutes to build: progress is told how far it is.
        """

    def build_each(self, models: Mapping[Path, Path], progress: Progress | None = None) -> list[Path]:
        """`build` of several ONNX files, each to its own place: in one go where the device has to be set up for it."""
        return [self.build(onnx, out, progress) for onnx, out in models.items()]

    @abstractmethod
    def measure(
        self,
        artifacts: Mapping[str, Path],
        spec: MeasureSpec,
        mode: Literal["rank", "accept"],
        progress: Progress | None = None,
    ) -> Session:
        """Time all artifacts interleaved in one session, the device leased. The same file may stand under two names.

        mode: "rank" takes spec.rank_processes x spec.rank_rounds, "accept" the longer accept_* counts.
        """

    @abstractmethod
    def rows(self, models: Sequence[Path], reference: Path, rounds: int, progress: Progress | None = None) -> RowTimes:
        """Time many small ONNX models and the reference in turn in one process, for the latency table.

        Raises UndecidedError where the device was disturbed so much that there is no result.
        """

    @abstractmethod
    def layers(self, artifacts: Mapping[str, Path], spec: MeasureSpec) -> Mapping[str, tuple[LayerTime, ...]]:
        """Time of every layer of every artifact, in order of execution, the artifacts profiled in turn.

        For structure only, see `LayerTime`: a latency is what `measure` says.
        """

    @abstractmethod
    def infer(self, artifact: Path, batch: Sequence[Array]) -> list[Array]:
        """Outputs for one numpy batch of any size, one array an input, batch axis first.

        An artifact with a fixed batch is run over it and the last part is padded.
        """

    def outputs(self) -> Condition:
        """Whether outputs can be read on the device; where they cannot, networks are timed there and never judged."""
        return Condition("outputs", "can be read", True)

    def latency(self) -> Condition:
        """Whether networks can be timed on the device; where they cannot, they are built for it and never measured."""
        return Condition("latency", "can be measured", True)

    def require_latency(self) -> None:
        """Raise UndecidedError where nothing can be timed on the device."""
        seen = self.latency()
        if not seen.ok:
            raise seen.undecided(self.profile.name)

    @abstractmethod
    def doctor(self) -> list[Condition]:
        """Everything that should be in order before using the device, what is missing included."""


def load_target(profile: Profile, state: Path) -> Target:
    """The target that a profile names. Raises UsageError for an unknown one."""
    module = plugins.load("targets", profile.target)
    return cast(Target, module.target(profile, state))
