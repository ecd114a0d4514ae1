"""How a build ends: what is known of the networks becomes a report, and a bundle if latency and accuracy hold.

A bundle is written only when the accepting measurement met the budget and the project's metric fell by no more than
`accuracy.max_drop`. Otherwise the same files go to `rejected/`, the exit code is 3 (missed) or 4 (undecided), and the
report names the nearest point.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import fx

from pipeline.cache import file_hash, named, write_atomic
from pipeline.latency.operations import Operations
from pipeline.nouns import BUILT, LatencyTable, PruningPlan, Solution
from pipeline.project.project import predict_torch
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune
from pipeline.release.bundle import Contents, Unmeasured, licence_texts, write_bundle
from pipeline.release.manifest import Accuracy, Latency, Sample, latency_of
from pipeline.release.manifest import Agreement as AgreementEntry
from pipeline.release.verify import tensor_specs
from pipeline.report import numbers
from pipeline.report.data import (
    Agreement,
    BlockRow,
    CandidateRow,
    Distribution,
    Figures,
    GroupRow,
    PassRow,
    PointRow,
    RepairRow,
    ReportData,
    RoundRow,
    SiteRow,
    StageRow,
    summary,
)  # fmt: skip
from pipeline.report.document import render
from pipeline.search import Candidate, Found
from pipeline.stage import Outcome
from pipeline.work import AGAIN, DENSE, PRUNED, BuildResult, Work
from profiles.errors import DeployError
from profiles.schema import Precision
from targets.harness.measurement import STATISTICS, Judgement, Measurement, Session, Statistic
from targets.runtimes.base import load_runtime

PLOTTED = 2000
SIMULATED = "Run on the simulated device: no number here is real."
EXIT = {"met": 0, "missed": 3, "accuracy missed": 3, "undecided": 4, BUILT: 4}
STATUS = {"met": "done", BUILT: "built"}
"""What a run is called that ended with a verdict, `missed` if with another."""


@dataclass(frozen=True)
class Ending:
    """Everything that the last steps left. accuracies: None without a metric; then `agreement` stands in for them.

    notes: what should be known of the recovery, a sentence each.
    """

    dense: Outcome
    final: Outcome
    found: Found
    plan: PruningPlan
    model: fx.GraphModule
    session: Session
    judged: Judgement
    accuracy_dense: float | None
    accuracy: float | None
    agreement: Agreement | None
    notes: tuple[str, ...] = ()


def agreement(dense: Sequence[NDArray[Any]], pruned: Sequence[NDArray[Any]], samples: int, on: str) -> Agreement:
    """How far the outputs of two networks agree: the one that does least. on: what the samples were.

    Logits (N, K > 1) as the only output are told by their argmax too.
    """
    r2 = min(_explained(*pair) for pair in zip(dense, pruned, strict=True))
    argmax = constant = None
    if len(dense) == 1 and dense[0].ndim == 2 and dense[0].shape[1] > 1:
        wanted, found = dense[0].argmax(1), pruned[0].argmax(1)
        argmax, constant = float((wanted == found).mean()), float(np.bincount(wanted).max()) / len(wanted)
    return Agreement(r2, argmax, constant, samples, on)


def _explained(dense: NDArray[Any], pruned: NDArray[Any]) -> float:
    """R² of an output. One that is the same for every sample counts as equal where only rounding differs."""
    wide = dense.astype(np.float64)
    spread, size = float(np.square(wide - wide.mean(0)).sum()), float(np.square(wide).sum())
    return 1.0 - float(np.square(wide - pruned).sum()) / max(spread, 1e-6 * size, 1e-12)


def release(work: Work, ending: Ending) -> BuildResult:
    """Judge, report, and write the bundle or the rejected point."""
    judged = ending.judged
    known = ending.accuracy_dense, ending.accuracy, ending.agreement
    verdict, reason = gate(work, judged.verdict, judged.reason, *known)
    folder = work.run.path / ("bundle" if verdict == "met" else "rejected")
    data = _report(work, ending, verdict, reason, folder)
    if verdict != "met":
        data = replace(data, notes=(*data.notes, *_cheapest(work, ending.found)))
    write_bundle(folder, _contents(work, ending, data))
    return close(work, data, folder if verdict == "met" else None)


def gate(
    work: Work, verdict: str, reason: str, dense: float | None, pruned: float | None, agreed: Agreement | None
) -> tuple[str, str]:
    """The verdict on latency, then on accuracy where a metric judges it, with the numbers of both.

    verdict, reason: on latency; dense, pruned: accuracies, None without a metric, when `agreed` is told.
    """
    allowed = work.project.max_drop
    if dense is None or pruned is None:
        told = f"accuracy not judged: {work.project.lacks('evaluate')}"
        if agreed is not None:
            told = f"{told}; outputs agree with the dense network's: {numbers.agreement(agreed)}"
        return verdict, f"{reason}; {told}"
    if verdict in ("met", BUILT) and dense - pruned > allowed + 1e-12:
        verdict = "accuracy missed"
    return verdict, f"{reason}; accuracy {pruned:.4f} against {dense:.4f} dense, allowed drop {allowed:g}"


def nothing_fits(work: Work, dense: Outcome, accuracy_dense: float | None, found: Found, ratio: float) -> BuildResult:
    """No candidate was measured to keep the budget: report the nearest. ratio: against the network that is pruned."""
    nearest = min((c.measured for c in found.tried if c.measured), key=lambda m: m.high, default=None)
    said, budget_ms = "nothing could be measured", 0.0
    if nearest is not None:
        low, high = nearest.ratio * work.slower, nearest.high * work.slower
        said = f"the nearest network is {low:.3f}x (at most {high:.3f}x), budget {ratio * work.slower:.3f}x"
        budget_ms = ratio * nearest.dense_ms
    unit = found.table.dense_ms
    figures = _dense_figures(work, accuracy_dense, unit, None)
    pruned = replace(figures, accuracy=None, measured_ms=nearest.ms if nearest else None)
    data = ReportData(
        network=work.project.references["model.factory"].text, target=work.profile.name, budget=str(work.budget),
        budget_ms=budget_ms, verdict="missed", dense=figures, pruned=pruned,
        reason=said, run=str(work.run.path), percentile=work.budget.percentile, max_drop=work.project.max_drop,
        unjudged=work.project.lacks("evaluate"), loss_name=_loss_name(work),
        seconds=work.run.seconds, rounds=_rounds(found, unit), stages=stages(work),
        notes=(*_said(work), "More rounds may find one: --rounds.", *_cheapest(work, found)),
    )  # fmt: skip
    return close(work, data, None)


def dry(work: Work, table: LatencyTable, solution: Solution, ratio: float) -> BuildResult:
    """What a dry run found, as a summary; there is no report to keep. Its loss is None where it is infinite."""
    groups = {
        g.name: {
            "width": g.size,
            "kept": 0 if g.block in solution.dropped else solution.widths.get(g.id, g.size),
            "frozen": g.frozen,
        }
        for g in work.topology.groups
    }
    told = {
        "bundle": None, "dry_run": True, "run": str(work.run.path), "budget": str(work.budget), "grid": table.grid,
        "groups": groups, "removed_blocks": sorted(solution.dropped), "sites": len(table.sites),
        "table_rows": sum(len(site.ms) + len(site.dropped_ms) for site in table.sites),
        "predicted_ratio": solution.predicted_ms / table.dense_ms, "budget_ratio": ratio,
        "loss": solution.loss if math.isfinite(solution.loss) else None, "gap": solution.gap,
        "seconds": round(work.run.seconds, 1), "notes": list(work.notes),
    }  # fmt: skip
    work.run.finish("done", told)
    return BuildResult(told, None, None, 0)


def close(work: Work, data: ReportData, folder: Path | None) -> BuildResult:
    """Write the report, and end the run with its summary. folder: that of the bundle, where there is one."""
    code = EXIT[data.verdict]
    write_atomic(work.run.path / "report.json", data.to_json().encode() + b"\n")
    write_atomic(work.run.path / "report.html", render(data).encode())
    told = summary(data)
    work.run.finish(STATUS.get(data.verdict, "missed"), told)
    return BuildResult(told, data, folder, code)


# --- the bundle ----------------------------------------------------------------------------------------------------


def _contents(work: Work, ending: Ending, data: ReportData) -> Contents:
    known = ending.accuracy_dense, ending.accuracy, ending.agreement
    return contents(
        work,
        data,
        ending.dense,
        ending.final,
        plan=PruningPlan((*(work.prepared.growth if work.prepared else ()), *ending.plan.edits)),
        weights=load_file(ending.final.path("weights")),
        session=ending.session,
        latency=latency_of(ending.session, work.budget, PRUNED, DENSE),
        accuracy=accuracy_entry(work, data, *known),
        artifacts=_engines(work, ending),
    )


def _engines(work: Work, ending: Ending) -> dict[str, Path]:
    """What was measured where that is no ONNX file: the engines, which the target keeps; file name -> path.

    Raises DeployError where one of them is not there any more, since another build of it was not measured.
    """
    suffix = load_runtime(work.profile.runtime).suffix
    if suffix == ".onnx":
        return {}
    folder = work.run.folder("work")
    made = {"model": (ending.final, PRUNED), "dense": (ending.dense, DENSE)}
    places = {stem: folder / f"{stem}{suffix}" for stem in made}
    work.target.build_each({done.path("onnx"): places[stem] for stem, (done, _) in made.items()})
    for stem, (_, name) in made.items():
        if file_hash(places[stem]) != ending.session.measurement(name).sha256:
            message = f"the engine of '{name}' that was measured is gone, and one that is built now is another."
            raise DeployError(message, "deploy build again, without --resume.")
    return {place.name: place for place in places.values()}


def contents(
    work: Work,
    data: ReportData,
    dense: Outcome,
    final: Outcome,
    *,
    plan: PruningPlan,
    weights: Mapping[str, NDArray[Any]],
    session: Session | Unmeasured,
    latency: Latency | None,
    accuracy: Accuracy,
    artifacts: Mapping[str, Path] | None = None,
) -> Contents:
    """What a bundle holds, its sample run by the work's target. data: what its report says; the rest: as `Contents`."""
    inputs, outputs = _sample(work, final.path("onnx"))
    model = onnx.load_model(str(final.path("onnx")), load_external_data=False)
    return Contents(
        network=data.network,
        target=data.target,
        model=final.path("onnx"),
        dense=dense.path("onnx"),
        plan=plan,
        weights=weights,
        session=session,
        passes={"dense": _untimed(dense["passes"]), "pruned": _untimed(final["passes"])},
        report=render(data.timeless()),
        sample_inputs=inputs,
        sample_outputs=outputs,
        inputs=tensor_specs(model.graph.input),
        outputs=tensor_specs(model.graph.output),
        latency=latency,
        accuracy=accuracy,
        versions=work.run.versions,
        sources={"project": work.project.digest()},
        chain=work.run.chain(),
        artifacts=artifacts or {},
        precision=_precision(final["passes"]),
        sample=_reproduced(final["passes"], outputs),
        licences=licence_texts(work.project.folder),
    )


def _precision(log: Mapping[str, Any]) -> Precision:
    """What the shipped network computes in: half where any node of it does."""
    return "fp16" if log.get("precision", {}).get("nodes") else "fp32"


def _reproduced(log: Mapping[str, Any], outputs: Mapping[str, NDArray[Any]]) -> Sample:
    """How closely another runtime must give the sample's outputs: in half precision as closely as rounding allows."""
    if "precision" not in log:
        return Sample()
    largest = max((float(np.max(np.abs(output), initial=0.0)) for output in outputs.values()), default=0.0)
    return Sample(atol=log["precision"]["allowed"] * largest)


def accuracy_entry(
    work: Work, data: ReportData, dense: float | None, pruned: float | None, agreed: Agreement | None
) -> Accuracy:
    """What the manifest tells of the accuracy."""
    return Accuracy(
        metric=data.metric,
        dense=dense,
        pruned=pruned,
        max_drop=work.project.max_drop,
        unjudged=data.unjudged,
        agreement=AgreementEntry(**asdict(agreed)) if agreed else None,
    )


def _sample(work: Work, model: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """One calibration input, or noise, and what the artifact gives for it."""
    spec = work.project.inputs
    batch = [x[: s.shape[0]].numpy() for x, s in zip(work.loss_samples.inputs[0], spec, strict=True)]
    with named({PRUNED: model}), work.run.share("build") as progress:
        artifact = work.target.build(model, work.scratch("sample.artifact"), progress)
    outputs = work.target.infer(artifact, batch)
    names = [value.name for value in onnx.load_model(str(model), load_external_data=False).graph.output]
    return {s.name: x for s, x in zip(spec, batch, strict=True)}, dict(zip(names, outputs, strict=True))


def _untimed(log: Mapping[str, Any]) -> dict[str, Any]:
    """A pass log without its seconds: a resumed run has to give the same bundle."""
    return {**log, "steps": [{key: value for key, value in step.items() if key != "seconds"} for step in log["steps"]]}


# --- the report ----------------------------------------------------------------------------------------------------


def _report(work: Work, ending: Ending, verdict: str, reason: str, folder: Path) -> ReportData:
    session, budget = ending.session, work.budget
    ratio = session.ratio(PRUNED, DENSE, budget.percentile)
    control = session.ratio(AGAIN, DENSE, "p50")
    dense_ms, pruned_ms = (_at(session.measurement(name), budget.percentile) for name in (DENSE, PRUNED))
    limit = latency_of(session, budget, PRUNED, DENSE).budget_ms
    unit = ending.found.table.dense_ms
    chosen = ending.found.chosen
    return ReportData(
        network=work.project.references["model.factory"].text,
        target=work.profile.name,
        budget=str(budget),
        budget_ms=limit,
        verdict=verdict,
        dense=_dense_figures(work, ending.accuracy_dense, unit, dense_ms),
        pruned=Figures(
            ending.accuracy,
            _parameters(ending.model),
            work.operations.macs(ending.plan.widths(work.topology.groups), ending.plan.dropped),
            _predicted(work, ending, unit, dense_ms[0]),
            *pruned_ms,
        ),
        reason=reason,
        run=str(work.run.path),
        bundle=str(folder),
        percentile=budget.percentile,
        max_drop=work.project.max_drop,
        unjudged=work.project.lacks("evaluate"),
        agreement=ending.agreement,
        loss_name=_loss_name(work),
        ratio=ratio.center,
        ratio_interval=(ratio.low, ratio.high),
        process_ratios=session.process_ratios(PRUNED, DENSE, budget.percentile),
        seconds=work.run.seconds,
        groups=_groups(work, ending.plan),
        blocks=tuple(BlockRow(b.id, b.id in ending.plan.dropped, b.frozen) for b in work.topology.blocks),
        leaves=work.topology.leaves,
        sites=_sites(work, ending, chosen),
        rounds=_rounds(ending.found, unit),
        points=_points(ending, dense_ms[0], work.slower),
        distributions=tuple(_distribution(m) for m in session.measurements.values()),
        repairs=_repairs(work),
        passes=passes(ending.final["passes"]),
        candidates=_candidates(ending.final["passes"]),
        stages=stages(work),
        conditions=_conditions(session)
        | {"dense against itself": f"{control.center:.4f}x ({control.low:.4f} to {control.high:.4f})"},
        versions=work.run.versions,
        settings=_settings(work),
        notes=(
            *_said(work),
            *ending.notes,
            *_hashed(ending.final["passes"]),
            *((SIMULATED,) if session.simulated else ()),
        ),
    )


def _at(measured: Measurement, percentile: Statistic) -> tuple[float | None, tuple[float, float] | None]:
    value = measured.statistic(percentile)
    return value.value_ms, (value.low_ms, value.high_ms)


def _parameters(model: fx.GraphModule) -> int:
    return sum(value.numel() for value in model.parameters())


def _loss_name(work: Work) -> str:
    return "calibration loss" if work.samples.count else "loss on noise"


def _dense_figures(
    work: Work, accuracy: float | None, unit: float, measured: tuple[float | None, tuple[float, float] | None] | None
) -> Figures:
    value, interval = measured or (None, None)
    macs = Operations(work.given.topology).macs()
    return Figures(accuracy, _parameters(work.given.graph), macs, value or unit, value, interval)


def _predicted(work: Work, ending: Ending, unit: float, dense_ms: float | None) -> float | None:
    chosen = ending.found.chosen
    if chosen is None or dense_ms is None:
        return None
    return ending.found.table.predict(chosen.widths, chosen.dropped).ms / unit * dense_ms * work.slower


def _groups(work: Work, plan: PruningPlan) -> tuple[GroupRow, ...]:
    kept = plan.widths(work.topology.groups)
    rows = []
    for group in work.topology.groups:
        dropped = group.block in plan.dropped
        stage = group.name.split(".")[0]
        rows.append(GroupRow(group.name, group.size, 0 if dropped else kept[group.id], stage, group.frozen, dropped))
    return tuple(rows)


def _sites(work: Work, ending: Ending, chosen: Candidate | None) -> tuple[SiteRow, ...]:
    if chosen is None:
        return ()
    sizes = {group.id: group.size for group in work.topology.groups}
    widths = {**sizes, **chosen.widths}
    rows = []
    for cost in ending.found.table.sites:
        dense_key, key = (tuple(dim.size(w) for dim in cost.site.dims) for w in (sizes, widths))
        gone = cost.site.block is not None and cost.site.block in chosen.dropped
        after = cost.dropped_ms.get(key, 0.0) if gone else cost.ms[key]
        rows.append(SiteRow(cost.site.id, cost.site.kind, cost.ms[dense_key], after))
    return tuple(rows)


def _rounds(found: Found, unit: float) -> tuple[RoundRow, ...]:
    rows = []
    for turn in found.rounds:
        for c in turn.candidates:
            if c.measured is not None:
                dense_ms = c.measured.dense_ms
                bounds = (c.measured.low * dense_ms, c.measured.high * dense_ms)
                predicted = c.predicted_ratio * dense_ms
                spread_ms, ms = predicted * turn.spread, c.measured.ms
                row = RoundRow(turn.number, predicted, spread_ms, ms, bounds, turn.correction, c.loss, turn.said)
                rows.append(row)
    return tuple(rows)


def _points(ending: Ending, dense_ms: float | None, slower: float) -> tuple[PointRow, ...]:
    """What was measured, and of the rest what nothing beats in both latency and loss. slower: `Work.slower`."""
    if dense_ms is None:
        return ()
    rows = [PointRow("dense", dense_ms, ending.accuracy_dense, 0.0)]
    front = _front(ending.found)
    for number, c in enumerate(ending.found.tried, start=1):
        shipped = ending.found.chosen is not None and c.plan == ending.found.chosen.plan
        if not (shipped or c.measured or c in front):
            continue
        accuracy = ending.accuracy if shipped else None
        rows.append(PointRow(f"plan {number}", c.ratio * slower * dense_ms, accuracy, c.loss, shipped))
    return tuple(rows)


def _distribution(measured: Measurement) -> Distribution:
    values = {name: measured.statistic(name) for name in STATISTICS}
    pooled = measured.pooled_ns
    thinned = pooled[:: max(1, -(-pooled.size // PLOTTED))] / 1e6
    return Distribution(
        measured.name,
        {name: value.value_ms for name, value in values.items()},
        {name: value.high_ms if math.isfinite(value.high_ms) else None for name, value in values.items()},
        tuple(float(v) for v in thinned),
        int(pooled.size),
    )


def _repairs(work: Work) -> tuple[RepairRow, ...]:
    chosen = work.profile.prune.repair
    return tuple(
        RepairRow(name, math.inf if row["loss"] is None else row["loss"], row["accuracy"], chosen=name == chosen)
        for name, row in work.repairs.items()
    )


def passes(log: Mapping[str, Any]) -> tuple[PassRow, ...]:
    """What each pass of a log changed and refused."""
    rows = []
    for name in log["passes"]:
        steps = [step for step in log["steps"] if step["name"] == name]
        refused = {f"{r['node']}: {r['reason']}" for step in steps for r in step["refused"]}
        rows.append(PassRow(name, sum(step["changed"] for step in steps), tuple(sorted(refused))))
    if "precision" in log:
        done = log["precision"]
        kept = tuple(f"{row['node']}: {row['reason']}" for row in done["kept"])
        rows.append(PassRow(f"{done['precision']} (precision)", done["nodes"], kept))
    asked = log.get("candidates", {"refused": {}, "tried": ()})
    for name, reasons in asked["refused"].items():
        edits = [edit for each in asked["tried"] if each["taken"] for edit in each["edits"]]
        refused = {f"{r['node']}: {r['reason']}" for r in reasons}
        rows.append(PassRow(f"{name} (candidate)", sum(edit[0] == name for edit in edits), tuple(sorted(refused))))
    return tuple(rows)


def _candidates(log: Mapping[str, Any]) -> tuple[CandidateRow, ...]:
    rows = []
    for each in log.get("candidates", {}).get("tried", ()):
        names, nodes = (", ".join(dict.fromkeys(part)) for part in zip(*each["edits"], strict=True))
        bounds = (each["low"], math.inf if each["high"] is None else each["high"])
        times = each["before_ms"], each["after_ms"], each["ratio"]
        rows.append(CandidateRow(names, nodes, *times, bounds, each["taken"]))
    return tuple(rows)


def _hashed(log: Mapping[str, Any]) -> tuple[str, ...]:
    asked = log.get("candidates", {"hash_error": 0.0, "tried": ()})
    nodes = ", ".join(node for each in asked["tried"] if each["taken"] for _, node in each["edits"])
    if not nodes or not asked["hash_error"]:
        return ()
    told = f"the weights of {nodes} were hashed for the rewrite, with a relative error of up to"
    return (f"{told} {asked['hash_error']:g}; pruned.safetensors has them as they were.",)


def _said(work: Work) -> tuple[str, ...]:
    return (*work.notes, *work.precision)


def stages(work: Work) -> tuple[StageRow, ...]:
    """What the run has done so far."""
    return tuple(StageRow(name, row["seconds"], row["detail"]) for name, row in work.run.stages.items())


def _conditions(session: Session) -> dict[str, str]:
    told = {
        name: str(value) for name, value in session.fingerprint.to_table().items() if not isinstance(value, dict | list)
    }
    spoilt = "; ".join(f"{c.name} is {c.value}" for c in session.preflight.spoilt)
    return told | {
        "protocol": session.protocol,
        "measured": f"{session.started} to {session.ended}",
        "before measuring": spoilt or "nothing stood out",
    }


def _settings(work: Work) -> dict[str, str]:
    spec = work.profile.prune
    return {
        "criterion": spec.criterion, "solver": spec.solver, "repair": spec.repair,
        "precision": work.profile.precision, "calibration samples": str(work.samples.count or "none"),
        "recovery epochs": str(work.profile.recover.epochs), "seed": str(spec.seed),
    }  # fmt: skip


def _cheapest(work: Work, found: Found) -> tuple[str, ...]:
    """The cheapest tried point that keeps the accuracy after repair alone, judged on `validate`.

    Of the points that no cheaper one beats in loss; found by halving, since every look costs a repair.
    """
    if not work.project.validates:
        return ("Without data.validate no cheaper point can be judged; try a larger budget.",)
    wanted = float(work.project.validate(predict_torch(work.given.graph)) or 0.0) - work.project.max_drop

    def keeps(point: Candidate) -> bool:
        pruned = prune(work.network, point.plan)
        mode = work.profile.prune.repair
        fixed = repair(pruned, work.network, point.plan, work.samples, mode, rankings=work.rankings)
        return float(work.project.validate(predict_torch(fixed)) or 0.0) >= wanted

    kept = "keeps the accuracy on `validate` after repair alone"
    front = _front(found)
    first = bisect_left(front, True, key=keeps)
    if first == len(front):
        return (f"No point tried {kept}; try a larger budget or more recovery.",)
    return (f"The cheapest point tried that {kept}: --budget {front[first].ratio * work.slower:.3g}x.",)


def _front(found: Found) -> list[Candidate]:
    """The points that lose less than every cheaper one, the cheapest first."""
    front: list[Candidate] = []
    for candidate in sorted(found.tried, key=lambda c: c.ratio):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front
