"""A Jetson behind OpenSSH: a board like any other, with its power mode by name, its clocks held if asked, its power."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles.errors import DeployError, UsageError, near_miss
from profiles.schema import JetsonSpec, Profile
from targets._agents import Answer, Table, Verb
from targets.base import Progress, Target
from targets.harness.device import Condition, Look
from targets.runtimes.tensorrt import TensorRT
from targets.ssh import Ssh

FACTS_LIMIT_S = 120.0
JETPACKS = {
    "32.6": "4.6", "32.7": "4.6", "34.1": "5.0", "35.1": "5.0.2", "35.2": "5.1", "35.3": "5.1", "35.4": "5.1",
    "35.5": "5.1", "35.6": "5.1", "36.2": "6.0", "36.3": "6.0", "36.4": "6.1 or 6.2", "36.5": "6.2", "38.2": "7.0",
    "38.4": "7.1", "39.2": "7.2",
}  # fmt: skip
"""JetPack by the first two numbers of the L4T release, for people: nothing depends on it, a newer one is no error."""
DLA_HINT = "leave out tensorrt.dla_core, or set it to one that the board has; they count from 0."


class Jetson(Ssh):
    """A Jetson, reached as the profile's `host` and `[ssh]` say, in the state that `[jetson]` asks for."""

    def __init__(self, profile: Profile, state: Path) -> None:
        super().__init__(profile, state)
        self.spec = profile.jetson
        self.board.wish = {"power_mode": self.spec.power_mode, "lock": self.spec.clocks == "locked"}
        self._known = False
        self._arranged: Table | None = None

    def _facts(self) -> Table:
        """As they are while something is measured: in the power mode and with the clocks that the profile asks for.

        A power mode decides how many cores there are, so it has to be set for the facts to be read.
        """
        facts = self._plain_facts()
        self._check(facts)
        if not any(self.board.wish.values()):
            return facts
        if self._arranged is None:
            self.board.settle()  # reading them takes the lease
            self._arranged = self.board.run("facts", {"models": []}, {}, {}, FACTS_LIMIT_S).seen["facts"]
        return self._arranged

    def _run(
        self, verb: Verb, job: Table, limit_s: float, progress: Progress | None = None, look: Look | None = None
    ) -> Answer:
        if not self._known:
            self._facts()
        return super()._run(verb, {**job, "telemetry_ms": self.spec.telemetry_ms}, limit_s, progress, look)

    def _check(self, facts: Mapping[str, Any]) -> None:
        """Raise UsageError for another board than the profile is for, or a power mode that it does not have."""
        wrong = _wrong_board(facts, self.profile.name, self.spec)
        if wrong:
            raise UsageError(f"{str(self.profile.host)!r} {wrong}.", "deploy list profiles; 'jetson' takes any board.")
        modes = list(facts.get("power_modes", ()))
        asked = self.spec.power_mode
        if asked and modes and asked not in modes:
            raise UsageError(
                f"'{self.profile.host}' has no power mode '{asked}'. {near_miss(asked, modes)}",
                f"set jetson.power_mode to one of {', '.join(modes)}.",
            )
        lacking = self._lacking_dla(facts)
        if lacking:
            raise UsageError(f"'{self.profile.host}' {lacking}.", DLA_HINT)
        self._known = True

    def _lacking_dla(self, facts: Mapping[str, Any]) -> str:
        """Why the board does not have the DLA core that the profile asks for, as the end of a sentence, or ""."""
        there, asked = facts.get("dla_cores"), self.profile.tensorrt.dla_core
        if there is None or asked is None or asked < there or not isinstance(self.runtime, TensorRT):
            return ""
        return f"has {there} DLA cores, and tensorrt.dla_core = {asked} was asked for"

    def doctor(self) -> list[Condition]:
        """What every board is asked, and who this one is, what was left behind and whether its state can be set."""
        found = super().doctor()
        if any(condition.fatal and not condition.ok for condition in found[:1]):
            return found
        try:
            facts, seen = self._plain_facts(), self._state()
        except DeployError:
            return found  # the runtime's condition says why
        wrong = _wrong_board(facts, self.profile.name, self.spec)
        why, mend = "the profile's settings are another board's", "use the profile of this board, or plain 'jetson'."
        found.append(Condition("board", _board(facts), not wrong, wrong and f"it {wrong}; {why}", mend, fatal=True))
        if facts.get("dla_cores") is not None:
            lacking = self._lacking_dla(facts)
            cores = str(facts["dla_cores"])
            found.append(Condition("DLA cores", cores, not lacking, lacking and f"it {lacking}", DLA_HINT, fatal=True))
        if self.spec.power_mode or self.spec.clocks == "locked":
            able = bool(seen.get("root"))
            why = "power mode and clocks cannot be set for a measurement"
            found.append(Condition("root for nvpmodel", "yes" if able else "no", able, why, SUDOERS, fatal=True))
        if seen.get("left"):
            why = "a measurement that was cut off changed the power mode or the clocks"
            mend = "measure once more on it: what was there before is given back first, or it is said why not."
            found.append(Condition("settings left behind", str(seen["left"].get("mode") or "clocks"), False, why, mend))
        return found


SUDOERS = (
    "on the board: sudo visudo -f /etc/sudoers.d/edge-deploy, with the line "
    "'USER ALL=(root) NOPASSWD: /usr/sbin/nvpmodel, /usr/bin/jetson_clocks' (see which nvpmodel jetson_clocks). "
    "jetson_clocks writes what a file says, so this is as good as root for that user."
)


def _board(facts: Mapping[str, Any]) -> str:
    """Name of the board with its module, L4T and JetPack, for people."""
    board = str(facts.get("board", "")) or "no Jetson"
    release = board.partition("L4T ")[2]
    jetpack = JETPACKS.get(".".join(release.split(".")[:2]), "")
    if not release:
        return f"{facts['machine']}, {board}"
    said = f"JetPack {jetpack}" if jetpack else f"{'newer than' if _newer(release) else 'not in'} this tool's table"
    return f"{facts['machine']}, {board} ({said})"


def _newer(release: str) -> bool:
    """Whether an L4T release is newer than every one of the table."""
    numbers = ([int(part) for part in known.split(".")[:2]] for known in (release, *JETPACKS))
    own, *others = numbers
    return own > max(others)


def _wrong_board(facts: Mapping[str, Any], name: str, spec: JetsonSpec) -> str:
    """Why this is not the board that the profile means, as the end of a sentence, or ""."""
    board = str(facts.get("board", ""))
    if not board:
        return f"is no Jetson but '{facts['machine']}'"
    module = board.split()[0]
    if spec.modules and not any(module == each or module.startswith(each + "-") for each in spec.modules):
        return f"is a '{facts['machine']}' with the module {module}; '{name}' is for {', '.join(spec.modules)}"
    return ""


def target(profile: Profile, state: Path) -> Target:
    """The plug-in."""
    return Jetson(profile, state)
