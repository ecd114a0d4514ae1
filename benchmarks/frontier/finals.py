"""The finalists of a network and budget measured together: one interleaved session with the dense network."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import builds
from benchmarks.frontier.arena import Overrides
from benchmarks.frontier.cells import DENSE, Store
from benchmarks.frontier.sessions import sit
from benchmarks.lines import Row
from pipeline.stage import tool_versions
from profiles.schema import load_profile
from targets.base import load_target

MOST_ARMS = 14
"""Finalists in one session; more of them are measured in groups, each beside the dense network."""


def measure(group: str, store: Store, overrides: Overrides, folder: Path) -> Row | None:
    """Measure the finalists whose files are still there; None where there is none, or no dense network.

    A contaminated session is refused: its finalists stay as they were, mostly unmeasured, and the next run tries again.
    Those whose files are gone keep the ratio that they had: the dense network is the common reference.
    """
    net = group.partition("/")[0]
    dense = builds.ROOT / store.cells.get(f"{net}/{DENSE}/{DENSE}", {"onnx": "missing"})["onnx"]
    found = {name: row for name, row in store.finalists(group).items() if (builds.ROOT / row["onnx"]).is_file()}
    if not found or not dense.is_file():
        return None
    profile = load_profile(builds.TARGET, {"measure": dict(overrides.get("measure", {}))})
    target = load_target(profile, folder / ".deploy")
    names, row = sorted(found), dict[str, object]()
    ratios: dict[str, list[float]] = dict(store.measured(group))
    refused, sessions = 0, 0
    for start in range(0, len(names), MOST_ARMS):
        files = {name: builds.ROOT / found[name]["onnx"] for name in names[start : start + MOST_ARMS]}
        sitting = sit(target, dense, files, profile.measure, "accept")
        if sitting.contaminated:
            refused += 1
            continue
        ratios |= {name: list(time) for name, time in sitting.times.items()}
        sessions += 1
        row["ended"] = sitting.ended
    if not sessions:
        return None
    return {
        "final": group, "ratios": ratios, "sha256": {name: store.finalists(group)[name]["sha256"] for name in ratios},
        "sessions": sessions, "refused": refused, "load": os.getloadavg()[0], **row,
        "machine": target.fingerprint().to_table(), "versions": tool_versions("onnxruntime"),
    }  # fmt: skip
