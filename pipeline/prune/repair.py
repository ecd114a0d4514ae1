"""Repair without training: batch-norm statistics, stand-ins (merge.py), or sequential least squares.

Least squares walks through the pruned network in execution order. At each layer the inputs X are those of the *pruned*
network as repaired so far, the target T is the dense network's value where the layer's output lands (taps.py), and

    min_{W, b}  ‖ s ∘ (X W + b) + h + other − T ‖² + λ ‖ W − W₀ ‖²,      λ = ridge · tr(XᵀX) / d

is solved for every output channel, the ridge pulling toward the weights that were there. Where only a ReLU reads the
result, negative targets ask for nothing but "not positive": T is replaced by min(prediction, 0) there, and solved again
a few times with the same factor. b goes into the layer's bias, or into the running mean of its batch norm.

A repair is kept only where it does not take the network's outputs on the samples further from the dense network's: the
statistics of few samples, and stand-ins that are no twins, can. What comes back then is the cut network as it is.

Sources: methods.md's row on sequential least squares follows He et al. (Channel pruning, ICCV 2017) and ReLU-aware
asymmetric reconstruction (Zhang et al., 2015); aiming the layer before a removed run at the run's output is ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.nouns import Cut, PruningPlan, Ranking
from pipeline.prune.capture import Network
from pipeline.prune.evidence import Answers, Samples, mean_divergence, outputs_of
from pipeline.prune.maps import Gram, grams
from pipeline.prune.merge import layerwise, merge
from pipeline.prune.plan import resolve
from pipeline.prune.taps import DenseTaps, Tap, aims, find_tap, is_layer, patches, set_bias
from profiles.errors import UsageError

RIDGE = 1e-3
HEAD_RIDGE = 1e-2
RELU_TURNS = 6
LIVE_MIB = 768
MODES = ("none", "bn", "merge", "layerwise", "least-squares")
NEED_INPUTS = ("bn", "layerwise", "least-squares")


def affordable(network: Network) -> int:
    """How many samples a repair can run at once: six tensors of the largest size together take LIVE_MIB."""
    largest = max(4 * math.prod(shape[1:]) for shape in network.shapes.values())
    return max(32, (LIVE_MIB << 20) // (6 * largest))


def repair(
    pruned: fx.GraphModule,
    network: Network,
    plan: PruningPlan,
    samples: Samples,
    mode: str = "least-squares",
    *,
    rankings: Mapping[str, Ranking] | None = None,
    taps: DenseTaps | None = None,
    moments: Mapping[str, Gram] | None = None,
    reads: Mapping[str, Sequence[Gram]] | None = None,
    dense: Sequence[Answers] | None = None,
    progress: Callable[[float], None] | None = None,
) -> fx.GraphModule:
    """A repaired copy of a pruned network, in eval mode; neither argument is touched.

    mode: one of MODES; "merge" needs the rankings that the plan was made with. taps, moments, reads, dense: dense
    values, Gram matrices of layers and of the units that they read, and the dense network's outputs (one for each
    batch) of the same samples, to share between calls. "merge" and "layerwise" begin at the dense network's weights.
    With samples the mean divergence from the dense network never rises on them: a repair that would raise it is left
    out. Raises UsageError for a mode that needs what is not there.
    """
    if mode in NEED_INPUTS and not samples.count:
        hint = "add data.calibration to deploy.toml, or --set prune.repair=merge."
        raise UsageError(f"the repair '{mode}' needs calibration inputs, and the project has none.", hint)
    cut = copy.deepcopy(pruned).eval()
    if mode == "none":
        return cut
    if mode == "merge":
        bare = [id for id in plan.kept if id not in (rankings or {})]
        if bare:
            message = (
                f"the repair 'merge' needs the rankings of all {len(plan.kept)} groups cut; {len(bare)} have none."
            )
            raise UsageError(message, "pass the rankings that the plan was made with.")
        repaired = merge(network, plan, rankings or {}, samples.joined() if samples.count else None, reads).eval()
    elif mode == "layerwise":
        repaired = layerwise(network, plan, moments or grams(network, samples.joined())).eval()
    else:
        repaired = copy.deepcopy(cut)
        if mode == "bn":
            _recalibrate(repaired, samples)
        else:
            taps = taps or DenseTaps(network, samples.joined())
            fit = SequentialFit(repaired, network, resolve(network.topology, plan), taps, progress=progress)
            fit.run(*taps.inputs)
    if not samples.count:
        return repaired
    dense = dense or outputs_of(network.graph, samples, network.answers)
    before, after = (mean_divergence(model, samples, dense, network.answers) for model in (cut, repaired))
    return repaired if after <= before or not math.isfinite(before) else cut


@torch.no_grad()
def _recalibrate(model: nn.Module, samples: Samples) -> None:
    """Running statistics of every batch norm from the samples: averages over batches, weighed by their size.

    Batches of one sample are left out; where there are no others, the statistics stay as they are.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    saved = [m.momentum for m in norms]
    seen = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if not seen[norm]:
            norm.reset_running_stats()
        seen[norm] += len(given[0])
        norm.momentum = len(given[0]) / seen[norm]

    hooks = [norm.train().register_forward_pre_hook(weigh) for norm in norms]
    for batch in samples.inputs:
        if len(batch[0]) > 1:
            model(*batch)
    for norm, momentum, hook in zip(norms, saved, hooks, strict=True):
        hook.remove()
        norm.momentum = momentum
        norm.eval()


class SequentialFit(fx.Interpreter):
    """Runs a pruned network over the calibration samples and refits each layer just before it runs.

    turns: how often layers before a ReLU are solved again. only: the layers that are refitted; left out, all. known:
    names of nodes whose values are there before the run begins, wherever they lie.
    """

    def __init__(
        self,
        pruned: fx.GraphModule,
        network: Network,
        cut: Cut,
        taps: DenseTaps,
        *,
        turns: int = RELU_TURNS,
        only: Container[fx.Node] | None = None,
        known: Iterable[str] = (),
        progress: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(pruned)
        self.pruned, self.taps, self.cut = pruned, taps, cut
        self.turns, self.progress = turns, progress
        self.aimed = self._aimed(network, aims(network, cut.dropped), set(known))
        self.layers = [node for node in self.aimed if only is None or node in only]

    def _aimed(self, network: Network, aim: Mapping[str, str], done: set[str]) -> dict[fx.Node, tuple[Tap, str]]:
        """Each layer's tap when all before it is computed, and the dense node whose value is wanted there."""
        found: dict[fx.Node, tuple[Tap, str]] = {}
        for node in self.pruned.graph.nodes:
            if is_layer(self.pruned, node):
                tap = find_tap(network, self.pruned, node, done)
                found[node] = tap, aim.get(tap.node, tap.node)
            done.add(node.name)
        return found

    @torch.no_grad()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Refit and run; the result is the output of the repaired network."""
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            self._refit(n, x)
            if self.progress is not None:
                self.progress((self.layers.index(n) + 1) / len(self.layers))
        return super().run_node(n)

    def _refit(self, node: fx.Node, x: Tensor) -> None:
        tap, wanted = self.aimed[node]
        if wanted not in self.taps:
            return
        layer = self.pruned.get_submodule(str(node.target))
        seen = patches(layer, self.taps.part(node.all_input_nodes[0].name, x), self.taps.limit)
        target = self.taps.value(wanted)
        kept = self.cut.params.get(f"{node.target}.weight", {}).get(0)
        if kept is not None:
            target = target[:, torch.from_numpy(kept)]
        if seen.shape[0] != target.shape[0]:
            return
        if tap.other is not None:
            other = self.env[next(m for m in self.env if m.name == tap.other)]
            target = target - self.taps.rows(tap.other, other, isinstance(layer, nn.Linear))
        _solve(layer, self._norm(tap), seen, target, self.turns if tap.relu else 1)

    def _norm(self, tap: Tap) -> nn.BatchNorm2d | None:
        norm = self.pruned.get_submodule(tap.norm) if tap.norm else None
        return norm if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) else None  # type: ignore[return-value]


def _solve(layer: nn.Module, norm: nn.BatchNorm2d | None, patches: Tensor, target: Tensor, turns: int) -> None:
    """Refit one layer in place. patches (rows, groups, d), target (rows, out): t minus the other operand."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    groups, d = patches.shape[1], patches.shape[2]
    old = weight.detach().reshape(groups, -1, d)  # (groups, out per group, d)
    scale, shift = torch.ones(target.shape[1]), torch.zeros(target.shape[1])
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        gamma = norm.weight.detach() if norm.affine else torch.ones_like(norm.running_var)
        beta = norm.bias.detach() if norm.affine else torch.zeros_like(norm.running_var)
        scale = gamma / torch.sqrt(norm.running_var + norm.eps)
        shift = beta - scale * norm.running_mean
    offset: Tensor = layer.bias.detach() if layer.bias is not None else torch.zeros(target.shape[1])  # type: ignore[operator]
    alive = scale.abs() > 1e-3 * scale.abs().max().clamp_min(1e-12)
    safe = torch.where(alive, scale, torch.ones_like(scale))

    mean = patches.mean(0)  # (groups, d)
    centred = (patches - mean).transpose(0, 1)  # (groups, rows, d)
    ridge = _Ridge(centred, HEAD_RIDGE if isinstance(layer, nn.Linear) else RIDGE)
    if ridge.singular:
        return
    new, bias = old.clone(), offset.clone()
    for turn in range(turns):
        goal = target
        if turn:
            landed = _predict(centred, mean, new, bias) * scale + shift
            goal = _not_positive(target, landed)
        wanted = (goal - shift) / safe  # what X W + b should be
        residual = wanted - wanted.mean(0)
        residual = residual.reshape(-1, groups, old.shape[1]).transpose(0, 1) - centred @ old.transpose(1, 2)
        new = old + ridge.solve(residual).transpose(1, 2)
        bias = wanted.mean(0) - torch.einsum("god,gd->go", new, mean).reshape(-1)
    if not bool(torch.isfinite(new).all() and torch.isfinite(bias).all()):
        return
    mask = alive.reshape(groups, -1, 1)
    weight.data.copy_(torch.where(mask, new, old).reshape(weight.shape))
    set_bias(layer, norm, torch.where(alive, bias, offset), offset)


class _Ridge:
    """Ridge regression on patches X (groups, rows, d), by whichever of two equal forms has the smaller matrix.

    With more rows than columns (XᵀX + λI)⁻¹ Xᵀ, else Xᵀ (XXᵀ + λI)⁻¹; λ is `ridge` times the mean square of a column.
    """

    def __init__(self, patches: Tensor, ridge: float) -> None:
        rows, d = patches.shape[1:]
        self.patches, self.wide = patches, rows < d
        gram = patches @ patches.transpose(1, 2) if self.wide else patches.transpose(1, 2) @ patches
        mean = gram.diagonal(dim1=1, dim2=2).sum(1) / d
        damped = gram + torch.diag_embed((ridge * mean + 1e-8)[:, None].expand(-1, gram.shape[1]))
        self.factor, info = torch.linalg.cholesky_ex(damped.double())
        self.singular = bool(info.any())

    def solve(self, target: Tensor) -> Tensor:
        """Weights (groups, d, out) that bring the patches to a target (groups, rows, out)."""
        if self.wide:
            return self.patches.transpose(1, 2) @ torch.cholesky_solve(target.double(), self.factor).float()
        return torch.cholesky_solve((self.patches.transpose(1, 2) @ target).double(), self.factor).float()


def _not_positive(target: Tensor, landed: Tensor) -> Tensor:
    """Where the dense value is negative, any value that is not positive will do."""
    return torch.where(target > 0, target, landed.clamp_max(0))


def _predict(centred: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = (centred @ weight.transpose(1, 2)).transpose(0, 1)  # (rows, groups, out)
    y = y + torch.einsum("god,gd->go", weight, mean)
    return y.reshape(y.shape[0], -1) + bias
