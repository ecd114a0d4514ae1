"""Every error that is the user's to mend, with its exit code and the next step.

    DeployError            1  the work failed
    ├── ScarceError        1  the device had too little memory for what it was to hold at once
    ├── UsageError         2  a name, key, option or file that was asked for does not exist or makes no sense
    ├── MissedError        3  budget or accuracy missed, or regressed
    └── UndecidedError     4  undecided, inconclusive, or could not be measured

Anything that is not a DeployError is a bug and shows its stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DeployError(Exception):
    """One sentence that names what failed with its numbers, and a hint that is the next command or key."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(DeployError):
    """A name, key, option or file that was asked for does not exist or makes no sense."""

    exit_code = 2


class ScarceError(DeployError):
    """The device had too little memory for what it was to hold at once: less of it may fit."""


class MissedError(DeployError):
    """The work was done and measured, and the budget or the accuracy does not hold."""

    exit_code = 3


class UndecidedError(DeployError):
    """The numbers do not allow a verdict, or could not be measured."""

    exit_code = 4


def near_miss(name: str, known: Iterable[str]) -> str:
    """The sentence that follows an unknown name: the closest known one, else the list of what there is."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(names)}." if names else "There are none."
