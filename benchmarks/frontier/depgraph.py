"""Torch-Pruning 1.6.1 (Fang et al., DepGraph, CVPR 2023) as its README and its `reproduce` scripts run it.

Global pruning of all convolutions, the classifier ignored, scores of whole groups: magnitude (L2), Taylor (gradients
of calibration samples, taken anew at each step as its scripts do), BN scale and group norm. One pruner goes towards
nothing in 400 small steps (`iterative_steps=400, pruning_ratio=1.0`, its CIFAR script), and the networks on its way are
those that are searched. Small steps matter: the library refuses a step that would leave a group without a channel, and
rounds down what is kept, so that in one large step a group of 16 rounded to eighths is either whole or refused.

BN scale and group norm come after sparse training with the library's regularizers: its learning rate (0.01, a tenth at
60 % and at 80 %), no weight decay, and four epochs where the scripts, made for a day on GPUs, take a hundred: steps
that they have on top of the recovery that all get. What a regularizer takes away adds up over the steps, each by the
learning rate, so its coefficient is that of the script, times the sum of the script's learning rates over the sum of
ours: reg = reg_script * sum(lr_script) / sum(lr). The scripts: CIFAR (1e-5 for BN scale, 5e-4 for group norm with
scores over their maximum; 390 steps in each of 100 epochs), and for group norm on MobileNetV2 the one of ImageNet
(1e-4, scores over their mean, at most 0.7 of a layer; 5,004 steps in each of 150 epochs, 0.0045 times 0.98 each epoch).
It is done once a network, and its seconds are counted at every budget.

How far to go is searched so that the network, exported and optimised as all others, keeps the budget as measured.

The library cannot couple channels over the zero-padded shortcut of the CIFAR ResNets: as soon as a ratio touches the
residual streams, the forward pass fails ("mat1 and mat2 shapes cannot be multiplied"). As it is, these networks are
pruned as its documentation has it for layers that must stay: those on the residual streams are given as
`ignored_layers`, and the inner channels of each block are what is left to prune. Contestants that end in `-freed` prune
the same network with that shortcut written as a fixed convolution (shortcuts.py), residual streams and all.
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.frontier.arena import Arena, Entry
from benchmarks.frontier.shortcuts import fixed, freed
from benchmarks.frontier.trials import Trials, shapes

SPARSE_RATE, MILESTONES = 0.01, (0.6, 0.8)
CIFAR_RATES = 390 * (60 * 0.01 + 20 * 0.001 + 20 * 0.0001)
MOBILE_RATES = 5004 * sum(0.0045 * 0.98**epoch for epoch in range(150))
"""Sums of the learning rates of the library's scripts."""


@dataclass(frozen=True)
class Sparse:
    """A script's settings. reg: of its regularizer. rates: sum of its learning rates. most: of a layer's channels."""

    reg: float
    rates: float = CIFAR_RATES
    normalizer: str = "max"
    most: float = 1.0


REGULARIZED = {"bn-scale": Sparse(1e-5), "group-norm": Sparse(5e-4)}
"""Methods that train sparsely first."""
OF_NET = {("mobilenetv2_gtsrb", "group-norm"): Sparse(1e-4, MOBILE_RATES, "mean", 0.7)}
"""Networks that the library has a script of its own for."""
FREED = "-freed"
STEPS = 400
"""Of a pruner from the dense network to nothing."""
TAYLOR_BATCHES = 2
"""Calibration batches of 256 that each step takes its gradients from (the library's script: 640 images)."""


def enter(arena: Arena, budget: float, contestant: str, folder: Path) -> Entry:
    """The least pruned network that keeps the budget. Raises NeverMet."""
    method, _, rounded = contestant.removeprefix("torch-pruning-").removesuffix(FREED).rpartition("-")
    model, seconds = prepared(arena, method, freed(arena.model) if contestant.endswith(FREED) else arena.model)
    spent, begun = {"preparation": seconds}, time.monotonic()
    trials = Trials(arena, folder, Way(arena, model, method, int(rounded)))
    share = trials.least(budget, spent, begun)
    return trials.entry(share, spent, begun, {"pruning ratio": share})


def prepared(arena: Arena, method: str, model: nn.Module) -> tuple[nn.Module, float]:
    """The network that is pruned, dense or trained sparsely, and the seconds that it took."""
    return _sparse(arena, method, model) if method in REGULARIZED else (copy.deepcopy(model), 0.0)


def settings(net: str, method: str) -> Sparse:
    """Those of the script for a network and a method."""
    return OF_NET.get((net, method), REGULARIZED[method])


# --- pruning -------------------------------------------------------------------------------------------------------


class Way:
    """Share of pruning -> the network there, on one pruner's way to nothing; None from where none runs any more."""

    def __init__(self, arena: Arena, model: nn.Module, method: str, round_to: int) -> None:
        self.arena, self.method = arena, method
        self.model = copy.deepcopy(model)
        self.pruner = pruner(
            arena, self.model, method, pruning_ratio=1.0, iterative_steps=STEPS, round_to=round_to
        )  # fmt: skip
        self.passed: list[nn.Module | None] = [copy.deepcopy(model)]

    def __call__(self, share: float) -> nn.Module | None:
        """Goes on as far as it has to; what was passed is kept."""
        step = round(share * STEPS)
        while len(self.passed) <= step:
            self.passed.append(self._next(self.passed[-1]))
        return self.passed[step]

    def _next(self, last: nn.Module | None) -> nn.Module | None:
        if last is None:
            return None
        if self.method == "taylor":
            gradients(self.arena, self.model)
        self.pruner.step()
        if shapes(self.model) == shapes(last):
            return last
        try:
            with torch.no_grad():
                self.model(*self.arena.project.example())
        except RuntimeError:
            return None
        return fixed(copy.deepcopy(self.model))  # without gradients


def gradients(arena: Arena, model: nn.Module) -> None:
    """Those of the loss on calibration samples."""
    fixed(model, still=False).zero_grad()
    assert arena.samples.targets is not None
    targets = torch.split(arena.samples.targets, [len(batch[0]) for batch in arena.samples.inputs])
    for (inputs,), wanted in itertools.islice(zip(arena.samples.inputs, targets, strict=False), TAYLOR_BATCHES):
        arena.project.loss(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]


def pruner(arena: Arena, model: nn.Module, method: str, **options: Any) -> Any:
    """The library's pruner of a method. Its dictionaries are given, since those of its defaults are shared."""
    import torch_pruning as tp  # type: ignore[import-not-found, unused-ignore]

    if method in REGULARIZED:
        found = settings(arena.net, method)
        options = {"reg": found.reg, "max_pruning_ratio": found.most} | options
    normalizer = settings(arena.net, "group-norm").normalizer
    kinds: dict[str, tuple[Any, Any]] = {
        "magnitude": (tp.pruner.BasePruner, tp.importance.GroupMagnitudeImportance(p=2)),
        "taylor": (tp.pruner.BasePruner, tp.importance.GroupTaylorImportance()),
        "group-norm": (tp.pruner.GroupNormPruner, tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)),
        "bn-scale": (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance()),
    }
    build, importance = kinds[method]
    return build(
        model, arena.project.example(), importance=importance, global_pruning=True,
        ignored_layers=ignored(model, arena.classes), in_channel_groups={}, out_channel_groups={}, num_heads={},
        **options,
    )  # fmt: skip


def ignored(model: nn.Module, classes: int) -> list[nn.Module]:
    """The classifier; and where shortcuts are padded, every layer on the residual streams."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    blocks = [m for m in model.modules() if hasattr(m, "pad") and hasattr(m, "conv2")]
    if any(block.pad for block in blocks):
        layers += [model.conv1, *(block.conv2 for block in blocks)]  # type: ignore[list-item]
    return layers


# --- sparse training -----------------------------------------------------------------------------------------------


def _sparse(arena: Arena, method: str, model: nn.Module) -> tuple[nn.Module, float]:
    """A network after sparse training, from its file where it was trained before."""
    epochs = arena.pace.sparse_epochs
    assert arena.project.train is not None
    reg = strength(settings(arena.net, method), epochs * len(arena.project.train(0, 0)))
    kind = FREED if any(hasattr(module, "select") for module in model.modules()) else ""
    file = arena.folder / f"sparse-{method}{kind}-{epochs}-{reg:.2e}.safetensors"
    model = copy.deepcopy(model)
    if not file.is_file():
        begun = time.monotonic()
        train_sparsely(model, pruner(arena, model, method, reg=reg), arena, epochs)
        told = {"seconds": f"{time.monotonic() - begun:.1f}"}
        fresh = file.with_suffix(".new")
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, fresh, told)
        fresh.replace(file)
    with safe_open(file, "pt") as stored:
        seconds = float(stored.metadata()["seconds"])
        model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return model.eval(), seconds


def rates(total: int) -> list[float]:
    """Learning rate of each step of a sparse training."""
    ends = [max(1, int(total * at)) for at in MILESTONES]
    return [SPARSE_RATE * 0.1 ** sum(step >= end for end in ends) for step in range(total)]


def strength(script: Sparse, total: int) -> float:
    """The regularizer's coefficient that takes away in so many steps what the script does in all of its own."""
    return script.reg * script.rates / sum(rates(total))


def train_sparsely(model: nn.Module, regularizer: Any, arena: Arena, epochs: int) -> None:
    """SGD on labels whose gradients the library's regularizer adds to."""
    assert arena.project.train is not None
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), SPARSE_RATE, momentum=0.9)
    total = epochs * len(arena.project.train(0, 0))
    due = iter(rates(total))
    for epoch in range(epochs):
        model.train()
        regularizer.update_regularizer()
        for inputs, targets in arena.project.train(epoch, 0):
            optimizer.zero_grad()
            arena.project.loss(model(*inputs), targets).backward()  # type: ignore[no-untyped-call]
            regularizer.regularize(model)
            optimizer.param_groups[0]["lr"] = next(due)
            optimizer.step()
    model.eval()
