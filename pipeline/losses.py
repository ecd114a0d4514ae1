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

from torch import fx

from pipeline.nouns import LatencyTable, PruningPlan, Sensitivity
from pipeline.prune.sensitivity import LossProbe, Probe, RepairProbe, measure, to_fit
from pipeline.prune.sensitivity import affordable as probe_limit
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
        if work.profile.prune.repair == "least-squares":
            return LossProbe(work.network, work.loss_samples.first(samples_taken(work)))
        return repairs(work)

    return cache(make)


def repairs(work: Work) -> RepairProbe:
    """What repairs plans as asked on a part of the samples, and judges them on the rest."""
    few, mode = samples_taken(work), work.profile.prune.repair
    fitted = work.samples.first(to_fit(few))  # noise tells losses, and repairs nothing
    return RepairProbe(work.network, work.loss_samples.first(few), fitted, mode, work.rankings)


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
        Stage("values"), params, {**work.sampled, "rankings": order}, make, tools=TOOLS,
        detail=lambda d: f"{sum(len(c) - 1 for c in d['groups'].values())} widths, {len(d['blocks'])} blocks",
    )  # fmt: skip
    return Sensitivity.from_table(done.values)


def remembered(
    work: Work,
    name: str,
    params: Mapping[str, Any],
    plan: PruningPlan,
    find: Callable[[], float],
    *,
    trained: bool = False,
) -> float:
    """A loss of a plan, known from this run or an earlier one, else found now. May be infinite.

    trained: it depends on the project's training data too, and earlier runs are believed where these are known.
    """

    def make(_: Path) -> dict[str, Any]:
        loss = find()
        return {"loss": loss if math.isfinite(loss) else None}

    stage = work.by_data(name) if trained else Stage(name)
    inputs = {**(work.taught if trained else {}), **work.sampled, "plan": plan.to_json()}

    def found() -> float | None:
        if stage.always:  # the journal below has what this run knows
            return cast(float | None, make(Path())["loss"])
        loss: float | None = run_or_reuse(work.run.cache, stage, params, inputs, make, tools=TOOLS)["loss"]
        return loss

    loss = work.run.journalled(name, {"inputs": inputs, "params": params}, found)
    return math.inf if loss is None else float(loss)


def after_recovery(work: Work, probe: Probing) -> Callable[[PruningPlan], float]:
    """Measures losses after repair and a few steps of recovery; after repair alone without training data.

    As everywhere, the samples that judge are none that a repair learnt from, and what plans share is made once.
    """
    train = work.project.train
    if train is None:
        return lambda plan: probe().loss(plan)
    data = RecoverData(lambda epoch, seed: islice(train(epoch, seed), SHORT_STEPS), work.project.loss, None)
    spec = work.profile.recover.model_copy(update={"epochs": 1, "hooks": ()})
    file = work.scratch("short.checkpoint")

    @cache
    def judge() -> RepairProbe:
        return repairs(work) if work.profile.prune.repair == "least-squares" else cast(RepairProbe, probe())

    def loss(plan: PruningPlan) -> float:
        file.unlink(missing_ok=True)
        done = recover(judge().repaired(plan), work.given.graph, data, spec, file, again=False)
        return judge().judged(cast(fx.GraphModule, done.module))

    return loss
