"""The precision of a build: every network that is measured or judged on the device is in it, the dense one too.

    float32 dense ─► half ─► table, candidates, budget         float32 pruned ─► rewrites ─► half ─► accuracy, bundle

Ratios and budgets are those of two networks in the same precision. The accuracy that may be lost is counted from the
user's own network, in float32: what half precision costs is a part of it. What it does to the dense network by itself,
its time above all, is measured on the device and told, since not every device gains by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pipeline.graph.precision.half import Halved, halve
from pipeline.graph.precision.ranges import feeds_of
from pipeline.graph.rewriting import Timing
from pipeline.prune.evidence import Samples
from pipeline.report import numbers
from pipeline.stage import Outcome, Stage
from pipeline.work import Work

TOOLS = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime")
MOST_SAMPLES, FEWEST_SAMPLES = 128, 32
EFFORT_MACS = MOST_SAMPLES * 1e9
"""Multiply-accumulates that one look at the ranges of a network's tensors may take, and the samples it never goes
below or above."""


def lowered(work: Work, exact: Outcome, name: str) -> Outcome:
    """A network of float32 in the precision that was asked for, as a stage; the same one where that is float32."""
    if work.profile.precision == "fp32":
        return exact

    def make(folder: Path) -> dict[str, Any]:
        model, done = in_half(work, onnx.load_model(str(exact.path("onnx"))), name)
        onnx.save_model(model, str(folder / "half.onnx"))
        files = {each: exact.path(each) for each in exact.files}
        return {**files, "onnx": folder / "half.onnx", "passes": {**exact["passes"], "precision": asdict(done)}}

    params = {"precision": work.profile.precision, "samples": _samples(work).count}
    inputs = {"project": work.source, **exact.files}
    return work.run.stage(
        Stage(f"halve {name}"), params, inputs, make, tools=TOOLS, detail=lambda done: _detail(done["passes"])
    )


def in_precision(work: Work, model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of float32 in the precision that was asked for."""
    return model if work.profile.precision == "fp32" else in_half(work, model, "rewritten")[0]


def in_half(work: Work, model: onnx.ModelProto, name: str) -> tuple[onnx.ModelProto, Halved]:
    """A model in half precision, its ranges found on what losses are measured on. name: dense, pruned, …"""
    samples = _samples(work)
    columns = [np.concatenate([x.numpy() for x in column]) for column in zip(*samples.inputs, strict=True)]
    kind = "calibration samples" if work.samples.count else "samples of noise"
    return halve(model, feeds_of(model, columns), f"{samples.count} {kind}", f"the {name} network")


def _samples(work: Work) -> Samples:
    worth = round(EFFORT_MACS / max(1, work.macs))
    return work.loss_samples.first(min(MOST_SAMPLES, max(FEWEST_SAMPLES, worth)))


def _detail(passes: Mapping[str, Any]) -> str:
    done = passes["precision"]
    size = done["bytes_after"] / done["bytes_before"]
    return f"{done['nodes']} nodes, {len(done['kept'])} stay float32, {size:.2f}x the bytes"


def told(precision: str, timing: Timing, before: float | None, after: float | None) -> str:
    """A sentence on what a precision alone does to the dense network. before, after: accuracy, None where unknown."""
    bounds = f" ({numbers.bounds((timing.low, timing.high), 'x')})" if math.isfinite(timing.high) else ""
    ratio = f"{numbers.ratio(timing.ratio)}{bounds}"
    text = f"in {precision} the dense network takes {ratio} of its time in fp32 on this device"
    if before is not None and after is not None:
        text += f", and its accuracy goes from {before:.4f} to {after:.4f}"
    if timing.low > 1:
        text += f"; {precision} is slower here, try --set precision=fp32"
    return f"{text}. Latencies are of networks in {precision}; accuracy is counted from fp32."
