"""The main job on real networks and data: builds them, measures every bundle again, writes the figures down.

    python -m benchmarks.builds                        all cells that have no result yet
    python -m benchmarks.builds resnet20_gtsrb@0.5x    one of them, again
    python -m benchmarks.builds --verify               only measures the bundles that are there afresh
    EDGE_TARGET=board.toml python -m benchmarks.builds     on another device; frontier and ablations read it too

A cell is a project of benchmarks/projects at a budget. Its result: the build's summary, accuracy and loss after each
way of repairing, predicted against measured in every round, seconds of each stage, and the ratio of a fresh
interleaved measurement of the finished bundle (`deploy verify --target local`). benchmarks/results/builds.json keeps
them, cell by cell, with the machine and the versions.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "builds.json"
WORK = ROOT / "runs" / "benchmarks"
TOOLS = ("torch", "onnx", "onnxruntime", "scipy")
CELLS = (
    ("resnet20_gtsrb", "0.5x"),
    ("resnet20_gtsrb", "0.35x"),
    ("resnet20_gtsrb", "0.2x"),
    ("resnet56_cifar10_jpeg", "0.5x"),
    ("mobilenetv1_vww", "0.7x"),
    ("dscnn_kws", "0.7x"),
    ("shufflenet_gtsrb", "0.7x"),
    ("efficientnet_gtsrb", "0.7x"),
)
ASKED = os.environ.get("EDGE_TARGET") or "local"
TARGET = str(Path(ASKED).resolve()) if ASKED.endswith(".toml") else ASKED
"""The profile that is built for and measured on, by name or file."""
DEPLOY = [sys.executable, "-m", "pipeline.cli"]


def main(asked: list[str]) -> None:
    """Build the cells asked for, or those without a result."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if asked[:1] == ["--verify"]:
        for cell, row in results.items():
            if not asked[1:] or cell in asked:
                verify(row)
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        asked = ["--verify"]
    for project, budget in CELLS:
        cell = f"{project}@{budget}"
        if cell in asked or (not asked and cell not in results):
            print(f"== {cell}", flush=True)
            results[cell] = build(project, budget)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    for cell, row in sorted(results.items()):
        print(line(cell, row))


def build(project: str, budget: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Run one cell and verify its bundle. flags: more of `deploy build`."""
    row = deploy(ROOT / "benchmarks" / "projects" / project, budget, flags, WORK)
    verify(row)
    return row


def deploy(
    folder: Path, budget: str, flags: Sequence[str], work: Path, command: Sequence[str] = DEPLOY
) -> dict[str, Any]:
    """`deploy build` of a project folder, run in `work`: its summary, and what its report says.

    command: what stands for `deploy`.
    """
    work.mkdir(parents=True, exist_ok=True)
    asked = [*command, "build", "--target", TARGET, "--project", str(folder), "--budget", budget, "--json", *flags]
    done = subprocess.run(asked, cwd=work, stdout=subprocess.PIPE, text=True, check=False)
    summary = json.loads(done.stdout.splitlines()[-1])
    row: dict[str, Any] = {"exit_code": done.returncode, "summary": summary, "machine": machine()}
    if "run" not in summary:
        return row
    report = json.loads((work / summary["run"] / "report.json").read_text())
    state = json.loads((work / summary["run"] / "run.json").read_text())
    row["versions"] = state["versions"]
    row["seconds"] = {name: stage["seconds"] for name, stage in state["stages"].items()}
    row["repairs"] = {r["name"]: {"loss": r["loss"], "validate": r["accuracy"]} for r in report["repairs"]}
    row["rounds"] = [[r["number"], r["predicted_ms"], r["measured_ms"]] for r in report["rounds"]]
    row["removed"] = [b["name"] for b in report["blocks"] if b["removed"]]
    row["widths"] = {
        f"{g['name']} ({i})": [g["dense"], g["kept"]] for i, g in enumerate(report["groups"]) if not g["frozen"]
    }
    return row


def accepting(project: str, out: Path) -> Path:
    """A copy of a benchmark's project that accepts any accuracy, in the folder `out`.

    A build that is to be compared ends at its budget, whatever it loses, and looks for no cheaper point then.
    """
    there = ROOT / "benchmarks" / "projects" / project
    text = (there / "deploy.toml").read_text()
    text = re.sub(r"(\.\./[\w./]*|\.\.)(?=[}\"])", lambda found: str((there / found[1]).resolve()), text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "deploy.toml").write_text(re.sub(r"max_drop *= *[0-9.]+", "max_drop = 1.0", text))
    for code in there.glob("*.py"):
        shutil.copyfile(code, out / code.name)
    return out


def verify(row: dict[str, Any]) -> None:
    """Measure a cell's bundle afresh, where it has one that is still there."""
    bundle = row["summary"].get("bundle")
    if bundle and (WORK / bundle).is_dir():
        again = [*DEPLOY, "verify", bundle, "--target", TARGET, "--json"]
        fresh = subprocess.run(again, cwd=WORK, stdout=subprocess.PIPE, text=True, check=False)
        row["fresh"] = json.loads(fresh.stdout.splitlines()[-1])


def machine(*tools: str) -> dict[str, Any]:
    """What the figures were taken on, and with which versions of these tools."""
    from pipeline.stage import tool_versions

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    told = {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(), "kernel": platform.release()}
    return {**told, "versions": tool_versions(*tools)} if tools else told


def line(cell: str, row: dict[str, Any]) -> str:
    """One cell in words."""
    s, repairs = row["summary"], row.get("repairs", {})
    if "latency_ratio" not in s or s["latency_ratio"] is None:
        return f"{cell:<32} exit {row['exit_code']}: {s.get('error') or s.get('verdict')}"
    scores = {name: r["loss"] if r["validate"] is None else r["validate"] for name, r in repairs.items()}
    told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
    fresh = row.get("fresh", {}).get("reason", "not measured again")
    return (
        f"{cell:<32} {s['verdict']}: {s['latency_ratio']:.3f}x,"
        f" accuracy {s['accuracy']:.4f} (dense {s['accuracy_dense']:.4f}); repair: {told}; fresh: {fresh}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
