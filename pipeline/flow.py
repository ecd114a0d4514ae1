"""The whole pipeline on one page, read from top to bottom: a trained network becomes a bundle that keeps its budget.

    capture → dense ONNX → (grow, train) → rankings → table → values → search (choose, narrow, measure, correct)
            → accept the plan → repair → recover → export → candidates → measure → gate → bundle

Each step is a stage with a key; what is measured is journalled, so a run that was killed ends with the same bundle.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx
from safetensors.torch import load_file, save
from torch import fx

from pipeline import demands, losses, ondevice, outcome, precision, prepare, unmeasured
from pipeline.graph.export import export
from pipeline.graph.narrow import narrow
from pipeline.graph.optimize import PassLog, optimize
from pipeline.graph.rewriting import Timing, choose
from pipeline.graph.rows import Rows
from pipeline.graph.verify import check_model, compare_outputs, seeded_inputs
from pipeline.latency.feedback import Seen, corrected, recalibrate, remember, remember_corrected, residuals
from pipeline.latency.solvers.base import Solver
from pipeline.latency.tabulate import tabulate
from pipeline.latency.timing import Tally
from pipeline.nouns import KeepUnits, LatencyTable, PruningPlan, Ranking, Sensitivity
from pipeline.prepare import hashes, state
from pipeline.project import load_project, predict_torch
from pipeline.prune.evidence import Evidence, mean_divergence, outputs_of, require_scores
from pipeline.prune.hashing import adaptive
from pipeline.prune.plan import make_plan, resolve
from pipeline.prune.ranking import RANK_SAMPLES, rank
from pipeline.prune.repair import NEED_INPUTS, repair
from pipeline.prune.repair import affordable as repair_limit
from pipeline.prune.surgery import prune, restore
from pipeline.prune.taps import DenseTaps
from pipeline.recover.train import recover
from pipeline.run import BuildRequest, Run
from pipeline.search import Candidate, Found, Loop, Search
from pipeline.stage import Outcome, Stage
from pipeline.work import DENSE, PRUNED, PRUNED_AGAIN, TOOLS, BuildResult, Work, captured, merged
from profiles import plugins
from profiles.errors import DeployError, MissedError
from profiles.schema import Budget, RecoverSpec, load_profile
from targets.base import Target, load_target
from targets.harness.measurement import Judgement, Session
from targets.runtimes.base import load_runtime

REPORTED = ("none", "bn", "least-squares")
OWN_GAP = 1e-3
MOST_OFFERS = 6
"""Rewritten networks that are measured in one session, beside the network without."""
ATTEMPTS, STEP_BACK = 3, 0.985
"""Where the accepting protocol does not find the budget kept, the search goes on with a tighter one, so often."""
RUINED = "the loss of this plan is infinite: the network overflows after some of its cuts."
log = logging.getLogger(__name__)


def build(request: BuildRequest) -> BuildResult:
    """Run the pipeline.

    Raises DeployError for what the user can mend; a missed budget or accuracy is a result, not an error.
    """
    project = load_project(request.project)
    profile, notes = demands.kept(project, load_profile(request.target, merged(project.overrides, request.overrides)))
    budget = Budget.parse(request.budget) if request.budget else profile.budget
    target = load_target(profile, request.root / ".deploy")
    timed = target.latency().ok
    if timed and budget is None:
        raise DeployError(f"there is no budget: profile '{profile.name}' has none.", "--budget 0.5x, or --budget 8ms.")
    if request.dry_run:
        target.require_latency()
    elif timed:
        _require_outputs(target)
    else:
        target.fingerprint()  # what builds the engine is there, or that is said before any work
        notes = unmeasured.notes(target)
    model = project.model()
    samples = demands.samples(project, profile.prune)
    run = Run.resume(request.root, request.out, console=request.console) if request.resume else None
    run = run or Run.create(request.root, profile, out=request.out, request=request)
    with run, target.resumable(run.id):
        for note in notes:
            _say(run, f"note: {note}")
        begun = run.seconds
        found = captured(project, model, profile.prune)
        network = found.network
        offered = f"{len(network.topology.offered)} groups, {len(network.topology.removable)} blocks proved"
        run.finished("capture", run.seconds - begun, offered)
        for note in found.notes if timed else ():
            _say(run, f"note: {note}")
        if request.dry_run and profile.prepare.epochs:
            _say(run, "note: a dry run trains nothing: this is the plan for the network as it was given.")
        if timed:
            require_scores(network)
            demands.rehearse(project, profile, network, samples, trains=not request.dry_run)
        samples = samples.first(repair_limit(network))
        notes = (*notes, *(found.notes if timed else ()))
        work = Work(run, profile, budget or Budget(), target, project, network, samples, notes)
        if not timed:
            return _only_built(work)
        return _dry(work) if request.dry_run else _release(work)


def _require_outputs(target: Target) -> None:
    """Raise DeployError where outputs cannot be read on the device: the accuracy could not be judged in the end."""
    seen = target.outputs()
    if not seen.ok:
        raise DeployError(f"nothing can be built for '{target.profile.name}': its {seen.name} {seen.value}.", seen.mend)


def _say(run: Run, text: str) -> None:
    """One line on the console and in the run's log."""
    log.info(text)
    run.console.print(text, markup=False, highlight=False, soft_wrap=True)


# --- the steps, in order -------------------------------------------------------------------------------------------


def _release(work: Work) -> BuildResult:
    """Every step, to the bundle."""
    exact = _dense(work)
    dense = precision.lowered(work, exact, "dense")
    accuracy_dense = ondevice.accuracy(work, exact.path("onnx"), "dense")
    _compare_precisions(work, exact, dense, accuracy_dense)
    budget = ondevice.relative_budget(work, dense)
    work, base = _prepared(work, dense, budget)
    return _within(work, exact, dense, base, budget / work.slower, accuracy_dense)


def _within(
    work: Work, exact: Outcome, dense: Outcome, base: Outcome, ratio: float, accuracy_dense: float | None
) -> BuildResult:
    """Plans in turn, each for a tighter budget than the last, until the accepting protocol finds it kept.

    ratio: the budget, relative to the network that is pruned. Where no plan is found to keep it, the last one that was
    carried out is reported, or the last one is carried out for that.
    """
    _rank(work)
    table = _table(work, base)
    probe = losses.probe(work)
    values = losses.values(work, probe, table)
    known, found, ending = ondevice.known_candidates(work, base), None, None
    for attempt in range(ATTEMPTS):
        try:
            now = _search(work, base, probe, table, values, ratio * STEP_BACK**attempt, known)
        except MissedError:
            if found is None:
                raise
            break
        if now.chosen is None:
            if found is None:
                return outcome.nothing_fits(work, dense, accuracy_dense, now, ratio)
            break
        found = now
        told = None if attempt == ATTEMPTS - 1 else _accept_plan(work, dense, base, now.chosen, ratio)
        if told is None or _settled(*told):
            ending = _finish(work, exact, dense, found, accuracy_dense)
            told = ending.session, ending.judged
            if _settled(*told):
                break
        table, known = found.table, _learnt(work, base, [*known, *found.seen], now.chosen, told, ratio)
    if ending is None:
        assert found is not None
        ending = _finish(work, exact, dense, found, accuracy_dense)
    return outcome.release(work, ending)


def _trains(work: Work) -> bool:
    return work.project.train is not None and work.profile.recover.epochs > 0


def _accept_plan(
    work: Work, dense: Outcome, base: Outcome, chosen: Candidate, ratio: float
) -> tuple[Session, Judgement] | None:
    """What the accepting protocol says of a plan before a recovery, whose hours a missed budget would waste.

    Latency hangs on widths, hardly on what is learnt. None where nothing is trained, where rewrites that are yet to
    come may make the network faster, or where the short measurements of the search leave no doubt: their upper bound
    is within a budget that is judged by the same ratio.
    """
    if not _trains(work) or work.profile.graph.candidates:
        return None
    budget = work.budget
    same = budget.ratio is not None and ondevice.short_statistic(budget) == budget.percentile and work.slower == 1.0
    if same and chosen.measured is not None and chosen.measured.high <= ratio:
        return None
    return ondevice.accept_plan(work, dense, base, chosen.plan)


def _learnt(
    work: Work,
    base: Outcome,
    known: Sequence[Seen],
    chosen: Candidate,
    told: tuple[Session, Judgement],
    ratio: float,
) -> list[Seen]:
    """What is known of candidates, the chosen one by what the accepting protocol told, kept for later builds too.

    An absolute budget is a share of the dense latency of one moment: a plan that takes longer than the limit is beyond
    that share, whatever the dense network takes now. Rewrites make another network of a plan: nothing is learnt of it.
    """
    if work.profile.graph.candidates:
        return list(known)
    session, judged = told
    if work.budget.ratio is None:
        return corrected(known, (chosen.widths, chosen.dropped, ratio * judged.value / judged.limit))
    now = session.ratio(PRUNED, DENSE, ondevice.short_statistic(work.budget)).center / work.slower
    seen = chosen.widths, chosen.dropped, now
    with ondevice.latency_store(work) as store:
        remember_corrected(store, *ondevice.identity(work, base), seen)
    return corrected(known, seen)


def _settled(session: Session, judged: Judgement) -> bool:
    """Whether a tighter plan would change nothing: the budget is kept, or the session cannot say whether it is."""
    return judged.verdict == "met" or session.contaminated or not math.isfinite(judged.value + judged.high)


def _prepared(work: Work, dense: Outcome, budget: float) -> tuple[Work, Outcome]:
    """The network that is pruned, grown and trained where that was asked for, and its ONNX in the build's precision."""
    if not work.profile.prepare.epochs:
        return work, dense
    grown = prepare.Grown(work.network)
    if work.profile.prepare.grow:
        first = replace(work, rankings={})
        _rank(first)
        table = _table(first, dense)
        values, begun = losses.values(first, losses.probe(first), table), work.run.seconds
        timings = partial(ondevice.timings, work, dense)
        grown = prepare.grow(work, table, values, budget, timings)
        work.run.finished("grow", work.run.seconds - begun, f"in {len(grown.growth)} places, to {grown.slower:.3f}x")
    told = len(work.notes)
    work = prepare.trained(work, grown)
    for note in work.notes[told:]:
        _say(work.run, f"note: {note}")
    return work, precision.lowered(work, _dense(work, "prepared"), "prepared")


def _finish(work: Work, exact: Outcome, dense: Outcome, found: Found, accuracy_dense: float | None) -> outcome.Ending:
    """The chosen plan carried out: repaired, recovered, exported, judged.

    Latency is judged against the dense network in the same precision, accuracy against the user's own, in float32.
    """
    assert found.chosen is not None
    plan = found.chosen.plan
    recovered, notes = _recover(work, plan, _repair(work, plan))
    final = precision.lowered(work, _candidates(work, _export(work, plan, recovered)), "pruned")
    accuracy = ondevice.accuracy(work, final.path("onnx"), "pruned")
    agreement = ondevice.agreement(work, exact, final)
    session, judged = ondevice.accept(work, dense, final.path("onnx"))
    return outcome.Ending(
        dense, final, found, plan, recovered, session, judged, accuracy_dense, accuracy, agreement, notes
    )


def _only_built(work: Work) -> BuildResult:
    """The steps that need no measuring, for a device that is not here: the network as it is, and its engine."""
    exact = _dense(work)
    final = precision.lowered(work, exact, "dense")
    engine = _engine(work, final)
    here = replace(work, target=load_target(load_profile("local"), work.target.state))
    dense = ondevice.accuracy(here, exact.path("onnx"), "dense")
    built = dense if final is exact else ondevice.accuracy(here, final.path("onnx"), f"dense {work.profile.precision}")
    agreement = ondevice.agreement(here, exact, final)
    suffix = load_runtime(work.profile.runtime).suffix
    made = unmeasured.Engine(exact, final, engine.path("engine"), suffix, dense, built, agreement)
    return unmeasured.release(here, work.target, made)


def _engine(work: Work, final: Outcome) -> Outcome:
    """What the device's runtime builds of a network, opened nowhere."""

    def make(folder: Path) -> dict[str, Any]:
        return {"engine": ondevice.build_artifacts(work, {DENSE: final.path("onnx")}, folder)[DENSE]}

    return work.run.stage(
        Stage("engine"), {}, {"model": final.files["onnx"]}, make,
        fingerprint=work.target.fingerprint().digest(), detail=lambda done: _size(done.path("engine")),
    )  # fmt: skip


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.2f} MB"


def _dry(work: Work) -> BuildResult:
    """Groups, table and solved plan; nothing is trained."""
    dense = precision.lowered(work, _dense(work), "dense")
    _rank(work)
    table = _table(work, dense)
    values = losses.values(work, losses.probe(work), table)
    ratio = ondevice.relative_budget(work, dense)
    table = recalibrate(table, residuals(table, ondevice.known_candidates(work, dense)), ratio)
    budget_ms, spec = ratio * table.dense_ms, work.profile.prune
    solution = _solver(work).solve(list(work.rankings.values()), values, table, work.topology, budget_ms, spec, None)
    if math.isinf(solution.loss):
        work = replace(work, notes=(*work.notes, RUINED))
        _say(work.run, f"note: {RUINED}")
    return outcome.dry(work, table, solution, ratio)


def _dense(work: Work, name: str = "dense") -> Outcome:
    """The network before any cut as ONNX, optimised, in float32. name: `dense`, or `prepared` once it is that."""

    def make(folder: Path) -> dict[str, Any]:
        raw = export(work.network.graph, work.project.inputs, folder / "raw.onnx", work.profile.graph.opset)
        log = optimize(raw, work.profile.graph.passes, folder / "dense.onnx")
        _check_own(work, onnx.load_model(str(folder / "dense.onnx")))
        return {"onnx": folder / "dense.onnx", "passes": json.loads(log.to_json())}

    return work.run.stage(Stage(name), _written(work), {"project": work.source}, make, tools=TOOLS, detail=_nodes)


def _check_own(work: Work, dense: onnx.ModelProto) -> None:
    """With operators of the user's own: narrowing the file has to do what cutting the network does.

    Raises DeployError where it does not: such an operator counts its channels where nothing can rewrite the number.
    """
    if not work.network.rules:
        return
    plan = PruningPlan(tuple(KeepUnits(g.id, tuple(range((g.size + 1) // 2))) for g in work.topology.offered))
    try:
        narrowed = narrow(dense, resolve(work.topology, plan))
        gap = compare_outputs(predict_torch(prune(work.network, plan)), narrowed, seeded_inputs(narrowed)).max_rel
        why = f"it differs from the cut network by {gap:.2g} of its largest output" if gap > OWN_GAP else ""
    except DeployError as error:
        why = error.message.rstrip(".")
    if why:
        message = f"the ONNX file cannot be cut through {' and '.join(map(repr, work.network.rules))}: {why}."
        raise DeployError(message, "let its forward count channels by its parameters or by -1, or drop its rule.")


def _written(work: Work) -> dict[str, Any]:
    """What an exported file depends on of the profile; candidates come later."""
    return work.profile.graph.model_dump(exclude={"candidates", "hash_error"})


def _nodes(done: Outcome) -> str:
    log = done["passes"]
    return f"{log['nodes_before']} nodes, {log['nodes_after']} after passes"


def _compare_precisions(work: Work, exact: Outcome, dense: Outcome, accuracy: float | None) -> None:
    """Measure what the precision alone does to the dense network on the device, and say it."""
    if dense is exact:
        return
    begun, name = work.run.seconds, work.profile.precision
    files = {"fp32": exact.path("onnx"), "fp32-again": exact.path("onnx"), name: dense.path("onnx")}
    timing = ondevice.timing(ondevice.measure(work, "precision", files, "rank"), name, "fp32", "fp32-again")
    rounded = ondevice.accuracy(work, dense.path("onnx"), f"dense {name}")
    work.precision.append(precision.told(name, timing, accuracy, rounded))
    work.run.finished("precision", work.run.seconds - begun, f"{timing.ratio:.3f}x of the time in fp32")


def _rank(work: Work) -> None:
    """The order in which the units of each group go."""
    spec = work.profile.prune

    def make(_: Path) -> dict[str, Any]:
        loss = work.project.loss if work.samples.targets is not None else None
        found = rank(Evidence(work.network, work.samples.first(few), loss, spec.seed), spec.criterion)
        return {"rankings": [ranking.to_table() for ranking in found.values()]}

    few = min(work.samples.count, RANK_SAMPLES)
    params = {"criterion": spec.criterion, "seed": spec.seed, "samples": few, "freeze": spec.freeze}
    done = work.run.stage(Stage("rank"), params, work.sampled, make, tools=TOOLS, detail=lambda _: spec.criterion)
    work.rankings.update({ranking.group: ranking for ranking in map(Ranking.from_table, done["rankings"])})


def _table(work: Work, dense: Outcome) -> LatencyTable:
    """What each width costs on the device."""
    tally, begun = Tally(), work.run.seconds
    device = work.target.fingerprint().digest()

    def make() -> dict[str, Any]:
        model = onnx.load_model(str(dense.path("onnx")))
        rows = Rows(model, work.topology, lambda plan: resolve(work.topology, plan))

        def narrowed(widths: Mapping[str, int], dropped: Iterable[str]) -> bytes:
            plan = make_plan(work.topology, work.rankings, widths, frozenset(dropped))
            data: bytes = narrow(model, resolve(work.topology, plan)).SerializeToString()
            return data

        with ondevice.latency_store(work) as store, work.run.share("table") as progress:
            table = tabulate(
                work.target, rows, work.topology, dense.path("onnx"), work.profile.prune, store,
                progress=progress, tally=tally, narrowed=narrowed, precision=work.profile.precision,
            )  # fmt: skip
        return {"table": table.to_table(), "reused": tally.reused, "measured": tally.measured}

    key = {"dense": dense.files["onnx"], "device": device, "spec": work.profile.prune, "measure": work.profile.measure}
    again, _ = work.run.journal.recorded("tabulated", key)
    done = work.run.journalled("tabulated", key, make)
    told = f"reused {done['reused']}, measured {done['measured']}{', journalled' if again else ''}"
    work.run.finished("tabulate", work.run.seconds - begun, told)
    return LatencyTable.from_table(done["table"])


def _solver(work: Work) -> Solver:
    return cast(Solver, plugins.load("pipeline.latency.solvers", work.profile.prune.solver))


def _search(
    work: Work,
    dense: Outcome,
    probe: losses.Probing,
    table: LatencyTable,
    values: Sensitivity,
    ratio: float,
    known: Sequence[Seen],
) -> Found:
    """Choose, narrow, measure, correct, until the budget holds. known: candidates that were measured before."""
    begun, params = work.run.seconds, losses.depends_on(work)
    recovered = losses.after_recovery(work, probe)
    loop = Loop(
        topology=work.topology,
        rankings=work.rankings,
        solver=_solver(work),
        spec=work.profile.prune,
        plan_for=lambda widths, dropped: make_plan(work.topology, work.rankings, widths, dropped),
        loss=lambda plan: losses.remembered(work, "loss", params, plan, lambda: probe().loss(plan)),
        recovered=lambda plan: losses.remembered(
            work,
            "recovered loss",
            {**params, "recover": work.profile.recover, "steps": losses.SHORT_STEPS},
            plan,
            lambda: recovered(plan),
            trained=True,
        ),
        measure=lambda name, plans: ondevice.measure_plans(work, dense, name, plans),
        progress=lambda text: work.run.console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True),
        effort=losses.EFFORT_MACS / max(1, work.macs * losses.samples_taken(work)),
    )
    found = Search(loop, table, values, ratio, known).run()
    device, protocol, network = ondevice.identity(work, dense)
    with ondevice.latency_store(work) as store:
        remember(store, device, protocol, network, found.lasting(device))
    work.run.finished("search", work.run.seconds - begun, f"{len(found.rounds)} rounds, {len(found.tried)} plans tried")
    return found


def _repair(work: Work, plan: PruningPlan) -> fx.GraphModule:
    """The pruned network repaired as asked; the plain ways beside it are tried and reported."""
    chosen = work.profile.prune.repair
    pruned = prune(work.network, plan)

    def make(folder: Path) -> dict[str, Any]:
        taps = DenseTaps(work.network, work.samples.joined()) if work.samples.count else None
        dense, told = outputs_of(work.network.graph, work.loss_samples, work.network.answers), {}
        for mode in dict.fromkeys((*REPORTED, chosen)):
            if mode in NEED_INPUTS and taps is None:
                continue
            fixed = repair(
                pruned, work.network, plan, work.samples, mode, rankings=work.rankings, taps=taps, dense=dense
            )
            accuracy = work.project.validate(predict_torch(fixed))
            loss = mean_divergence(fixed, work.loss_samples, dense, work.network.answers)
            told[mode] = {"loss": loss if math.isfinite(loss) else None, "accuracy": accuracy}
            if mode == chosen:
                (folder / "repaired.safetensors").write_bytes(save(state(fixed)))
        return {"weights": folder / "repaired.safetensors", "told": told}

    params = {"repair": chosen, **losses.depends_on(work), "samples": work.samples.count}
    done = work.run.stage(
        work.by_data("repair"), params, {**work.data, **work.sampled, "plan": plan.to_json()}, make, tools=TOOLS,
        detail=lambda d: ", ".join(f"{mode} {_score(row)}" for mode, row in d["told"].items()),
    )  # fmt: skip
    work.repairs.update(done["told"])
    return restore(pruned, load_file(done.path("weights")), "the repaired network")


def _score(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is not None:
        return f"{row['accuracy']:.3f}"
    return "loss infinite" if row["loss"] is None else f"loss {row['loss']:.3g}"


def _recover(work: Work, plan: PruningPlan, repaired: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Distillation from the user's network, with notes on it; without training data the repaired network it is."""
    spec = work.profile.recover
    if not _trains(work):
        return repaired, ()

    def make(folder: Path) -> dict[str, Any]:
        data, checkpoint = prepare.lessons(work.project), work.scratch("recover.checkpoint")
        with work.run.progress("recover", 1) as step:
            done = recover(repaired, work.given.graph, data, spec, checkpoint, lambda *_: step())
        (folder / "recovered.safetensors").write_bytes(save(state(cast(fx.GraphModule, done.module))))
        return {"weights": folder / "recovered.safetensors", **done.to_table()}

    inputs = {**work.taught, "plan": plan.to_json(), "start": hashes(repaired)}
    done = work.run.stage(
        work.by_data("recover"), spec, inputs, make, tools=TOOLS,
        detail=prepare.gain,
    )  # fmt: skip
    notes = _on_recovery(done.values, spec)
    for note in notes:
        _say(work.run, f"note: {note}")
    return restore(prune(work.network, plan), load_file(done.path("weights")), "the recovered network"), notes


def _on_recovery(done: Mapping[str, Any], spec: RecoverSpec) -> tuple[str, ...]:
    """What a user would set differently next time. done: of `Recovered.to_table`."""
    if done["stopped"] == "diverged":
        rates = " and ".join(f"{rate:g}" for rate in done["diverged"])
        mend = f"--set recover.learning_rate={min(done['diverged']) / 5:g} may hold"
        return (
            f"the recovery diverged at the learning rates {rates}, so the best weights before that are kept: {mend}.",
        )
    if done["stopped"] == "time" and not done["history"]:
        asked = f"recover.max_minutes is {spec.max_minutes:g}"
        return (f"{asked}, too short for a step of recovery and its score: nothing was trained after the repair.",)
    first, scores = spec.learning_rate, dict[float, float]()
    for _, _, score, peak in done["history"]:
        scores[peak] = max(-math.inf if score is None else score, scores.get(peak, -math.inf))
    best = max(scores, key=scores.__getitem__, default=first)
    if best == first or done["kept"] is None:
        return ()
    other = f"{prepare.in_words(scores[first])} with {first:g}" if first in scores else f"{first:g} diverged"
    alone = f"--set recover.learning_rate={best:g} takes it alone"
    return (
        f"the recovery did best with a learning rate of {best:g} ({prepare.in_words(scores[best])}; {other}): {alone}.",
    )


def _export(work: Work, plan: PruningPlan, model: fx.GraphModule) -> Outcome:
    """The accepted network as ONNX, optimised, with the numbers it must give."""
    model.eval()

    def make(folder: Path) -> dict[str, Any]:
        raw = export(model, work.project.inputs, folder / "raw.onnx", work.profile.graph.opset)
        log: PassLog = optimize(raw, work.profile.graph.passes, folder / "model.onnx")
        check_model(onnx.load_model(str(folder / "model.onnx")))
        (folder / "pruned.safetensors").write_bytes(save(state(model)))
        weights, passes = folder / "pruned.safetensors", json.loads(log.to_json())
        return {"onnx": folder / "model.onnx", "weights": weights, "passes": passes}

    inputs = {"project": work.source, "plan": plan.to_json(), "weights": hashes(model)}
    return work.run.stage(Stage("export"), _written(work), inputs, make, tools=TOOLS, detail=_nodes)


def _candidates(work: Work, final: Outcome) -> Outcome:
    """The exported network with those rewrites that the device measures faster than it is without them."""
    names, error = work.profile.graph.candidates, work.profile.graph.hash_error
    if not names:
        return final
    begun, plain = work.run.seconds, precision.lowered(work, final, "exported").path("onnx")

    def measured(models: Sequence[onnx.ModelProto]) -> list[Timing]:
        files = [work.scratch(f"candidate-{number}.onnx") for number in range(1, len(models) + 1)]
        for file, model in zip(files, models, strict=True):
            onnx.save_model(precision.in_precision(work, model), str(file))
        found = []
        for start in range(0, len(files), MOST_OFFERS):
            some = {file.stem: file for file in files[start : start + MOST_OFFERS]}
            name = f"candidates {start // MOST_OFFERS + 1}"
            session = ondevice.measure(work, name, {PRUNED: plain, PRUNED_AGAIN: plain, **some}, "rank")
            found += [ondevice.timing(session, label, PRUNED, PRUNED_AGAIN) for label in some]
        return found

    hashing = (lambda weights: adaptive(weights, error).weights) if error else None
    choice = choose(onnx.load_model(str(final.path("onnx"))), names, measured, hashing)
    told, taken = choice.to_table() | {"hash_error": error}, sum(len(each.edits) for each in choice.tried if each.taken)
    left = sum(len(reasons) for reasons in choice.refused.values())
    said = f"{len(choice.tried)} measured, {taken} taken, {left} refused"
    work.run.finished("candidates", work.run.seconds - begun, said)

    def make(folder: Path) -> dict[str, Any]:
        onnx.save_model(choice.model, str(folder / "model.onnx"))
        passes = {**final["passes"], "candidates": told}
        return {"onnx": folder / "model.onnx", "weights": final.path("weights"), "passes": passes}

    inputs = {"project": work.source, "model": final.files["onnx"]}
    return work.run.stage(Stage("rewrite"), {"candidates": told}, inputs, make, tools=TOOLS)
