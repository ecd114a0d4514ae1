"""Contract of a rule family: `KINDS`, the operator kinds it speaks for, and `apply(op, space)`.

`apply` reads the labels of `op.inputs` from the space, sets those of `op.output` (and of `op.pieces` where there are
several outputs), ties and freezes labels, and registers the parameter axes and constants that the operator owns.
A kind that no family names is unknown: what flows into it and out of it is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol, cast

from pipeline.prune.labels import NONE, LabelSpace, Op
from profiles import plugins

PACKAGE = "pipeline.prune.rules"
Rule = Callable[[Op, LabelSpace], None]


class RuleFamily(Protocol):
    """A module of this folder."""

    KINDS: tuple[str, ...]

    def apply(self, op: Op, space: LabelSpace) -> None:
        """Propagate labels through one operator."""
        ...


@cache
def rules() -> dict[str, Rule]:
    """Operator kind -> rule, from every family in the folder."""
    table: dict[str, Rule] = {}
    for name in plugins.names(PACKAGE):
        family = cast(RuleFamily, plugins.load(PACKAGE, name))
        table.update(dict.fromkeys(family.KINDS, family.apply))
    return table


def unknown(op: Op, space: LabelSpace) -> None:
    """Freeze what flows through an operator that has no rule."""
    reason = op.attrs.get("reason") or f"'{op.name}' ({op.kind}) has no rule"
    for name in op.inputs:
        space.freeze(space.tensors[name], reason)
    for name in op.pieces or (op.output,):
        space.tensors[name] = NONE
