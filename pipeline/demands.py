"""What is asked for is held against what the project gives, before any work is done.

Names of plug-ins, missing data and missing labels are told from the project file alone. What a hook, a criterion or the
loss needs of the network shows only when it runs: each is run once, hooks and the loss on the first training batch, a
gradient on a few samples, and a criterion that has a check of its own does that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from pipeline.graph.candidates.base import PACKAGE as CANDIDATES
from pipeline.project import Project
from pipeline.prune.capture import Network
from pipeline.prune.criteria.base import PACKAGE as CRITERIA
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.ranking import RANK_SAMPLES, require_labels
from pipeline.prune.repair import NEED_INPUTS
from pipeline.recover.train import HOOKS, Pair, rehearse_hook, rehearse_loss
from profiles import plugins
from profiles.errors import DeployError, UsageError
from profiles.schema import PrepareSpec, Profile, PruneSpec, RecoverSpec

SOLVERS = "pipeline.latency.solvers"
DATA_FREE = {"criterion": "red", "repair": "merge"}
"""What ranks and repairs where there are no calibration samples and nothing else was asked for."""
TRIED = 2
"""Samples that a gradient is tried on."""


def kept(project: Project, profile: Profile) -> tuple[Profile, tuple[str, ...]]:
    """The profile as it can be kept with this project, and a sentence for everything that its missing data changes.

    Without calibration samples DATA_FREE takes the place of what was not asked for; raises UsageError where what was
    asked for needs them, or does not exist.
    """
    _ = project.data  # looked at once, before anything is read: what changes later belongs to the next build
    for name in profile.graph.candidates:
        plugins.load(CANDIDATES, name)
    plugins.load(CRITERIA, profile.prune.criterion)
    solver = plugins.load(SOLVERS, profile.prune.solver)
    _refuse_training(profile.prepare, profile.recover, project)
    lacking = project.lacks("calibration")
    if lacking:
        spec = profile.prune
        spec = spec.model_copy(update={k: v for k, v in DATA_FREE.items() if k not in spec.model_fields_set})
        _refuse_needs(spec, lacking)
        profile = profile.model_copy(update={"prune": spec})
    criterion, repair = profile.prune.criterion, profile.prune.repair
    ways = f"ranked by '{criterion}' and repaired by '{repair}', which need none"
    if repair == "merge" and not getattr(plugins.load(CRITERIA, criterion), "STAND_INS", False):
        ways = f"ranked by '{criterion}', which needs none and names no stand-ins, so that nothing is repaired"
    untrained = "nothing is trained after the repair"
    if getattr(solver, "RECOVERS", False):
        untrained += f", nor in the solver '{profile.prune.solver}', which then judges what is repaired alone"
    told = {
        "calibration": f"channels are {ways}; losses are measured on noise",
        "train": untrained,
        "evaluate": "the accuracy is not judged",
    }
    notes: dict[str, list[str]] = {}
    for key, what in told.items():
        notes.setdefault(project.lacks(key), []).append(what)
    return profile, (*(f"{why}: {'; '.join(what)}." for why, what in notes.items() if why), *_idle(profile))


def _idle(profile: Profile) -> Iterator[str]:
    """A sentence for every setting that nothing here reads."""
    prune, graph = profile.prune, profile.graph
    if prune.normalise != "none" and not getattr(plugins.load(SOLVERS, prune.solver), "NORMALISES", False):
        yield f"prune.normalise is '{prune.normalise}', which the solver '{prune.solver}' does not read."
    if graph.hash_error and not graph.candidates:
        yield f"graph.hash_error is {graph.hash_error:g}, and graph.candidates is empty: nothing is hashed."


def samples(project: Project, spec: PruneSpec) -> Samples:
    """Calibration samples. Raises UsageError for a criterion that needs labels which they have not."""
    batches = project.calibration(spec.calibration)
    found = Samples(batches.inputs, batches.targets)
    require_labels(spec.criterion, found)
    return found


def rehearse(project: Project, profile: Profile, network: Network, samples: Samples, *, trains: bool = True) -> None:
    """Run once what criterion, hooks and loss run later. Raises UsageError for what they cannot do here.

    trains=False: of a run that ends before any training, so that the loss is not asked for.
    """
    criterion, seed = profile.prune.criterion, profile.prune.seed
    chosen = plugins.load(CRITERIA, criterion)
    if samples.count and "gradients" in chosen.NEEDS:
        _rehearse_gradients(Evidence(network, samples.first(TRIED), project.loss, seed), criterion)
    if samples.count and hasattr(chosen, "check"):
        few = min(samples.count, RANK_SAMPLES)
        chosen.check(Evidence(network, samples.first(few), project.loss, seed))
    if project.train is not None:
        specs: dict[str, PrepareSpec | RecoverSpec] = {"prepare": profile.prepare, "recover": profile.recover}
        hooks = [(table, name) for table, spec in specs.items() if spec.epochs for name in spec.hooks]
        short = getattr(plugins.load(SOLVERS, profile.prune.solver), "RECOVERS", False)  # always judged by the loss
        asked = [spec for spec in specs.values() if spec.epochs and (spec.alpha < 1 or not project.validates)]
        by_loss = trains and bool(short or asked)
        batch = next(iter(project.train(0, 0)), None) if hooks or by_loss else None
        if batch is None:
            return  # a training without batches is told by the training
        for table, name in hooks:
            _rehearse_hook(network, batch, table, name)
        if by_loss:
            _rehearse_loss(project, network, batch)


def _rehearse_gradients(evidence: Evidence, criterion: str) -> None:
    try:
        gradients = evidence.gate_gradients
    except DeployError:
        raise
    except Exception as error:  # the user's loss, or its shapes: whatever it raises is what is wrong with it
        message = f"the criterion '{criterion}' needs the gradient of the loss, which fails: {_first_line(error)}"
        raise UsageError(message, "let data.calibration yield targets that data.loss takes.") from error
    if not bool(gradients.isfinite().all()):
        wrong = "not finite"
    elif not bool(gradients.any()):
        wrong = "zero for every unit"
    else:
        return
    message = f"the criterion '{criterion}' needs the gradient of the loss, which is {wrong}."
    raise UsageError(message, "mend data.loss, or --criterion obs, which needs none.")


def _rehearse_loss(project: Project, network: Network, batch: Pair) -> None:
    """Hold the loss against the first training batch: what a recovery would trip over after the whole search."""
    try:
        rehearse_loss(network.graph, *batch, project.loss)
    except DeployError:
        raise
    except Exception as error:  # the user's loss, or its shapes: whatever it raises is what is wrong with it
        message = f"the loss fails on the first training batch: {_first_line(error)}"
        raise UsageError(message, "let data.train yield targets that data.loss takes.") from error


def _rehearse_hook(network: Network, batch: Pair, table: str, name: str) -> None:
    try:
        rehearse_hook(name, copy.deepcopy(network.graph), network.graph, *batch)
    except DeployError as error:
        raise UsageError(f"{table}.hooks: {error.message}", error.hint) from error
    except Exception as error:  # the hook's: whatever it raises is why it cannot be used here
        message = f"{table}.hooks: '{name}' fails on the first training batch: {_first_line(error)}"
        raise UsageError(message, f"--set '{table}.hooks=[]'") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _refuse_training(prepare: PrepareSpec, recover: RecoverSpec, project: Project) -> None:
    """Raise UsageError for a training that this project, or these settings, cannot have."""
    for name in (*prepare.hooks, *recover.hooks):
        plugins.load(HOOKS, name)
    for table, spec in {"prepare": prepare, "recover": recover}.items():
        for name in spec.strengths:
            if name not in spec.hooks:
                message = f"{table}.strengths names '{name}', and {table}.hooks does not."
                raise UsageError(message, f"--set '{table}.hooks=[\"{name}\"]'")
    pushed, recovered = _named("prepare", prepare.hooks), _named("recover", recover.hooks)
    if not prepare.epochs and (asked := "prepare.grow" if prepare.grow else pushed):
        raise UsageError(f"{asked} needs training, and prepare.epochs is 0.", "--set prepare.epochs=5")
    if not recover.epochs and recovered:
        raise UsageError(f"{recovered} needs training, and recover.epochs is 0.", "--set recover.epochs=5")
    lacking = project.lacks("train")
    if lacking and prepare.epochs:
        message = f"prepare.epochs is {prepare.epochs}, which needs training data, and {lacking}."
        raise UsageError(message, "add data.train to deploy.toml, or --set prepare.epochs=0.")
    if lacking and recovered:
        message = f"{recovered} needs training data, and {lacking}."
        raise UsageError(message, "add data.train to deploy.toml, or --set 'recover.hooks=[]'.")


def _named(table: str, hooks: Iterable[str]) -> str:
    """Hooks that were asked for, as they are told; "" for none."""
    listed = ", ".join(hooks)
    return f"{table}.hooks ({listed})" if listed else ""


def _refuse_needs(spec: PruneSpec, lacking: str) -> None:
    """Raise UsageError for a criterion or a repair that cannot do without calibration samples."""
    found = {
        "criterion": plugins.load(CRITERIA, spec.criterion).NEEDS and spec.criterion,
        "repair": spec.repair in NEED_INPUTS and spec.repair,
    }
    needy = {kind: name for kind, name in found.items() if name}
    if needy:
        told = " and ".join(f"the {kind} '{name}'" for kind, name in needy.items())
        instead = " ".join(f"--{kind} {DATA_FREE[kind]}" for kind in needy)
        message = f"{told} need{'s' if len(needy) == 1 else ''} calibration inputs, and {lacking}."
        raise UsageError(message, f"add data.calibration to deploy.toml, or {instead}.")
