"""The contract of a candidate: an exact rewrite of one node that may be faster on one device and slower on another.

A candidate is a file of this folder with two functions

    offers(graph: onnx_graphsurgeon.Graph) -> Offers
    rewrite(graph: onnx_graphsurgeon.Graph, node: str) -> None

`offers` changes nothing. `rewrite` edits the graph in place: the named node goes, what it computed is computed in
another way under the same output name, and nothing else changes. A pass (pipeline/graph/passes/) is always taken; a
candidate is proved to compute the same, built on the device, measured beside the network without it, and taken only
where the upper bound of that ratio is below 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import Refusal

PACKAGE = "pipeline.graph.candidates"


@dataclass(frozen=True)
class Offers:
    """Names of the nodes that a candidate can rewrite, and those that look like its case and are refused."""

    nodes: tuple[str, ...]
    refused: tuple[Refusal, ...] = ()


class Candidate(Protocol):
    """A file of this folder."""

    def offers(self, graph: gs.Graph) -> Offers:
        """What it could rewrite."""
        ...

    def rewrite(self, graph: gs.Graph, node: str) -> None:
        """Rewrite one of the nodes that it offered."""
        ...
