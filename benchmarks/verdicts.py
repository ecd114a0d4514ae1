"""How often the nightly check is right: false alarms on equal networks, and what it says of true slowdowns.

    python -m benchmarks.verdicts                      goes on until every experiment has its checks (hours)
    python -m benchmarks.verdicts --minutes 30         for at most that long
    python -m benchmarks.verdicts --table              what there is so far

Every check is one line of benchmarks/results/verdicts.jsonl, so that a stopped run goes on where it was. Experiments
take turns. Subject: the GTSRB ResNet-20, one thread. Slowdowns are made by adding Abs nodes; how large each one truly
is, is measured first, in one long session, and kept beside the checks. While a check of `equal, loaded` runs, another
process loads the machine in bursts. Peers' rules see the same samples: the first night's are what they store.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from scipy import stats

from benchmarks import nets, rules
from benchmarks.data import EDGE_DATA
from benchmarks.lines import Row, append, read
from pipeline.check import Measuring
from pipeline.graph.export import export
from pipeline.graph.optimize import optimize
from pipeline.prune.capture import capture
from profiles.schema import GraphSpec, InputSpec, Profile, load_profile
from targets.base import Target, load_target
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE, control_arms, judge_control
from targets.harness.measurement import Session

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "verdicts.jsonl"
STATE = ROOT / "runs" / "verdicts"
SHAPE = (1, 3, 32, 32)
ASKED = {
    "equal": 134, "equal, loaded": 66, "equal, long warm-up": 20,
    "slower 1.5 %": 30, "slower 3 %": 30, "slower 5 %": 30,
    "quota on the candidate": 5, "quota on all": 5, "33 channels": 3,
}  # fmt: skip
TRUTHS = {"slower 1.5 %": (0.014, 0.020), "slower 3 %": (0.029, 0.040), "slower 5 %": (0.046, 0.065)}
"""Range of the true slowdown that stands for each name."""
VARIANTS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((8, 0, 1),), ((8, 1, 1),), ((8, 0, 2),), ((8, 0, 3),), ((16, 0, 1), (8, 1, 1)),
    ((16, 0, 2),), ((16, 0, 2), (8, 0, 1)), ((16, 0, 2), (8, 1, 1)), ((16, 0, 2), (8, 0, 2)), ((16, 0, 3), (8, 0, 2)),
)  # fmt: skip
"""Abs nodes that are added, as (size of the map, the first Relu of that size that gets one, how many)."""
QUOTA = Path("/sys/fs/cgroup/cpu/edge-deploy-verdicts")
QUOTA_SHARE = 0.4
"""Of what the arms ask for: together a whole processor, one of the three alone a third of it."""
SAMPLES = 400
"""Inferences of each night's baseline that are kept, evenly spaced, for the peers' rules."""
PEERS = ("equal", "equal, loaded")


# --- the networks --------------------------------------------------------------------------------------------------


def dense(folder: Path) -> Path:
    """The trained ResNet-20, exported and optimised as a build does it."""
    path = folder / "dense.onnx"
    if not path.is_file():
        model = nets.resnet20()
        weights = EDGE_DATA / "gtsrb32" / "gtsrb_resnet20.pt"
        if weights.is_file():
            model.load_state_dict(torch.load(weights, weights_only=True))
        captured = capture(model.eval(), (torch.randn(SHAPE),))
        export(captured.graph, [InputSpec(shape=SHAPE)], folder / "raw.onnx")
        optimize(folder / "raw.onnx", GraphSpec().passes, path)
    return path


def slower(source: Path, added: Sequence[Sequence[int]], out: Path) -> Path:
    """The network with Abs nodes added: `count` of them behind Relus, from the `first`, whose maps are size x size."""
    model = onnx.load(source)
    for size, first, count in added:
        model = with_abs(model, size, first, count)
    onnx.save(model, str(out))
    return out


def with_abs(source: onnx.ModelProto, size: int, first: int, count: int) -> onnx.ModelProto:
    """One Abs behind each of so many Relus of that size, then a second."""
    model = onnx.shape_inference.infer_shapes(source)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    nodes = list(model.graph.node)
    relus = [n.output[0] for n in nodes if n.op_type == "Relu" and shapes.get(n.output[0], [0])[-1] == size]
    for index in range(first, first + count):
        name = relus[index % len(relus)]
        place = next(i for i, node in enumerate(nodes) if name in node.output)
        inner = f"{name}.before_abs_{index}"
        maker = onnx.NodeProto()
        maker.CopyFrom(nodes[place])
        maker.output[list(maker.output).index(name)] = inner
        nodes[place : place + 1] = [maker, helper.make_node("Abs", [inner], [name], name=f"{name}.abs_{index}")]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def chain(width: int, out: Path) -> Path:
    """Four 3x3 convolutions of one width at 16x16."""
    from pipeline.latency.reference import chain as small

    out.write_bytes(small("3x3", width, 16, 4))
    return out


def truths(target: Target, profile: Profile, source: Path, folder: Path) -> dict[str, Any]:
    """Slowdown of each variant, measured with twice the accepting protocol: its Abs nodes and its ratio."""
    found: list[Row] = []
    for part in (VARIANTS[:5], VARIANTS[5:]):
        arms = {BASELINE: source, AGAIN: source} | {
            str(added): slower(source, added, folder / f"variant-{VARIANTS.index(added)}.onnx") for added in part
        }
        spec = profile.measure.model_copy(update={"accept_processes": 16, "warmup_s": 0.2})
        session = target.measure(arms, spec, "accept")
        for added in part:
            one, two = (session.ratio(str(added), name) for name in (BASELINE, AGAIN))
            found.append({"added": added, "slower": float(np.sqrt(one.center * two.center)) - 1.0, "sd": one.sd})
    chosen = {}
    for name, (low, high) in TRUTHS.items():
        inside = [v for v in found if low <= v["slower"] <= high]
        aim = float(re.findall(r"[\d.]+", name)[0]) / 100
        chosen[name] = min(inside or found, key=lambda v: abs(v["slower"] - aim))
    return {"variants": found, "chosen": chosen}


# --- what disturbs -------------------------------------------------------------------------------------------------


@contextmanager
def load() -> Iterator[None]:
    """Another process that computes in bursts of 0.2 to 2 s; it ends with this one, however that ends."""
    code = (
        "import numpy as np,os,time,random\n"
        "a=np.random.rand(700,700)\n"
        f"while os.getppid()=={os.getpid()}:\n"
        "    end=time.time()+random.uniform(.2,2)\n"
        "    while time.time()<end: a@a\n"
        "    time.sleep(random.uniform(.2,2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ, OPENBLAS_NUM_THREADS="2"))
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextmanager
def quota(name: str | None) -> Iterator[None]:
    """A processor quota on the workers of one arm, or (None) on every one, for as long as they live."""
    QUOTA.mkdir(exist_ok=True)
    (QUOTA / "cpu.cfs_period_us").write_text("100000")
    share = QUOTA_SHARE / (3 if name else 1)
    (QUOTA / "cpu.cfs_quota_us").write_text(str(int(share * 100000)))
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = path.read_bytes().decode(errors="replace").split("\0")
                    ours = any(w.endswith("harness/agent") for w in words) and "worker" in words
                    if ours and (not name or name in words):
                        (QUOTA / "cgroup.procs").write_text(path.parent.name)
                except OSError:
                    continue

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for _ in range(50):
            try:
                QUOTA.rmdir()
                break
            except OSError:  # its last processes are still ending
                time.sleep(0.1)


# --- checks --------------------------------------------------------------------------------------------------------


def check(target: Target, profile: Profile, name: str, arms: dict[str, Path], seed: int) -> tuple[Row, list[Session]]:
    """One check: its verdict and numbers as plain data, and its sessions."""
    disturbance = load() if name == "equal, loaded" else nullcontext()
    if name.startswith("quota"):
        disturbance = quota(CANDIDATE if name == "quota on the candidate" else None)
    spec = profile.check.model_copy(update={"warmup_s": 1.0} if name == "equal, long warm-up" else {})
    with disturbance:
        measuring = Measuring(target, profile, spec, arms, seed)
        verdict = measuring.verdict()
    stages = verdict.stages
    last = stages[-1]
    row = {
        "experiment": name, "outcome": verdict.outcome, "reason": verdict.reason, "stages": len(stages),
        "sessions": len(measuring.sessions), "seconds": round(measuring.seconds, 1),
        "ratio": [last.ratio.center, last.ratio.low, last.ratio.high], "control": last.control.center,
        "control_sd": last.control.sd, "detectable": last.detectable, "load": os.getloadavg()[0],
        "warm_s": float(np.mean([b.warmup.seconds for m in measuring.sessions[0].measurements.values()
                                 for b in m.processes])),
        "control_outcome": judge_control(stages[0], stages[1] if len(stages) > 1 else None, profile.check),
        "controls": [c.to_table() for c in control_arms(*measuring.stages)],
        "seed": seed,
    }  # fmt: skip
    return row, measuring.sessions


def night(session: Session) -> list[int]:
    """Nanoseconds of tonight's baseline, evenly thinned in the order they were taken."""
    pooled = session.measurement(BASELINE).pooled_ns
    return [int(ns) for ns in pooled[np.linspace(0, pooled.size - 1, SAMPLES).astype(int)]]


def peers(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Alarms of each peer's rule over all pairs of a stored night and a later one: (alarms, pairs)."""
    nights = [np.array(row["night"]) for row in rows if row["experiment"] in PEERS]
    pairs = [(nights[i], nights[j]) for j in range(len(nights)) for i in range(j)]
    return {name: (sum(rule(*pair) for pair in pairs), len(pairs)) for name, rule in rules.RULES.items()}


def run(minutes: float, asked: Sequence[str]) -> None:
    """Checks, the experiments in turn, until all are done or the time is up."""
    STATE.mkdir(parents=True, exist_ok=True)
    end, profile = time.monotonic() + 60 * minutes, load_profile("local")
    target = load_target(profile, STATE)
    source = dense(STATE)
    rows = read(RESULTS)
    head = next((row for row in rows if row["experiment"] == "truth"), None)
    if head is None:
        head = {"experiment": "truth", **truths(target, profile, source, STATE), "machine": machine(target)}
        append(RESULTS, head)
    if not QUOTA.parent.is_dir() or not os.access(QUOTA.parent, os.W_OK):
        print(f"left out: the experiments with a quota need a writable {QUOTA.parent} (control groups, version 1)")
        asked = [name for name in asked if not name.startswith("quota")]
    done = {name: sum(row["experiment"] == name for row in rows) for name in ASKED}
    while time.monotonic() < end and (open_ := [n for n in asked if done[n] < ASKED[n]]):
        name = min(open_, key=lambda n: done[n] / ASKED[n])
        arms = {BASELINE: source, AGAIN: source, CANDIDATE: source}
        if name in TRUTHS:
            variant = head["chosen"][name]
            arms[CANDIDATE] = slower(source, variant["added"], STATE / f"{name}.onnx")
        if name == "33 channels":
            wide = chain(48, STATE / "48.onnx")
            arms = {BASELINE: wide, AGAIN: wide, CANDIDATE: chain(33, STATE / "33.onnx")}
        row, sessions = check(target, profile, name, arms, 1000 * sum(done.values()) + 7)
        if name in PEERS:
            row["night"] = night(sessions[0])
        done[name] += 1
        append(RESULTS, row)
        print(f"{name:24s} {done[name]:4d}  {row['outcome']:12s} {row['seconds']:6.1f} s  {row['reason']}", flush=True)


def machine(target: Target) -> dict[str, Any]:
    """What the figures are taken on."""
    versions = {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    return {**target.fingerprint().to_table(), "versions": versions}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Outcomes and times of each experiment, false alarms of the control arm and of the peers' rules."""
    lines = []
    for head in (row for row in rows if row["experiment"] == "truth"):
        lines.append(f"{head['machine']['cpu']}, {head['machine']['cores']} cores, {head['machine']['versions']}")
        for name, v in head["chosen"].items():
            nodes = " and ".join(f"{count} Abs at {size}x{size}" for size, _, count in v["added"])
            lines.append(f"  {name}: {nodes}, truly {v['slower']:+.2%}")
    outcomes = ("pass", "warn", "fail", "improved", "undecided", "inconclusive")
    names = " ".join(f"{o[:9]:>9s}" for o in outcomes)
    names = " ".join(f"{o[:9]:>9s}" for o in outcomes)
    lines.append(f"{'experiment':24s} {'n':>4s} {names}   s of a pass   s of a fail   control sd")
    for name in ASKED:
        own = [row for row in rows if row["experiment"] == name]
        if own:
            counts = " ".join(f"{sum(row['outcome'] == o for row in own):9d}" for o in outcomes)
            times = "".join(f"{_times(own, outcome):>14s}" for outcome in ("pass", "fail"))
            scatter = float(np.median([row["control_sd"] for row in own]))
            lines.append(f"{name:24s} {len(own):4d} {counts}{times}{scatter:12.2%}")
    equal = [row for row in rows if row["experiment"].startswith("equal")]
    if equal:
        lines.append(_rate("ours (fail)", sum(row["outcome"] == "fail" for row in equal), len(equal)))
        alarms = sum(row["control_outcome"] in ("warn", "fail", "improved") for row in rows if "control_outcome" in row)
        lines.append(_rate("ours (control arms of all checks)", alarms, len(rows) - 1))
        for rule, (alarms, pairs) in peers(rows).items():
            lines.append(f"  {rule:44s} {alarms} of {pairs} pairs of nights ({alarms / max(1, pairs):.1%})")
    return "\n".join(lines)


def _times(rows: Sequence[Row], outcome: str) -> str:
    """Median and longest seconds of the checks that ended so."""
    seconds = [row["seconds"] for row in rows if row["outcome"] == outcome]
    return f"{np.median(seconds):.0f} to {max(seconds):.0f}" if seconds else ""


def _rate(name: str, alarms: int, n: int) -> str:
    """False alarms with the upper 95 % bound of their rate (Clopper and Pearson)."""
    upper = float(stats.beta.ppf(0.95, alarms + 1, n - alarms)) if n > alarms else 1.0
    return f"  {name:44s} {alarms} of {n} equal pairs, rate at most {upper:.1%} (95 %)"


def main() -> int:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--only", help="names of experiments, divided by semicolons")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        run(asked.minutes, asked.only.split(";") if asked.only else list(ASKED))
    print(table(read(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
