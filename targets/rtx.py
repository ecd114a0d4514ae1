"""A GeForce or RTX card by its compute capability: measured where it is in this machine, else built, not measured.

Where the card is here the target is the machine at hand. Where it is not, engines are built all the same: TensorRT for
RTX needs neither GPU nor driver for that. What would time or run one is refused: no latency stands for a measured one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import MeasureSpec, Profile
from targets.base import Array, LayerTime, Progress, RowTimes, Target
from targets.harness import building
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.measurement import Session
from targets.local import Local
from targets.runtimes.tensorrt import TensorRT

RUNTIME = "tensorrt-rtx"
ELSEWHERE = "a card that is not here"
MEND = "run it on a machine with such a card and its driver: there it is measured like any other target."


class Elsewhere(Target):
    """A card of the compute capability that the profile names, which is not in this machine."""

    def __init__(self, profile: Profile, state: Path, site: building.Here) -> None:
        super().__init__(profile, state)
        self.runtime = TensorRT(RUNTIME, profile.tensorrt, state)
        self._site = site

    @property
    def _card(self) -> str:
        return f"compute capability {self.profile.tensorrt.compute_capability}"

    def fingerprint(self) -> Fingerprint:
        """The compute capability, the library, how the engine is built, and that all of it is for elsewhere."""
        library = self._site.facts(RUNTIME)["library"]
        manner = self.runtime.manner((), self.profile.measure, {"runtime": RUNTIME})
        return Fingerprint(
            machine=ELSEWHERE, cpu="", cpu_flags="", cores=0, cpu_quota=None, kernel="", memory_mib=0, power="",
            clocks="hidden", runtime=RUNTIME, runtime_version=library["version"], runtime_build=library["build"],
            python="", providers=manner, threads=0, spin=False, gpu=self._card,
        )  # fmt: skip

    def preflight(self) -> Preflight:
        """One condition: there is nothing to measure on."""
        return Preflight((self.latency(),))

    def build(self, onnx: Path, out: Path, progress: Progress | None = None) -> Path:
        """The engine for the card, built on this machine and not opened, which only the card can."""
        return self.build_each({onnx: out}, progress)[0]

    def build_each(self, models: Mapping[Path, Path], progress: Progress | None = None) -> list[Path]:
        """`build` of several, in one go."""
        self.runtime.built_each(models, progress, self._site)
        return list(models.values())

    def latency(self) -> Condition:
        """It cannot be measured here."""
        seen, mend, value = "there is no GPU here", MEND, "not measurable here"
        try:
            here = self._site.facts(RUNTIME)
        except DeployError as error:
            return Condition("latency", value, False, error.message.rstrip("."), error.hint, fatal=True)
        if "none" not in here["gpu"]:
            own = here["gpu"]["capability"]
            seen = f"the GPU here is {here['gpu']['name']} of {own}"
            if own in here["capabilities"]:
                mend = f"--set tensorrt.compute_capability={own} takes the GPU here."
        why = f"the engine is for a card of {self._card}, and {seen}"
        return Condition("latency", value, False, why, mend, fatal=True)

    def outputs(self) -> Condition:
        """They cannot be read here."""
        why = "so the accuracy is that of the ONNX file in ONNX Runtime, which is not the engine"
        seen = self.latency()
        return Condition("outputs", "cannot be read here", False, f"{seen.why}, {why}", seen.mend)

    def measure(
        self,
        artifacts: Mapping[str, Path],
        spec: MeasureSpec,
        mode: Literal["rank", "accept"],
        progress: Progress | None = None,
    ) -> Session:
        """Refused."""
        raise self._refused()

    def rows(self, models: Sequence[Path], reference: Path, rounds: int, progress: Progress | None = None) -> RowTimes:
        """Refused."""
        raise self._refused()

    def layers(self, artifacts: Mapping[str, Path], spec: MeasureSpec) -> Mapping[str, tuple[LayerTime, ...]]:
        """Refused."""
        raise self._refused()

    def infer(self, artifact: Path, batch: Sequence[Array]) -> list[Array]:
        """Refused."""
        raise self._refused()

    def _refused(self) -> UndecidedError:
        return self.latency().undecided(self.profile.name)

    def doctor(self) -> list[Condition]:
        """Whether engines can be built for the card, and that they can be neither run nor timed here."""
        why = "nothing can be built without it"
        try:
            here = self._site.facts(RUNTIME)
        except DeployError as error:
            return [Condition("runtime", "missing", False, why, error.hint, fatal=True)]
        offered, asked = here["capabilities"], self.profile.tensorrt.compute_capability
        why, mend = "the library builds for no such card", f"set tensorrt.compute_capability to {', '.join(offered)}."
        return [
            Condition("runtime", f"{RUNTIME} {here['library']['version']}", True),
            Condition("engines", f"built here for {self._card}", asked in offered, why, mend, fatal=True),
            self.latency(),
            self.outputs(),
        ]


def target(profile: Profile, state: Path) -> Target:
    """The plug-in: this machine where the card is in it, else the card elsewhere.

    Raises UsageError for a profile that names no compute capability or another runtime.
    """
    asked = profile.tensorrt.compute_capability
    if profile.runtime != RUNTIME:
        other = f"and the profile '{profile.name}' asks for '{profile.runtime}'"
        raise UsageError(f"the target 'rtx' runs engines of '{RUNTIME}', {other}.", f'runtime = "{RUNTIME}"')
    if asked is None:
        message = f"the profile '{profile.name}' does not say for which card engines are built."
        raise UsageError(message, "--set tensorrt.compute_capability=8.6, or that of your card.")
    site = building.Here(state)
    try:
        here = site.facts(RUNTIME)["gpu"].get("capability")
    except DeployError:
        here = None  # the library is not there: the doctor says so, and so does whatever is asked for next
    if here != asked:
        return Elsewhere(profile, state, site)
    native = profile.tensorrt.model_copy(update={"compute_capability": None})
    return Local(profile.model_copy(update={"tensorrt": native}), state)
