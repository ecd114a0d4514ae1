"""Rule files of the user's own: how channels pass through their operators, `[model] rules` in deploy.toml.

The contract is that of pipeline/prune/rules: `KINDS`, the operators that the file speaks for, and `apply(op, space)`.
A kind is `nets.Gate` for a module, a function or an autograd function of nets.py, `mylib::gate` for a custom operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.project.usercode import UserCode
from profiles.errors import UsageError

KEY = "model.rules"
KIND = re.compile(r"[\w.<>]+\.[\w<>]+|\w+::\w+")
KINDS_HINT = 'KINDS = ("nets.Gate",) is a class or function of nets.py, ("mylib::gate",) an operator of torch.library.'
Rule = Callable[[Any, Any], None]


@dataclass(frozen=True)
class OwnRule:
    """What a rule file does with one kind of operator. file: its module, as deploy.toml names it."""

    kind: str
    file: str
    apply: Rule


def load_rules(code: UserCode, names: str | Sequence[str]) -> dict[str, OwnRule]:
    """Kind of operator -> rule, from every file.

    Raises UsageError for a file that is not there, or that is no rule file; DeployError where it fails to import.
    """
    found: dict[str, OwnRule] = {}
    for name in (names,) if isinstance(names, str) else names:
        for rule in _rules(code, name):
            if rule.kind in found:
                files = f"'{found[rule.kind].file}' and '{name}'"
                raise UsageError(f"deploy.toml: {KEY} names {files}, and both have a rule for '{rule.kind}'.")
            found[rule.kind] = rule
    return found


def _rules(code: UserCode, name: str) -> list[OwnRule]:
    module = code.module(KEY, name)
    place = f"deploy.toml: {KEY} is '{name}', and {name}.py"
    kinds, apply = getattr(module, "KINDS", None), getattr(module, "apply", None)
    if isinstance(kinds, str) or not isinstance(kinds, tuple | list) or not kinds:
        given = "has no KINDS" if kinds is None else "has KINDS that are no tuple of names"
        raise UsageError(f"{place} {given}.", KINDS_HINT)
    wrong = next((kind for kind in kinds if not isinstance(kind, str) or not KIND.fullmatch(kind)), None)
    if wrong is not None:
        raise UsageError(f"{place} has {wrong!r} in KINDS, which names no operator of yours.", KINDS_HINT)
    if not callable(apply):
        given = "has no function apply" if apply is None else f"has an apply that is {type(apply).__name__}"
        raise UsageError(f"{place} {given}.", "def apply(op, space): …, as in pipeline/prune/rules/elementwise.py.")

    def blamed(op: Any, space: Any) -> None:
        with code.blame(f"the rule of {name} for '{op.kind}'"):
            apply(op, space)

    return [OwnRule(kind, name, blamed) for kind in dict.fromkeys(kinds)]
