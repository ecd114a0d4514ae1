"""Where a build's seconds go, and how they grow with the network.

    python -m benchmarks.pipeline_cost [--nets resnet20,resnet56,resnet50]

ResNet-20 and -56 are the trained ones of benchmarks/projects (their data is needed), ResNet-50 has random weights and
traffic signs enlarged to 224x224: noise would be one image to it, since it averages over the map, and nothing that is
cut would matter. Seconds of each step from an empty cache and again from a warm one, in a fresh process each, with the
peak memory of that process; and how long one candidate takes to narrow. `evaluate`, recovery and the accepting
measurement are not counted, as they depend on the user's data; there is no recovery here. The required ceilings for
ResNet-20 on two cores: 120 s cold, 30 s warm, 20 ms to narrow, 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.builds import TOOLS, accepting, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pipeline_cost.json"
PROJECTS = {"resnet20": "resnet20_gtsrb", "resnet56": "resnet56_cifar10_jpeg", "resnet50": None}
LEFT_OUT = ("evaluate dense", "evaluate pruned", "recover", "accept")
CODE = """
import data
import nets

def net():
    return nets.resnet50()

def calibration():
    images, _ = data.gtsrb("train")
    for chosen in data.sampled(len(images), 64, 16):
        yield data.enlarge(images[chosen], 224)

def evaluate(predict):
    return 1.0
"""
TOML = """
version = 1
path = ["{root}"]
[model]
factory = "task:net"
input = {{ shape = [1, 3, 224, 224] }}
[data]
calibration = "task:calibration"
evaluate = "task:evaluate"
[accuracy]
max_drop = 1.0
"""


def main() -> None:
    """Measure the networks asked for and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nets", default=",".join(PROJECTS))
    parser.add_argument("--budget", default="0.5x")
    parser.add_argument("--worker", nargs=2, metavar=("PROJECT", "STATE"))
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(work(Path(asked.worker[0]), Path(asked.worker[1]), asked.budget)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in asked.nets.split(","):
        results[name] = {"machine": machine(*TOOLS), "budget": asked.budget, **cost(name, asked.budget)}
        print(name, json.dumps(results[name], indent=1), flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def cost(name: str, budget: str) -> dict[str, Any]:
    """Cold and warm figures of one network."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        state.mkdir()
        project = Path(folder) / "project"
        project.mkdir()
        if (there := PROJECTS[name]) is None:
            (project / "task.py").write_text(CODE)
            (project / "deploy.toml").write_text(TOML.format(root=ROOT / "benchmarks"))
        else:
            accepting(there, project)
        asked = [
            sys.executable,
            "-m",
            "benchmarks.pipeline_cost",
            "--budget",
            budget,
            "--worker",
            str(project),
            str(state),
        ]
        rows = []
        for _ in ("cold", "warm"):
            done = subprocess.run(asked, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {"cold": rows[0], "warm": rows[1]}


def work(project: Path, state: Path, budget: str) -> dict[str, Any]:
    """One build in this process: seconds of its steps, peak memory, narrowing."""
    import onnx

    from pipeline.flow import build
    from pipeline.graph.narrow import narrow
    from pipeline.nouns import PruningPlan
    from pipeline.project import load_project
    from pipeline.prune.capture import capture
    from pipeline.prune.groups import find_groups
    from pipeline.prune.plan import resolve
    from pipeline.run import BuildRequest, read_state

    short = {"accept_processes": 5, "accept_rounds": 30}
    overrides: dict[str, Any] = {"measure": short, "recover": {"epochs": 0}}
    begun = time.perf_counter()
    result = build(BuildRequest(project, "local", budget, overrides, root=state))
    seconds = time.perf_counter() - begun
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run = Path(str(result.summary["run"]))
    stages = {name: row["seconds"] for name, row in read_state(run)["stages"].items()}
    counted = seconds - sum(stages.get(name, 0.0) for name in LEFT_OUT)
    user = load_project(project)
    network = find_groups(capture(user.model(), user.example()))
    plan = PruningPlan.from_json(next(run.glob("*/plan.json")).read_text())
    dense = onnx.load_model(str(next(run.glob("*/dense.onnx"))))
    cut, times = resolve(network.topology, plan), []
    for _ in range(11):
        start = time.perf_counter()
        narrow(dense, cut)
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "seconds": round(counted, 1), "whole": round(seconds, 1), "stages": stages, "peak_mib": round(peak_mib),
        "narrow_ms": round(sorted(times)[5], 2), "ratio": result.summary["latency_ratio"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
