"""What a build asks of its device: artifacts built, run for their accuracy, measured in sessions and accepted.

A session is journalled with its raw samples, so a run that was killed goes on with the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import outcome
from pipeline.cache import named
from pipeline.graph.narrow import narrow_file
from pipeline.graph.rewriting import Timing
from pipeline.latency.feedback import Seen, recall
from pipeline.latency.store import Store
from pipeline.nouns import PruningPlan
from pipeline.prune.plan import resolve
from pipeline.report import numbers
from pipeline.report.data import Agreement
from pipeline.search import Measured
from pipeline.stage import Outcome, Stage
from pipeline.work import AGAIN, DENSE, PRUNED, TOOLS, Work
from profiles.errors import ScarceError
from profiles.schema import Budget
from targets.base import Target
from targets.harness.measurement import Judgement, Session, Statistic, judge

T = TypeVar("T")
R = TypeVar("R")


def build_artifacts(work: Work, models: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """What the device's runtime makes of models, by the names that errors tell them by.

    Engines take minutes: a bar says how far they are.
    """
    places = {model: folder / f"{name}.artifact" for name, model in models.items()}
    with named(models):
        if work.profile.runtime == "ort":
            work.target.build_each(places)
        else:
            with work.run.share("build") as progress:
                work.target.build_each(places, progress)
    return {name: places[model] for name, model in models.items()}


def _predict(target: Target, artifact: Path) -> Callable[..., Any]:
    def predict(*arrays: Any) -> Any:
        outputs = target.infer(artifact, [np.asarray(array) for array in arrays])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return predict


def accuracy(work: Work, model: Path, name: str) -> float | None:
    """The project's metric of an artifact on the device, None where it has none."""
    if work.project.lacks("evaluate"):
        return None

    def make(folder: Path) -> dict[str, Any]:
        artifact = build_artifacts(work, {name: model}, folder)[name]
        return {"accuracy": work.project.evaluate(_predict(work.target, artifact))}

    inputs = {**work.data, "model": model}
    done = work.run.stage(
        work.by_data(f"evaluate {name}"), {}, inputs, make, tools=TOOLS,
        fingerprint=work.target.fingerprint().digest(), detail=lambda d: f"{d['accuracy']:.4f}",
    )  # fmt: skip
    return float(done["accuracy"])


def agreement(work: Work, dense: Outcome, final: Outcome) -> Agreement | None:
    """How far the artifact's outputs are those of the user's network on the device, where no metric judges it."""
    if not work.project.lacks("evaluate"):
        return None
    samples = work.loss_samples

    def make(folder: Path) -> dict[str, Any]:
        files = {DENSE: dense.path("onnx"), PRUNED: final.path("onnx")}
        before, after = (_outputs(work, built) for built in build_artifacts(work, files, folder).values())
        return asdict(outcome.agreement(before, after, samples.count, work.loss_samples_are))

    inputs = {**work.sampled, "dense": dense.files["onnx"], "model": final.files["onnx"]}
    done = work.run.stage(
        Stage("agreement", 2), {"samples": samples.count}, inputs, make, tools=TOOLS,
        fingerprint=work.target.fingerprint().digest(), detail=lambda d: numbers.agreement(Agreement(**d.values)),
    )  # fmt: skip
    return Agreement(**done.values)


def _outputs(work: Work, artifact: Path) -> list[NDArray[Any]]:
    """All outputs of an artifact for what losses are measured on."""
    batches = [work.target.infer(artifact, [x.numpy() for x in batch]) for batch in work.loss_samples.inputs]
    return [np.concatenate(column) for column in zip(*batches, strict=True)]


def measure(work: Work, name: str, models: Mapping[str, Path], mode: Any) -> Session:
    """One interleaved session on the device, journalled with its raw samples."""
    hashes = {label: _sha(path.read_bytes()) for label, path in models.items()}
    key = {"mode": mode, "spec": work.profile.measure, "models": hashes}

    def make() -> str:
        built = build_artifacts(work, models, work.run.folder("work"))
        with named(built), work.run.share(name) as progress:
            session = work.target.measure(built, work.profile.measure, mode, progress)
        text = session.to_json()
        with latency_store(work) as store:
            store.add_measurement(work.run.path.name, session.fingerprint.digest(), text)
        return text

    return Session.from_json(work.run.journalled(f"session {name}", key, make))


def timing(session: Session, name: str, before: str, again: str) -> Timing:
    """A rewritten network against the one without; that stands in the session twice, and both are its reference."""
    one, two = session.ratio(name, before), session.ratio(name, again)
    before_ms, after_ms = (session.measurement(each).p50_ms for each in (before, name))
    ratio = math.sqrt(one.center * two.center)
    return Timing(before_ms, after_ms, ratio, min(one.low, two.low), max(one.high, two.high))


def timings(work: Work, dense: Outcome, name: str, files: Mapping[str, Path]) -> dict[str, Timing]:
    """Networks against the dense one, in one session or in parts."""

    def together(name: str, some: Sequence[tuple[str, Path]]) -> list[tuple[str, Timing]]:
        session = measure(work, name, {DENSE: dense.path("onnx"), AGAIN: dense.path("onnx"), **dict(some)}, "rank")
        return [(label, timing(session, label, DENSE, AGAIN)) for label, _ in some]

    return dict(_in_parts(work, name, list(files.items()), together))


def relative_budget(work: Work, dense: Outcome) -> float:
    """The budget relative to the dense network: as asked, or the limit over the dense latency measured now."""
    if work.budget.ratio is not None:
        return work.budget.ratio
    session = measure(work, "dense latency", {DENSE: dense.path("onnx"), AGAIN: dense.path("onnx")}, "rank")
    known = session.measurement(DENSE).statistic(work.budget.percentile).value_ms
    return float(work.budget.limit_ms or 0.0) / float(known or session.measurement(DENSE).p50_ms)


def measure_plans(work: Work, dense: Outcome, name: str, plans: Sequence[PruningPlan]) -> list[Measured]:
    """The plans narrowed from the dense ONNX and measured beside it, in one session or in parts."""
    return _in_parts(work, name, plans, partial(_measure_together, work, dense))


def _in_parts(work: Work, name: str, networks: Sequence[T], together: Callable[[str, Sequence[T]], list[R]]) -> list[R]:
    """What one session tells of networks, each measured beside the dense one.

    Where the device has too little memory for all of them, two sessions of half as many: what counts is a network's
    latency relative to the dense one.
    """
    try:
        return together(name, networks)
    except ScarceError:
        if len(networks) == 1:
            raise
    work.run.console.print(f"  {name}: too little memory for {len(networks)} networks at once, so in two sessions")
    half = len(networks) // 2
    parts = {f"{name} a": networks[:half], f"{name} b": networks[half:]}
    return [told for each, part in parts.items() for told in _in_parts(work, each, part, together)]


def _measure_together(work: Work, dense: Outcome, name: str, plans: Sequence[PruningPlan]) -> list[Measured]:
    model = dense.path("onnx")
    artifacts = {DENSE: model, AGAIN: model}
    for index, plan in enumerate(plans, 1):
        artifacts[f"candidate-{index}"] = _narrowed(work, dense, plan, f"{name}-{index}")
    session = measure(work, name, artifacts, "rank")
    if session.contaminated:
        session = measure(work, f"{name} again", artifacts, "rank")
    return [_measured(session, f"candidate-{index}", work.budget) for index in range(1, len(plans) + 1)]


def short_statistic(budget: Budget) -> Statistic:
    """What a short session is read by: it has too few inferences for p99."""
    return "p90" if budget.percentile == "p99" else budget.percentile


def _measured(session: Session, name: str, budget: Budget) -> Measured:
    """A candidate's ratio; the dense network stands in the session twice, and both are its reference.

    The accepting measurement judges p99 itself.
    """
    statistic = short_statistic(budget)
    one, two = session.ratio(name, DENSE, statistic), session.ratio(name, AGAIN, statistic)
    center = float(np.sqrt(one.center * two.center))
    dense_ms = session.measurement(DENSE).p50_ms
    device = None if session.contaminated else session.fingerprint.digest()
    return Measured(center, min(one.low, two.low), max(one.high, two.high), dense_ms, device)


def accept(work: Work, dense: Outcome, model: Path, name: str = "accept") -> tuple[Session, Judgement]:
    """The full accepting protocol; where it leaves the verdict open, once more, judged together with it."""
    models = {DENSE: dense.path("onnx"), AGAIN: dense.path("onnx"), PRUNED: model}
    begun = work.run.seconds
    session = measure(work, name, models, "accept")
    judged = judge(session, PRUNED, DENSE, work.budget)
    if judged.verdict == "undecided":
        more = measure(work, f"{name} again", models, "accept")
        session = more if session.contaminated else session.joined(more)
        judged = judge(session, PRUNED, DENSE, work.budget)
    work.run.finished(name, work.run.seconds - begun, f"{judged.verdict}: {judged.reason}")
    return session, judged


def accept_plan(work: Work, dense: Outcome, base: Outcome, plan: PruningPlan) -> tuple[Session, Judgement]:
    """The same for a plan that is not carried out yet: the network that is pruned, narrowed by it."""
    name = "accept plan"
    return accept(work, dense, _narrowed(work, base, plan, name), name)


def _narrowed(work: Work, base: Outcome, plan: PruningPlan, name: str) -> Path:
    """The ONNX file of the network that is pruned, narrowed by a plan."""
    file = work.scratch(f"{name}.onnx".replace(" ", "-"))
    return narrow_file(base.path("onnx"), resolve(work.topology, plan), file)


def known_candidates(work: Work, dense: Outcome) -> list[Seen]:
    """Candidates of this network that earlier builds measured on this device; a resumed run knows no more of them."""

    where = identity(work, dense)

    def find() -> list[Seen]:
        with latency_store(work) as store:
            return recall(store, *where)

    return [(widths, tuple(dropped), ratio) for widths, dropped, ratio in work.run.journalled("known", where, find)]


def identity(work: Work, dense: Outcome) -> tuple[str, str, str]:
    """Device, protocol and network that a candidate's latency relative to the dense network belongs to."""
    how = work.profile.measure.model_dump_json(include={"threads", "spin", "paced_ms"})
    return work.target.fingerprint().digest(), f"{work.budget.percentile} {how}", str(dense.files["onnx"])


def latency_store(work: Work) -> Store:
    """Where latencies are kept across runs."""
    return Store(work.run.cache.root / "latency.sqlite")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
