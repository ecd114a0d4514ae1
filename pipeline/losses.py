"""What plans lose: measured on calibration samples after their repair, or after a few steps of recovery.

Losses are kept by plan: a later build of the same network asks none of them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

from pipeline.nouns import LatencyTable, PruningPlan, Sensitivity
from pipeline.prune.evidence import Samples, divergence, first
from pipeline.prune.repair import repair
from pipeline.prune.sensitivity import LossProbe, Probe, RepairProbe, measure, to_fit
from pipeline.prune.sensitivity import affordable as probe_limit
from pipeline.prune.surgery import prune
from pipeline.recover.train import RecoverData, recover
from pipeline.stage import Stage, run_or_reuse
from pipeline.work import TOOLS, Work

VALUE_SAMPLES, FEWEST_SAMPLES = 384, 48
EFFORT_MACS = 384 * 126e6
"""Multiply-accumulates of trying one plan, ResNet-56's, up to which a search may try as many as it likes; four times
as many are the most that a plan should take."""
SHORT_STEPS = 16
"""Training steps of the short recovery that some solvers judge a choice by (NetAdapt's idea)."""
Probing = Callable[[], Probe]


def probe(work: Work) -> Probing:
    """What measures losses, on as many samples as it can hold; made when first asked for."""

    def make() -> Probe:
        samples, mode = work.loss_samples.first(samples_taken(work)), work.profile.prune.repair
        if mode == "least-squares":
            return LossProbe(work.network, samples)
        fitted = work.samples.first(to_fit(samples_taken(work)))  # noise tells losses, and repairs nothing
        return RepairProbe(work.network, samples, fitted, mode, work.rankings)

    return cache(make)


def depends_on(work: Work) -> dict[str, Any]:
    """What a measured loss depends on beside the plan: the key's parameters."""
    mode = work.profile.prune.repair
    twins = {id: ranking.to_table() for id, ranking in work.rankings.items()} if mode == "merge" else {}
    return {"samples": samples_taken(work), "repair": mode, "twins": twins}


def samples_taken(work: Work) -> int:
    """Samples that losses are measured on: fewer where one costs much, but not too few to tell plans apart."""
    worth = max(FEWEST_SAMPLES, round(4 * EFFORT_MACS / max(1, work.macs)))
    return min(VALUE_SAMPLES, worth, probe_limit(work.network), work.loss_samples.count)


def values(work: Work, probe: Probing, table: LatencyTable) -> Sensitivity:
    """What single cuts lose after local repair."""
    spec = work.profile.prune

    def make(_: Path) -> dict[str, Any]:
        with work.run.share("values") as advance:
            found = measure(probe(), work.rankings, table.choices, widths=spec.value_widths, progress=advance)
            return found.to_table()

    params = {"widths": spec.value_widths, "choices": table.choices, **depends_on(work)}
    order = {id: ranking.removal_order for id, ranking in work.rankings.items()}
    done = work.run.stage(
        Stage("values"), params, {"project": work.source, "rankings": order}, make, tools=TOOLS,
        detail=lambda d: f"{sum(len(c) - 1 for c in d['groups'].values())} widths, {len(d['blocks'])} blocks",
    )  # fmt: skip
    return Sensitivity.from_table(done.values)


def remembered(work: Work, name: str, params: Mapping[str, Any], plan: PruningPlan, find: Callable[[], float]) -> float:
    """A loss of a plan, known from this run or an earlier one, else found now. May be infinite."""

    def make(_: Path) -> dict[str, Any]:
        loss = find()
        return {"loss": loss if math.isfinite(loss) else None}

    def found() -> float | None:
        inputs = {"project": work.source, "plan": plan.to_json()}
        loss: float | None = run_or_reuse(work.run.cache, Stage(name), params, inputs, make, tools=TOOLS)["loss"]
        return loss

    loss = work.run.journalled(name, plan.to_json(), found)
    return math.inf if loss is None else float(loss)


def after_recovery(work: Work, probe: Probing, plan: PruningPlan) -> float:
    """Loss of a plan after repair and a few steps of recovery; after repair alone without training data."""
    train, few = work.project.train, samples_taken(work)
    if train is None:
        return probe().loss(plan)
    mode = work.profile.prune.repair
    pruned = prune(work.network, plan)
    fixed = repair(pruned, work.network, plan, work.samples.first(few), mode, rankings=work.rankings)
    data = RecoverData(lambda epoch, seed: islice(train(epoch, seed), SHORT_STEPS), work.project.loss, None)
    spec = work.profile.recover.model_copy(update={"epochs": 1, "hooks": ()})
    file = work.scratch("short.checkpoint")
    file.unlink(missing_ok=True)
    done = recover(fixed, work.given.graph, data, spec, file)
    return mean_divergence(work, cast(fx.GraphModule, done.module), work.loss_samples.first(few))


def mean_divergence(work: Work, model: fx.GraphModule, samples: Samples) -> float:
    """Mean over samples of the divergence of a model's first output from the dense network's."""
    total = 0.0
    with torch.inference_mode():
        for batch in samples.inputs:
            outputs, dense = model(*batch), work.network.graph(*batch)
            total += float(divergence(first(outputs), first(dense)).sum())
    return total / samples.count
