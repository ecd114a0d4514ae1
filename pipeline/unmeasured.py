"""How a build ends for a device that is not here: the engine and its network, marked as built and not measured.

Nothing is pruned, since no latency is known and none is made up. What is judged is the ONNX file in ONNX Runtime on
this machine, which is not the engine. The files go to `built/`, never to `bundle/`; the exit code is 4, or 3 where the
accuracy fell too far already there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import outcome
from pipeline.nouns import BUILT, PruningPlan
from pipeline.prepare import state
from pipeline.release.bundle import Unmeasured, write_bundle
from pipeline.report.data import Agreement, Figures, ReportData
from pipeline.stage import Outcome
from pipeline.work import BuildResult, Work
from targets.base import Target

AS_IT_IS = "nothing can be measured, so the network is built as it is: not pruned, not trained, no rewrite tried."
JUDGED = "accuracy and sample are those of model.onnx in ONNX Runtime on this machine, not of the engine"


@dataclass(frozen=True)
class Engine:
    """What was built. exact: the network in float32; final: as it was built; path: the engine, suffix: of such files.

    The rest is as in `outcome.Ending`.
    """

    exact: Outcome
    final: Outcome
    path: Path
    suffix: str
    accuracy_dense: float | None
    accuracy: float | None
    agreement: Agreement | None


def notes(target: Target) -> tuple[str, ...]:
    """What is said as such a build begins, a sentence each."""
    return f"{target.latency().why}: {AS_IT_IS}", f"{JUDGED}.", target.latency().mend


def release(work: Work, device: Target, engine: Engine) -> BuildResult:
    """Judge what can be judged, report, and write the files. device: what was built for; work: its target judges."""
    why = device.latency().why
    known = engine.accuracy_dense, engine.accuracy, engine.agreement
    verdict, reason = outcome.gate(work, BUILT, why, *known)
    folder = work.run.path / ("built" if verdict == BUILT else "rejected")
    fingerprint = device.fingerprint()
    told = {name: str(value) for name, value in fingerprint.to_table().items() if value and not isinstance(value, list)}
    data = _report(work, engine, verdict, reason, folder, told)
    contents = outcome.contents(
        work,
        data,
        engine.exact,
        engine.final,
        plan=PruningPlan(()),
        weights={name: value.numpy() for name, value in state(work.network.graph).items()},
        session=Unmeasured(fingerprint, f"{why}; {JUDGED}"),
        latency=None,
        accuracy=outcome.accuracy_entry(work, data, *known),
        artifacts={f"model{engine.suffix}": engine.path},
    )
    write_bundle(folder, contents)
    return outcome.close(work, data, None)


def _report(
    work: Work, engine: Engine, verdict: str, reason: str, folder: Path, conditions: Mapping[str, str]
) -> ReportData:
    parameters = sum(value.numel() for value in work.network.graph.parameters())
    return ReportData(
        network=work.project.references["model.factory"].text,
        target=work.profile.name,
        budget=str(work.budget),
        budget_ms=work.budget.limit_ms,
        verdict=verdict,
        dense=Figures(engine.accuracy_dense, parameters, work.macs),
        pruned=Figures(engine.accuracy, parameters, work.macs),
        reason=reason,
        run=str(work.run.path),
        bundle=str(folder),
        percentile=work.budget.percentile,
        max_drop=work.project.max_drop,
        unjudged=work.project.lacks("evaluate"),
        agreement=engine.agreement,
        seconds=work.run.seconds,
        passes=outcome.passes(engine.final["passes"]),
        stages=outcome.stages(work),
        conditions=conditions,
        versions=work.run.versions,
        settings={"precision": work.profile.precision},
        notes=work.notes,
    )
