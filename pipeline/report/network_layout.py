"""Where the boxes and lines of a network's picture lie: rows from top to bottom in the order of execution.

networkx ranks the boxes (topological generations) and sets those of a row beside each other (multipartite layout), in
the order of what they read, and at the right whoever gives to a distant row. A line to the next row goes straight down.
One that passes rows, a skip connection, goes through a channel at their right, which all such lines of a box share;
channels that overlap lie beside each other, the outer for the longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from pipeline.nouns import Box, Gives

WIDTH, HEIGHT = 236, 40
ACROSS, DOWN, MARGIN = 26, 26, 12
CHANNEL, BEND = 9, 8


@dataclass(frozen=True)
class Placed:
    """A box with its left upper corner."""

    box: Box
    x: float
    y: float


@dataclass(frozen=True)
class Route:
    """A line as an SVG path."""

    gives: Gives
    path: str


@dataclass(frozen=True)
class Layout:
    """The picture, its size in pixels."""

    placed: tuple[Placed, ...]
    routes: tuple[Route, ...]
    width: float
    height: float


def lay_out(boxes: Sequence[Box]) -> Layout:
    """Place boxes given in execution order."""
    if not boxes:
        return Layout((), (), 0.0, 0.0)
    rows = _rows(boxes)
    centres = _centres(boxes, rows)
    left = min(centres.values()) - WIDTH / 2 - MARGIN
    at = {id: (centre - WIDTH / 2 - left, MARGIN + rows[id] * (HEIGHT + DOWN)) for id, centre in centres.items()}
    routes, right = _routes(boxes, rows, at)
    placed = tuple(Placed(box, *at[box.id]) for box in boxes)
    height = max(y for _, y in at.values()) + HEIGHT + MARGIN
    return Layout(placed, routes, right + MARGIN, height)


def _rows(boxes: Sequence[Box]) -> dict[str, int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(box.id for box in boxes)
    graph.add_edges_from((line.source, box.id) for box in boxes for line in box.lines)
    return {id: row for row, ids in enumerate(nx.topological_generations(graph)) for id in ids}


def _ordered(boxes: Sequence[Box], rows: Mapping[str, int]) -> dict[int, list[str]]:
    """The boxes of every row from left to right."""
    reach: dict[str, int] = {}
    for box in boxes:
        for line in box.lines:
            reach[line.source] = max(reach.get(line.source, 1), rows[box.id] - rows[line.source])
    place: dict[str, float] = {}
    found: dict[int, list[str]] = {}
    for row in sorted(set(rows.values())):
        own = [box for box in boxes if rows[box.id] == row]
        read = {box.id: [place[line.source] for line in box.lines] for box in own}
        own.sort(key=lambda box: (reach.get(box.id, 1) > 1, sum(read[box.id]) / max(1, len(read[box.id]))))
        place |= {box.id: number - (len(own) - 1) / 2 for number, box in enumerate(own)}
        found[row] = [box.id for box in own]
    return found


def _centres(boxes: Sequence[Box], rows: Mapping[str, int]) -> dict[str, float]:
    """Middle of every box across the page."""
    across = _ordered(boxes, rows)
    graph = nx.Graph()
    graph.add_nodes_from(id for ids in across.values() for id in ids)
    longer = max(len(across), *(len(ids) for ids in across.values()), 2)
    spread = (longer - 1) / 2  # networkx would make it 1
    places = nx.multipartite_layout(graph, subset_key=across, align="horizontal", scale=spread)
    return {id: float(place[0]) * (WIDTH + ACROSS) for id, place in places.items()}


def _routes(
    boxes: Sequence[Box], rows: Mapping[str, int], at: Mapping[str, tuple[float, float]]
) -> tuple[tuple[Route, ...], float]:
    """Paths of all lines, and the right end of the picture."""
    edge = [0.0] * (max(rows.values()) + 1)
    for id, row in rows.items():
        edge[row] = max(edge[row], at[id][0] + WIDTH)
    channels = _channels(boxes, rows, edge)
    routes = []
    for box in boxes:
        for line in box.lines:
            (x1, y1), (x2, y2) = at[line.source], at[box.id]
            if rows[box.id] - rows[line.source] == 1:
                path = _down(x1 + WIDTH / 2, y1 + HEIGHT, x2 + WIDTH / 2, y2)
            else:
                path = _aside(x1 + WIDTH, y1 + HEIGHT * 0.7, x2 + WIDTH, y2 + HEIGHT * 0.3, channels[line.source])
            routes.append(Route(line.gives, path))
    return tuple(routes), max([*edge, *channels.values()])


def _channels(boxes: Sequence[Box], rows: Mapping[str, int], edge: Sequence[float]) -> dict[str, float]:
    """Where the channel runs of every box that gives to distant rows: one, right of all that lies beside it."""
    last: dict[str, int] = {}
    for box in boxes:
        for line in box.lines:
            if rows[box.id] - rows[line.source] > 1:
                last[line.source] = max(last.get(line.source, 0), rows[box.id])
    found: dict[str, float] = {}
    for source in sorted(last, key=lambda id: (last[id] - rows[id], rows[id], id)):
        first, end = rows[source], last[source]
        beside = [x for other, x in found.items() if rows[other] < end and first < last[other]]
        found[source] = max([*edge[first : end + 1], *beside]) + CHANNEL
    return found


def _down(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return f"M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"


def _aside(x1: float, y1: float, x2: float, y2: float, channel: float) -> str:
    return (
        f"M{x1:g} {y1:g}H{channel - BEND:g}Q{channel:g} {y1:g} {channel:g} {y1 + BEND:g}"
        f"V{y2 - BEND:g}Q{channel:g} {y2:g} {channel - BEND:g} {y2:g}H{x2:g}"
    )
