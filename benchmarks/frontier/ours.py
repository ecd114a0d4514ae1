"""Ours: `deploy build` as a user runs it, from an empty cache; with another solver or criterion from a shared one.

The build itself is the distilled cell. The plain one takes its plan, repairs it as the build did, and recovers it from
labels alone, so that both differ in nothing but the recovery.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import builds
from benchmarks.frontier.arena import Arena, Entry, NeverMet
from pipeline.nouns import PruningPlan
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.repair import affordable, repair
from pipeline.prune.surgery import prune
from targets.harness.measurement import Session

AFTER = ("recover", "export", "evaluate pruned")
"""Steps of a build that are not part of finding and repairing the network; accepting is, for it steers attempts."""


def enter(arena: Arena, budget: str, contestant: str, folder: Path) -> Entry:
    """A build at the budget. Raises NeverMet where it ends without a network that keeps it."""
    flags = method(contestant)
    work = arena.folder / "builds" if flags else folder / "build"
    if not flags:
        shutil.rmtree(work, ignore_errors=True)
    entry = built(arena, budget, flags, work)
    entry.facts["cache"] = "shared" if flags else "empty"
    return entry


def built(arena: Arena, budget: str, flags: Sequence[str], work: Path, command: Sequence[str] = builds.DEPLOY) -> Entry:
    """What a build in the folder `work` ends with, whether that keeps the budget or not. Raises NeverMet for nothing.

    command: what stands for `deploy`.
    """
    row = builds.deploy(arena.place, budget, [*arena.pace.flags, *flags], work, command)
    summary = row["summary"]
    seconds = {name: took for name, took in row.get("seconds", {}).items() if name in AFTER}
    seconds["search"] = summary.get("seconds", 0.0) - sum(seconds.values())
    bundle = summary.get("bundle") or summary.get("rejected")
    if summary.get("latency_ratio") is None or not bundle:
        reason = summary.get("error") or summary.get("verdict")
        raise NeverMet(f"deploy build ended with {row['exit_code']}: {reason}", seconds, 0)
    path, sessions = work / bundle, measured(work / summary["run"] / "journal")
    facts: dict[str, Any] = {key: row[key] for key in ("removed", "widths", "rounds")}
    facts |= {
        "verdict": summary["verdict"], "accepted": [summary["latency_ratio"], *summary["latency_ratio_interval"]],
        "flags": list(flags), "search rounds": summary["rounds"],
        "parameters": summary["parameters"], "macs": summary["macs"],
    }  # fmt: skip
    return Entry(
        start=lambda: repaired(arena, planned(path)),
        ratio=summary["latency_ratio"],
        before={name: told["validate"] for name, told in row["repairs"].items()},
        seconds=seconds,
        sittings=len(sessions),
        contaminated=sum(sessions),
        facts=facts,
        finished=(path / "model.onnx", summary["accuracy"]),
    )


def measured(journal: Path) -> list[bool]:
    """Whether each session of a build was contaminated: those of the search and those that accept."""
    found = []
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        if str(entry["name"]).startswith("session "):
            found.append(Session.from_json(entry["value"]).contaminated)
    return found


def planned(bundle: Path) -> PruningPlan:
    """The plan of a bundle, one that was rejected too."""
    return PruningPlan.from_json((bundle / "plan.json").read_text())


def method(contestant: str) -> tuple[str, ...]:
    """Flags of `ours`, `ours-solver-NAME` and `ours-criterion-NAME`."""
    _, _, rest = contestant.partition("-")
    kind, _, name = rest.partition("-")
    return (f"--{kind}", name) if kind else ()


def repaired(arena: Arena, plan: PruningPlan, mode: str | None = None) -> nn.Module:
    """The network of a plan as the build repaired it: a function of plan, weights and samples.

    mode: another repair, one that needs no twins.
    """
    spec = arena.profile.prune
    network = find_groups(capture(arena.model, arena.project.example()), freeze=spec.freeze)
    samples = arena.samples.first(affordable(network))
    return repair(prune(network, plan), network, plan, samples, mode or spec.repair)
