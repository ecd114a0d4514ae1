"""Recovery: the repaired network learns from the dense one, for a bounded time, and never ends worse than it began.

SGD with Nesterov momentum over one cycle of the learning rate (schedule.py) on the distillation loss (distil.py).
After each epoch the network is scored, on `validate` or on batches held out of the training data, never on what the
gate asks; the best epoch is kept, and the start where no epoch beats it (or, with an `allowed_drop`, the latest that
falls no further). Epochs that close less than half of the gap between the start's score and the dense network's are
gone through once more from the start, in what time is left, with a tenth of the learning rate, and the best of both is
kept: a rate that mends a damaged network undoes one that the repair left good. A loss that is not finite sends it back
to the start once, with half the rate. At each epoch's end everything is stored, and since every epoch seeds its own
randomness, a recovery that was killed ends on the CPU bit for bit as one that was not.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.outputs import tensors
from pipeline.recover import checkpoint as stored
from pipeline.recover.distil import TaskLoss, distil
from pipeline.recover.hooks.base import TrainHook
from pipeline.recover.schedule import RISE, learning_rate, plan_steps, waited
from profiles import plugins
from profiles.errors import DeployError
from profiles.schema import RecoverSpec

HOOKS = "pipeline.recover.hooks"
HOLD_OUT_EVERY, HOLD_OUT_SAMPLES = 10, 1024
GENTLE = 0.1
"""Share of the learning rate that a second cycle takes."""
ENOUGH = 0.5
"""Share of the gap between the start's score and the dense network's; a first cycle that closes less has a second."""
LEAST_GENTLY = 0.25
"""Share of the wanted steps that has to fit into the time left for one."""
_LARGEST_GRADIENT = 5.0
_TIMED_STEPS = 3

Pair = tuple[tuple[Tensor, ...], Any]
Stopped = Literal["finished", "patience", "time", "diverged"]
Progress = Callable[[int, int], None]
"""Called after every step with (steps done, steps planned)."""


@dataclass(frozen=True)
class RecoverData:
    """What a recovery learns from. train: (epoch, seed) -> batches of ((tensor, …), targets). loss: the task's.

    validate: score of a network, higher is better. Without it every tenth training batch is held out until 1024 samples
    are, and the score is minus their mean loss; a `train` that shuffles may show those samples again in a later epoch.
    """

    train: Callable[[int, int], Iterable[Pair]]
    loss: TaskLoss
    validate: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True)
class Epoch:
    """One pass. loss: mean over its steps. validate: score at its end. attempt: how often it went back to the start.

    peak: highest learning rate of the cycle that it belongs to.
    """

    epoch: int
    attempt: int
    peak: float
    steps: int
    loss: float
    validate: float
    seconds: float


@dataclass(frozen=True)
class Recovered:
    """How a recovery ended. best_epoch: index in `history` of the weights in `module`; None: the start was kept.

    best_score: of those weights. diverged: learning rates at which a loss was not finite.
    """

    module: nn.Module
    history: tuple[Epoch, ...]
    best_epoch: int | None
    stopped: Stopped
    start_score: float
    best_score: float
    planned_steps: int
    resumed_epochs: int
    diverged: tuple[float, ...]

    def to_table(self) -> dict[str, Any]:
        """Plain data on all but the weights; a score or loss that is not finite is None."""
        epochs = [[e.epoch, _finite(e.loss), _finite(e.validate), e.peak] for e in self.history]
        scores = {"from": _finite(self.start_score), "to": _finite(self.best_score)}
        told = {"history": epochs, "stopped": self.stopped, "kept": self.best_epoch, "diverged": list(self.diverged)}
        return told | scores


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class _Story:
    """What has happened so far; goes into the checkpoint as JSON. rate: share of the learning rate that is taken.

    dense_score: of the dense network, where a second cycle may follow. diverged: learning rates at which a loss was not
    finite. gentle: it went back to the start after epochs that gained too little.
    """

    wanted: int
    steps: int
    start_score: float
    best_score: float
    score_s: float = 0.0
    attempt: int = 0
    epoch: int = 0
    step: int = 0
    rate: float = 1.0
    dense_score: float = math.inf
    diverged: list[float] = field(default_factory=list)
    gentle: bool = False
    seconds: float = 0.0
    best_epoch: int | None = None
    stopped: Stopped | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def recover(
    pruned: nn.Module,
    dense: nn.Module,
    data: RecoverData,
    spec: RecoverSpec,
    checkpoint: Path,
    progress: Progress | None = None,
    *,
    allowed_drop: float | None = None,
    again: bool = True,
) -> Recovered:
    """Train a copy of `pruned` to follow `dense`; both stay as they are. Goes on from `checkpoint` where it fits.

    allowed_drop: left out, the best epoch is kept; else the latest that scores at most so much below the start, which
    is for training whose worth the score does not show. The start is kept where no epoch does. again: a first cycle
    that gains too little has a second, never with an allowed_drop.

    Raises DeployError for training data without batches, an unknown hook, a checkpoint that cannot be written.
    """
    hooks: list[TrainHook] = [plugins.load(HOOKS, name).Hook() for name in spec.hooks]
    with _own_randomness(), ExitStack() as stack:
        run = _Recovery(pruned, dense, data, spec, checkpoint, progress, hooks, allowed_drop, again)
        for hook in hooks:
            stack.callback(hook.stop)
            hook.start(run.student, run.teacher)
        run.go()
        return run.result()


def rehearse_hook(name: str, module: nn.Module, dense: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> None:
    """Run a hook once on one batch, through its gradient: what it cannot work with, it raises."""
    hook: TrainHook = plugins.load(HOOKS, name).Hook()
    with _own_randomness():
        try:
            hook.start(module.train(), dense)
            loss = hook.extra_loss(module, inputs, module(*inputs), targets)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            hook.stop()


@torch.no_grad()
def rehearse_loss(module: nn.Module, inputs: tuple[Tensor, ...], targets: Any, loss: TaskLoss) -> None:
    """Ask for the loss of one batch: what it cannot work with, it raises."""
    loss(module(*inputs), targets)


class _Recovery:
    """The networks, the optimizer and the story of one recovery."""

    def __init__(
        self,
        pruned: nn.Module,
        dense: nn.Module,
        data: RecoverData,
        spec: RecoverSpec,
        checkpoint: Path,
        progress: Progress | None,
        hooks: list[TrainHook],
        allowed_drop: float | None,
        again: bool,
    ) -> None:
        self.began = monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = copy.deepcopy(pruned).to(self.device)
        self.teacher = copy.deepcopy(dense).to(self.device).eval()
        if not any(p.requires_grad for p in self.student.parameters()):
            self.student.requires_grad_(True)
        self.data, self.spec, self.hooks, self.progress = data, spec, hooks, progress
        self.checkpoint, self.allowed_drop, self.again = checkpoint, allowed_drop, again and allowed_drop is None
        kept = f" again {self.again}" + ("" if allowed_drop is None else f" latest within {allowed_drop!r}")
        self.origin = stored.origin(spec.model_dump_json() + kept, pruned.state_dict(), dense.state_dict())
        self.start = self._weights()
        self.best = self.start
        self.optimizer = self._optimizer()
        self.held_out = [] if data.validate else self._hold_out()
        self.resumed_epochs = 0
        self.late = False
        self.story = _Story(0, 0, 0.0, 0.0)

    # --- the whole ---

    def go(self) -> None:
        """Epoch after epoch until the plan is done, the time is up, nothing gets better or all is lost."""
        self.story = self._resume() or self._fresh()
        while self.story.stopped is None:
            before = self._elapsed()
            loss, steps = self._epoch()
            if math.isfinite(loss):
                self._close_epoch(loss, steps, before)
            else:
                self._step_back()
            self._save()

    def result(self) -> Recovered:
        """The best network on the CPU, in eval mode, and how it came about."""
        self.student.load_state_dict(self.best)
        story = self.story
        return Recovered(
            module=self.student.cpu().eval(),
            history=tuple(Epoch(**epoch) for epoch in story.history),
            best_epoch=story.best_epoch,
            stopped=story.stopped or "finished",
            start_score=story.start_score,
            best_score=story.best_score,
            planned_steps=story.steps,
            resumed_epochs=self.resumed_epochs,
            diverged=tuple(story.diverged),
        )

    # --- one epoch, one step ---

    def _epoch(self) -> tuple[float, int]:
        """Mean loss and steps of one pass; the loss is NaN where that of a step was not finite."""
        story = self.story
        _seed(self.spec.seed, story.attempt, story.epoch)
        total, steps = 0.0, 0
        self.student.train()
        for inputs, targets in self._batches(story.epoch):
            if story.step >= story.steps:
                break
            if self._time_is_up():
                self.late = True
                break
            rate = learning_rate(story.step, story.steps, self._peak())
            loss = self._step(self.optimizer, inputs, targets, rate)
            if not math.isfinite(loss):
                return math.nan, steps
            total, steps, story.step = total + loss, steps + 1, story.step + 1
            if self.progress:
                self.progress(story.step, story.steps)
        return total / max(steps, 1), steps

    def _step(self, optimizer: torch.optim.SGD, inputs: tuple[Tensor, ...], targets: Any, rate: float) -> float:
        inputs = tuple(x.to(self.device) for x in inputs)
        targets = _on(targets, self.device)
        spec = self.spec
        wanted = self._taught(inputs) if spec.alpha > 0 else None
        outputs = self.student(*inputs)
        loss = distil(outputs, wanted, targets, self.data.loss, alpha=spec.alpha, temperature=spec.temperature)
        for name, hook in zip(spec.hooks, self.hooks, strict=True):
            strength = spec.strengths.get(name, hook.strength)
            loss = loss + strength * hook.extra_loss(self.student, inputs, outputs, targets)
        value = float(loss.detach())
        if math.isfinite(value):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.student.parameters(), _LARGEST_GRADIENT)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return value

    def _peak(self) -> float:
        return self.spec.learning_rate * self.story.rate

    def _taught(self, inputs: tuple[Tensor, ...]) -> Any:
        """What the dense network says of them."""
        with torch.inference_mode():
            seen = self.teacher(*inputs)
        return seen.clone() if isinstance(seen, Tensor) else tuple(each.clone() for each in tensors(seen))

    def _batches(self, epoch: int) -> Iterator[Pair]:
        """The training batches of an epoch without those held out; a last batch of one sample is left out."""
        largest, held = 0, len(self.held_out)
        for index, (inputs, targets) in enumerate(self.data.train(epoch, self.spec.seed)):
            largest = max(largest, len(inputs[0]))
            spared = index % HOLD_OUT_EVERY == 0 and index // HOLD_OUT_EVERY < held
            if not spared and len(inputs[0]) >= min(2, largest):
                yield inputs, targets

    # --- deciding ---

    def _close_epoch(self, loss: float, steps: int, before: float) -> None:
        story = self.story
        if steps:
            score = self._score(self.student)
            epoch = Epoch(story.epoch, story.attempt, self._peak(), steps, loss, score, self._elapsed() - before)
            story.history.append(asdict(epoch))
            if self._keeps(score):
                story.best_score, story.best_epoch, self.best = score, len(story.history) - 1, self._weights()
        story.epoch += 1
        if self.late:
            story.stopped = "time"
        elif story.step >= story.steps or story.epoch >= self.spec.epochs:
            story.stopped = "finished" if story.steps >= story.wanted else "time"
        elif self._time_is_up():
            story.stopped = "time"
        elif waited(self._scores_past_peak()) >= self.spec.patience:
            story.stopped = "patience"
        if story.stopped in ("finished", "patience") and self._may_go_gently():
            story.gentle, story.stopped = True, None
            self._back_to_start(GENTLE)

    def _keeps(self, score: float) -> bool:
        if self.allowed_drop is None:
            return score > self.story.best_score
        return math.isfinite(score) and score >= self.story.start_score - self.allowed_drop

    def _time_is_up(self) -> bool:
        """Whether there is time for nothing but one more score."""
        return self._elapsed() + self.story.score_s >= 60 * self.spec.max_minutes

    def _scores_past_peak(self) -> list[float]:
        done, scores = 0, []
        for epoch in self.story.history:
            if epoch["attempt"] == self.story.attempt:
                done += epoch["steps"]
                scores += [epoch["validate"]] if done > RISE * self.story.steps else []
        return scores

    def _step_back(self) -> None:
        """Back to the start with half the learning rate; the second time it is over."""
        if self.story.diverged:
            self.story.stopped = "diverged"
        self.story.diverged.append(self._peak())
        self._back_to_start(0.5)

    def _back_to_start(self, share: float) -> None:
        """To the start again, with this share of the learning rate."""
        story = self.story
        self.student.load_state_dict(self.start)
        self.optimizer = self._optimizer()
        story.rate *= share
        story.attempt, story.epoch, story.step = story.attempt + 1, 0, 0

    def _may_go_gently(self) -> bool:
        """Whether the epochs gained too little and there is time for as many with a smaller rate; plans their steps."""
        story = self.story
        gained, gap = story.best_score - story.start_score, story.dense_score - story.start_score
        enough = story.best_epoch is not None and gained >= ENOUGH * gap
        if not self.again or story.gentle or enough:
            return False
        past = [epoch for epoch in story.history if epoch["attempt"] == story.attempt]
        taken = sum(epoch["steps"] for epoch in past)
        if not taken:
            return False
        step_s = sum(epoch["seconds"] - story.score_s for epoch in past) / taken
        left = self.spec.max_minutes - self._elapsed() / 60
        steps = plan_steps(story.wanted, max(step_s, 0.0), story.score_s, self.spec.epochs, left)
        if steps < LEAST_GENTLY * story.wanted:
            return False
        story.steps = steps
        return True

    def _score(self, network: nn.Module) -> float:
        network.eval()
        if self.data.validate:
            return float(self.data.validate(network))
        total, samples = 0.0, 0
        with torch.inference_mode():
            for inputs, targets in self.held_out:
                outputs = network(*(x.to(self.device) for x in inputs))
                total += float(self.data.loss(outputs, _on(targets, self.device))) * len(inputs[0])
                samples += len(inputs[0])
        return -total / samples if math.isfinite(total) else -math.inf

    def _hold_out(self) -> list[Pair]:
        _seed(self.spec.seed, 0, 0)
        kept: list[Pair] = []
        for index, batch in enumerate(self.data.train(0, self.spec.seed)):
            if index % HOLD_OUT_EVERY == 0:
                kept.append(batch)
            if sum(len(inputs[0]) for inputs, _ in kept) >= HOLD_OUT_SAMPLES:
                break
        return kept

    # --- beginning, storing, going on ---

    def _fresh(self) -> _Story:
        """Score the start, count the batches of an epoch, time a few steps, and plan."""
        spec, before = self.spec, monotonic()
        score = self._score(self.student)
        story = _Story(0, 0, score, score)
        story.score_s = monotonic() - before
        if spec.epochs == 0 or spec.max_minutes == 0:
            story.stopped = "time" if spec.epochs else "finished"
            return story
        if self.again:
            story.dense_score = self._score(self.teacher)
        story.wanted = spec.epochs * self._count()
        left = spec.max_minutes - self._elapsed() / 60
        story.steps = plan_steps(story.wanted, self._time_step(), story.score_s, spec.epochs, left)
        if story.steps == 0:
            story.stopped = "time"
        return story

    def _count(self) -> int:
        batches = self.data.train(0, self.spec.seed)
        try:
            total = len(batches)  # type: ignore[arg-type]
        except TypeError:
            total = sum(1 for _ in batches)
        if total <= len(self.held_out):
            held = len(self.held_out)
            message = f"the training data gave {total} batches, of which {held} are held out: none to learn from."
            raise DeployError(message, "give smaller batches, or name data.validate in deploy.toml.")
        return total - len(self.held_out)

    def _time_step(self) -> float:
        """Seconds of one step, its data included; the first one warms up. Ends where it began.

        The network itself takes the steps, since hooks are attached to it, with a learning rate of 0.
        """
        _seed(self.spec.seed, 0, 0)
        self.student.train()
        optimizer = _sgd(self.student, self.spec)
        began, steps = monotonic(), 0
        for index, (inputs, targets) in enumerate(self._batches(0)):
            self._step(optimizer, inputs, targets, 0.0)
            if index == 0:
                warm = monotonic()
                first = warm - began
            steps = index
            if index == _TIMED_STEPS:
                break
        seconds = (monotonic() - warm) / steps if steps else first
        self.student.load_state_dict(self.start)
        optimizer.zero_grad(set_to_none=True)
        return seconds

    def _save(self) -> None:
        self.story.seconds = self._elapsed()
        self.began = monotonic()
        state, named = self.optimizer.state, self.student.named_parameters()
        buffers = {name: state[p].get("momentum_buffer") for name, p in named if p in state}
        pushes = {name: buffer for name, buffer in buffers.items() if isinstance(buffer, Tensor)}
        best = {} if self.story.best_epoch is None else self.best
        groups = {"now": self.student.state_dict(), "momentum": pushes, "best": best}
        stored.write(self.checkpoint, groups, {"origin": self.origin, **asdict(self.story)})

    def _resume(self) -> _Story | None:
        found = stored.read(self.checkpoint, self.origin)
        if found is None:
            return None
        groups, table = found
        story = _Story(**{key: table[key] for key in _Story.__dataclass_fields__})
        self.student.load_state_dict(groups["now"])
        for name, parameter in self.student.named_parameters():
            if name in groups.get("momentum", {}):
                self.optimizer.state[parameter]["momentum_buffer"] = groups["momentum"][name].to(self.device).clone()
        self.best = groups.get("best", self.start)
        self.resumed_epochs = story.epoch
        return story

    def _elapsed(self) -> float:
        return self.story.seconds + monotonic() - self.began

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.student.state_dict().items()}

    def _optimizer(self) -> torch.optim.SGD:
        return _sgd(self.student, self.spec)


def _sgd(module: nn.Module, spec: RecoverSpec) -> torch.optim.SGD:
    """SGD with Nesterov momentum; norms and biases (one axis or none) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=spec.learning_rate, momentum=spec.momentum, nesterov=spec.momentum > 0)


def _on(targets: Any, device: torch.device) -> Any:
    """The targets with every tensor among them on the device, in dicts, lists and tuples too; the rest as it is."""
    if isinstance(targets, Tensor):
        return targets.to(device)
    if isinstance(targets, dict):
        moved = copy.copy(targets)
        moved.update({key: _on(value, device) for key, value in targets.items()})
        return moved
    if isinstance(targets, list | tuple):
        parts = [_on(value, device) for value in targets]
        return type(targets)(*parts) if hasattr(targets, "_fields") else type(targets)(parts)
    return targets


def _seed(seed: int, attempt: int, epoch: int) -> None:
    """Seed the global generators of Python, numpy and torch for one epoch."""
    mixed = int(np.random.SeedSequence([seed, attempt, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Put the states of the global generators back afterwards."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
