"""Runs the networks, tells what each step costs, and draws it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import benchmarks.scale as scale
from benchmarks.builds import ROOT
from benchmarks.scale.steps import REAL, worker

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
DEPTHS = (3, 6, 9, 18, 36, 72)
"""Blocks in each of the three stages; 6 n + 2 layers."""
GROWING = ("capture", "groups", "proofs", "onnx", "table", "solve")


def run(names: Sequence[str], kind: str, asked: argparse.Namespace) -> None:
    """Each in a process of its own; its row replaces an older one."""
    for name in names:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.scale", "--worker", name]
        command += ["--rows", str(asked.rows), "--plans", str(asked.plans)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"   ended with {done.returncode}", flush=True)
            continue
        results = read()
        results.setdefault(kind, {})[name] = json.loads(done.stdout.splitlines()[-1])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def read() -> dict[str, dict[str, Any]]:
    """What there is so far: kind -> network -> row."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return found


def exponent(sizes: Sequence[float], taken: Sequence[float]) -> float:
    """Power that `taken` grows with: the slope of a line fitted to both logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(taken, 1e-3)), 1)[0])


def growth(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Step -> power of the number of layers that its CPU seconds grow with; the peak of memory as `memory`."""
    by_size = sorted(rows.values(), key=lambda row: row["layers"])
    if len(by_size) < 2:
        return {}
    sizes = [row["layers"] for row in by_size]
    found = {step: exponent(sizes, [row["cpu_s"][step] for row in by_size]) for step in GROWING}
    return found | {"memory": exponent(sizes, [row["peak_mib"]["solve"] for row in by_size])}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A block of lines a network, then the exponents."""
    told = []
    for name, row in sorted([*results.get("real", {}).items(), *results.get("growth", {}).items()], key=_order):
        told.append(
            f"{name}: {row['layers']} layers, {row['groups']} groups, {row['blocks']} blocks, {row['sites']} sites,"
            f" {row['combinations']} widths of them; {row['rows_measured']} of {row['rows']} rows measured on"
            f" {row['target']}; solved with a gap of {row['gap']:.2g}; {row['machine']['cpu']},"
            f" load {row['load'][0]} to {row['load'][1]}"
        )
        steps = (f"{step} {s:.2f} s ({row['cpu_s'][step]:.2f} here)" for step, s in row["seconds"].items())
        told.append("   " + ", ".join(steps))
        told.append("   peak MiB: " + ", ".join(f"{step} {mib:.0f}" for step, mib in row["peak_mib"].items()))
        if "plans" in row:
            each = row["seconds"]["losses"] / row["losses_measured"]
            told.append(
                f"   a round tries {row['plans']} plans on {row['samples']} samples: {each:.2f} s each,"
                f" {row['plans'] * each:.0f} s, and {row['seconds']['round']:.0f} s of measuring: {row['ratios']}"
            )
    powers = growth(results.get("growth", {}))
    told += ["seconds of the process ~ layers to the power of"] if powers else []
    told += [f"   {step:<8} {power:.2f}" for step, power in powers.items()]
    return "\n".join(told) or "no results yet"


def _order(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, int]:
    name, row = item
    return name.startswith("cifar-"), row["layers"]


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Seconds of each step against layers, both axes logarithmic; nets of real size as single points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(results.get("growth", {}).values(), key=lambda row: row["layers"])
    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    powers = growth(results.get("growth", {}))
    for number, step in enumerate(GROWING):
        points = [(row["layers"], max(row["cpu_s"][step], 1e-3)) for row in rows]
        if points:
            told = f"{step}: layers^{powers[step]:.2f}" if powers else step
            panel.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=told)
        for row in results.get("real", {}).values():
            panel.plot(row["layers"], max(row["cpu_s"][step], 1e-3), "x", color=f"C{number}")
    panel.set(xscale="log", yscale="log", xlabel="layers that multiply", ylabel="seconds of the process")
    panel.set_title("ResNets of CIFAR at 32x32, one thread; crosses: nets of real size")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(given: Sequence[str] | None = None) -> int:
    """Run what is asked, then print everything and draw it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=str(scale.__doc__).split("\n", 1)[0]
    )
    parser.add_argument("--nets", nargs="+", choices=sorted(REAL), help="these again")
    parser.add_argument("--growth", action="store_true", help="the family of depths, without a device")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="blocks a stage")
    parser.add_argument("--rows", type=int, default=100_000, help="rows that are measured of each session")
    parser.add_argument("--plans", type=int, default=3, help="plans whose losses are measured")
    parser.add_argument("--table", action="store_true", help="print what there is, and draw it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    if asked.worker:
        print(json.dumps(worker(asked.worker, asked.rows, asked.plans)))
        return 0
    if asked.growth:
        run([f"cifar-{n}" for n in asked.depths], "growth", asked)
    elif not asked.table:
        run(asked.nets or [name for name in REAL if name not in read().get("real", {})], "real", asked)
    print(table(read()))
    if read():
        draw(read(), RESULTS.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
