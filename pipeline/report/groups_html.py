"""The page of `deploy groups --html`: the network drawn in the colours of its groups, beside the table of them.

A group is told by its number as well as by its colour. Pointing at a box, a line or a row shows all that goes with it;
that is done by style alone, so that the page runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.nouns import Box, Gives
from pipeline.report.groups import OVERLAP, GroupEntry, GroupsData, block_table, leaf_table, reach, shorten, summary
from pipeline.report.network_layout import HEIGHT, WIDTH, Placed, lay_out
from pipeline.report.pages import fill

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4fa3", "#8a6d00", "#b3003c", "#3f6f21",
    "#00676b", "#a0522d",
)  # fmt: skip
STAYS = "#aab2ba"
TITLE, DETAIL = 30, 34
"""Letters of a box's two lines; the rest is told when it is pointed at."""


def groups_page(data: GroupsData) -> str:
    """The page. The same data give the same text."""
    groups = {group.id: group for group in data.groups}
    layout = lay_out(data.boxes)
    first: dict[int, str] = {}
    for box in data.boxes:
        for id, _ in box.gives:
            if id in groups:
                first.setdefault(groups[id].number, box.id)
    return fill(
        "groups.html",
        {},
        data=data,
        summary=summary(data),
        reach=reach(data),
        overlap=OVERLAP,
        blocks=block_table(data),
        leaves=leaf_table(data),
        layout=layout,
        size=(WIDTH, HEIGHT),
        boxes=[_drawn(placed, groups) for placed in layout.placed],
        lines=[(route.path, _colour(route.gives, groups), _classes(route.gives, groups)) for route in layout.routes],
        colours={group.number: _own_colour(group) for group in data.groups},
        ids={box.id: f"box-{number}" for number, box in enumerate(data.boxes)},
        first=first,
        shorten=shorten,
    )


def _own_colour(group: GroupEntry) -> str:
    return PALETTE[(group.number - 1) % len(PALETTE)] if group.state == "proved" else STAYS


def _colour(gives: Gives, groups: Mapping[str, GroupEntry]) -> str:
    """Of the group that has most of the channels."""
    counts: dict[str, int] = {}
    for id, count in gives:
        counts[id] = counts.get(id, 0) + count
    most = max(counts, key=counts.__getitem__, default="")
    return _own_colour(groups[most]) if most in groups else STAYS


def _classes(gives: Gives, groups: Mapping[str, GroupEntry]) -> str:
    return " ".join(f"g{number}" for number in sorted({groups[id].number for id, _ in gives if id in groups}))


def _drawn(placed: Placed, groups: Mapping[str, GroupEntry]) -> dict[str, Any]:
    box = placed.box
    numbers = list(dict.fromkeys(groups[id].number for id, _ in box.gives if id in groups))
    offered = [groups[id].number for id in dict.fromkeys(i for i, _ in box.gives if i in groups)
               if groups[id].state == "proved"]  # fmt: skip
    read = tuple(piece for line in box.lines for piece in line.gives)
    return {
        "id": box.id, "x": placed.x, "y": placed.y, "box": box, "stripes": list(_stripes(box, groups)),
        "title": _cut(box.title, TITLE), "detail": _cut(" · ".join(p for p in (box.kind, box.detail) if p), DETAIL),
        "chip": _chip(offered), "colour": _colour(box.gives, groups), "classes": _classes((*box.gives, *read), groups),
        "row": offered[0] if offered else (numbers[0] if numbers else 0), "told": _told(box, groups),
        "stays": not offered,
    }  # fmt: skip


def _cut(text: str, most: int) -> str:
    """The end of a long name says more than its beginning."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _chip(numbers: list[int]) -> tuple[str, int]:
    """Number of the group or how many there are, and how wide that is."""
    if not numbers:
        return "", 0
    text = str(numbers[0]) if len(numbers) == 1 else f"{len(numbers)} groups"
    return text, max(30, 7 * len(text) + 6)


def _stripes(box: Box, groups: Mapping[str, GroupEntry]) -> Any:
    """Upper end, height and colour of each run of channels, down the left side of a box."""
    total = sum(count for _, count in box.gives) or 1
    at = 0.0
    for id, count in box.gives:
        share = HEIGHT * count / total
        yield round(at, 2), round(share, 2), _own_colour(groups[id]) if id in groups else STAYS
        at += share


def _told(box: Box, groups: Mapping[str, GroupEntry]) -> list[str]:
    """What a box says when it is pointed at, a line each."""
    lines = [box.title, " ".join(part for part in (box.kind, box.detail) if part)]
    if box.also:
        lines.append(f"with {', '.join(box.also)}")
    if box.whole:
        lines.append(f"left whole: {box.whole}")
    for id in dict.fromkeys(id for id, _ in box.gives if id in groups):
        group = groups[id]
        why = f": {group.reason}" if group.reason else ""
        lines.append(f"group {group.number}, {group.name}, {group.units} units, {group.state}{why}")
    if box.gives and not any(id in groups for id, _ in box.gives):
        lines.append("its channels are of no group and stay")
    return [line for line in lines if line]
