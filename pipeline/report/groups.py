"""What `deploy groups` says: every channel group with what is in it and what goes with it, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from pipeline.nouns import Box
from pipeline.report import numbers
from pipeline.report.escape import printable
from pipeline.report.grid import Grid

State = Literal["proved", "refuted", "frozen"]
COLOURS = {"proved": "green", "refuted": "red", "frozen": "bright_black"}
NAMED = 4
"""Layers of a group that the table names; the page and the JSON have all of them."""


@dataclass(frozen=True)
class GroupEntry:
    """A channel group. units: how many can go, one by one; channels: of the first layer that makes them.

    state: `proved` may be pruned, `refuted` failed the proof, `frozen` was never offered, with the reason. made_by:
    layers whose outputs they are; layers: all that hold some of them, makers first. Shares are of the
    network's, and go where the whole group does. block: the residual block that it would go with, or "".
    """

    number: int
    id: str
    name: str
    state: State
    reason: str
    units: int
    channels: int
    made_by: tuple[str, ...]
    layers: tuple[str, ...]
    members: tuple[str, ...]
    parameters_share: float
    macs_share: float
    block: str = ""


@dataclass(frozen=True)
class BlockEntry:
    """A residual branch that can be removed whole, or why it cannot."""

    name: str
    state: State
    reason: str
    parameters_share: float
    macs_share: float


@dataclass(frozen=True)
class LeafEntry:
    """A module that capture left whole. kind: what a rule of the user's would name it."""

    module: str
    kind: str
    reason: str


@dataclass(frozen=True)
class GroupsData:
    """All of it. parameters: weights of layers; macs: per sample; prunable: the share that may go at most.

    inputs: name -> shape. boxes: the network as a picture. notes: one sentence each.
    """

    network: str
    project: str
    inputs: Mapping[str, tuple[int, ...]]
    parameters: int
    macs: int
    prunable_parameters_share: float
    prunable_macs_share: float
    groups: tuple[GroupEntry, ...]
    blocks: tuple[BlockEntry, ...] = ()
    leaves: tuple[LeafEntry, ...] = ()
    boxes: tuple[Box, ...] = ()
    notes: tuple[str, ...] = ()


def groups_json(data: GroupsData) -> dict[str, Any]:
    """The one JSON object of `--json`: everything but the picture."""
    told = asdict(data)
    del told["boxes"]
    counts = {state: sum(group.state == state for group in data.groups) for state in COLOURS}
    return {**told, "counts": counts}


def summary(data: GroupsData) -> str:
    """The network in one sentence."""
    counts = {state: sum(group.state == state for group in data.groups) for state in COLOURS}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
    blocks = sum(block.state == "proved" for block in data.blocks)
    whole = f"; {blocks} of {len(data.blocks)} residual blocks can go whole" if data.blocks else ""
    return f"{len(data.groups)} groups: {states}{whole}."


def reach(data: GroupsData) -> str:
    """How much may be pruned at most."""
    share = f"{numbers.share(data.prunable_parameters_share)} of {numbers.count(data.parameters)} weights"
    macs = f"{numbers.share(data.prunable_macs_share)} of {numbers.count(data.macs)} MACs"
    return f"at most {share} and {macs} can go, one unit of every group left."


def table(data: GroupsData) -> Grid:
    """Every group in execution order."""
    rows = tuple(
        (
            str(group.number), group.name, str(group.units), str(group.channels), _layers(group),
            numbers.share(group.parameters_share), numbers.share(group.macs_share), group.state, group.reason,
        )
        for group in data.groups
    )  # fmt: skip
    head = ("", "group", "units", "channels", "layers", "weights", "MACs", "state", "why")
    return Grid("Channel groups", head, rows, OVERLAP, text=(1, 4, 7, 8))


OVERLAP = "Shares are what goes with the whole group; where two groups meet in a layer it counts for both."


def _layers(group: GroupEntry) -> str:
    return shorten(group.layers, NAMED)


def shorten(names: Sequence[str], most: int) -> str:
    """Names without the path that the one before had: `layer1.0.conv1, .bn1, .conv2 and 3 more`."""
    told, before = [], ""
    for name in names[:most]:
        path, _, last = name.rpartition(".")
        told.append(f".{last}" if path and path == before else name)
        before = path
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(told) + more


def block_table(data: GroupsData) -> Grid:
    """Every residual block."""
    rows = tuple(
        (block.name, numbers.share(block.parameters_share), numbers.share(block.macs_share), block.state, block.reason)
        for block in data.blocks
    )
    return Grid("Residual blocks", ("residual block", "weights", "MACs", "state", "why"), rows, text=(0, 3, 4))


def leaf_table(data: GroupsData) -> Grid:
    """Every module that was left whole."""
    rows = tuple((leaf.module, leaf.kind, leaf.reason) for leaf in data.leaves)
    return Grid("Left whole", ("left whole", "kind", "why"), rows, text=(0, 1, 2))


def show_groups(data: GroupsData, console: Console) -> None:
    """Print the tables and what they sum up to."""

    def style(column: int, cell: str) -> str:
        return COLOURS.get(cell, "")

    console.print(table(data).table(style), highlight=False)
    for grid in (block_table(data), leaf_table(data)):
        if grid.rows:
            console.print()
            console.print(grid.table(style), highlight=False)
    console.print()
    told = [summary(data), reach(data), OVERLAP, *(f"note: {note}" for note in data.notes)]
    for line in told:
        console.print(Text(printable(line)), soft_wrap=True)
