"""A report as one HTML page: self-contained, readable on a phone and on paper, nothing fetched, every value escaped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pipeline.report import charts
from pipeline.report.data import GroupRow, ReportData, SiteRow
from pipeline.report.pages import fill


def render(data: ReportData) -> str:
    """The page. The same data give the same text; a part of the data that is empty has no section."""
    return fill(
        "page.html",
        _charts(data),
        data=data,
        stages=_by_stage(data.groups),
        sites=_sites(data.sites),
        kept=_kept(data),
    )


def _charts(data: ReportData) -> dict[str, str]:
    """The charts for which there are data, by name."""
    wanted: dict[str, tuple[bool, Any]] = {
        "rounds": (bool(data.rounds), lambda: charts.rounds(data)),
        "accuracy": (sum(p.accuracy is not None for p in data.points) > 1, lambda: charts.points(data, loss=False)),
        "loss": (sum(p.loss is not None for p in data.points) > 1, lambda: charts.points(data, loss=True)),
        "distribution": (any(d.samples_ms for d in data.distributions), lambda: charts.distributions(data)),
        "processes": (len(data.process_ratios) > 1, lambda: charts.processes(data)),
    }
    return {name: draw() for name, (there, draw) in wanted.items() if there}


def _by_stage(groups: Sequence[GroupRow]) -> list[tuple[str, list[GroupRow]]]:
    """Groups under their stage's heading, stages in the order in which they first come."""
    order = list(dict.fromkeys(row.stage for row in groups))
    rows = sorted(groups, key=lambda row: order.index(row.stage))
    return [(stage, list(members)) for stage, members in groupby(rows, key=lambda row: row.stage)]


def _sites(sites: Sequence[SiteRow]) -> list[dict[str, Any]]:
    """Sites with the widths of their bars in percent of the longest one."""
    longest = max((max(site.dense_ms, site.pruned_ms) for site in sites), default=0.0) or 1.0
    bars = [(site, 100 * site.dense_ms / longest, 100 * site.pruned_ms / longest) for site in sites]
    return [{"site": site, "dense": f"{dense:.1f}", "pruned": f"{pruned:.1f}"} for site, dense, pruned in bars]


def _kept(data: ReportData) -> str:
    """How many channels stay over all groups, in words."""
    dense, kept = sum(row.dense for row in data.groups), sum(row.kept for row in data.groups)
    frozen = sum(row.frozen is not None for row in data.groups)
    told = f"{kept} of {dense} channels stay" if dense else ""
    return f"{told}; {frozen} of {len(data.groups)} groups are frozen" if frozen else told
