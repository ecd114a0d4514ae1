"""LDA deconvolution: how much a unit helps to tell classes apart at the last hidden layer, carried down by transposes.

1. F (N, d) is what the last layer reads. Where within-class covariances are small, the discriminants of
   S_b e = v S_w e lie along the neurons, and their utility is v_i = σ²_b,i / (σ²_w,i + ε).
2. A sample starts with the signal R_i = v_i [F_i > 0] / mean F_i⁺: where neuron i is active, so much that R ⊙ F is v_i
   on average.
3. R goes down: transposed convolution and linear layers, unpooling by argmax switches, norms by their scale, copies to
   both operands of an addition and to every part of a concatenation or product. All of these are the operators'
   vector-Jacobian products. At a non-linearity R is its product, rectified: only what is active and helps passes, which
   is the deconvnet's ReLU (Zeiler and Fergus 2014; Springenberg et al. 2015 with the mask).
4. The utility of a unit is the mean over samples of Σ (R ⊙ A)⁺ over positions, A what is read and R the reader's own
   signal, summed over all readers of the unit, so over a coupled group.

Grow-Push-Prune and Deep LDA (Tian, Arbel, Clark, arXiv 2009.13716, 1803.08134) publish no code and no scale. Chosen
here: R ⊙ A rather than R, because it does not change when a channel is scaled up and its readers down; and after each
step the signals of all tensors alive at that point are scaled so that Σ (R ⊙ A)⁺ is what it was at the top, for each
sample: a cut through the network, wherever it lies, carries the same total. So utilities of all groups are parts of one
quantity, Σ v, and one threshold over all of them gives the ratios. The neurons that carry little of Σ v are not masked
to zero, since a mask would leave ties in every group below it: v itself weighs them down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pipeline.last_layer import last_layer
from pipeline.nouns import Ranking
from pipeline.outputs import tensors
from pipeline.prune.capture import Network, ancestors
from pipeline.prune.criteria._damage import macs
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader
from pipeline.prune.maps import affordable
from pipeline.prune.neutral import describe
from profiles.errors import UsageError

NEEDS: tuple[str, ...] = ("inputs", "targets")
WORK = 1e11
"""Multiplications of all forward passes together, as far as LEAST samples allow."""
LEAST, MOST, CHUNK = 32, 256, 32
FLOOR = 1e-4
"""ε, as a share of the mean variance of the neurons."""
_LINEAR = {
    "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "InTraining",
    "dropout", "alpha_dropout", "contiguous", "clone", "float", "double", "half", "to", "type", "type_as", "neg",
    "negative",
}  # fmt: skip
"""Operators of one operand that are no non-linearity."""
_PASSES = ("layer_norm", "group_norm", "rms_norm", "normalize", "softmax")
"""Readers that give the same units on to other readers, which are credited instead."""


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by their share in telling the classes apart. Raises UsageError for outputs that are no logits."""
    top, targets = check(evidence)
    features = _features(evidence, top)
    seen = features.clamp_min(0).sum(2).mean(0)
    utility = discriminability(features.mean(2), targets)
    start = torch.where(seen > 0, utility / seen.clamp_min(torch.finfo(seen.dtype).tiny), 0)
    down = _Deconvolution(evidence.network, top, start, evidence.units)
    inputs, every = evidence.samples.joined(), evidence.samples.count
    count = min(max(LEAST, min(MOST, int(WORK / max(1, macs(evidence.topology))))), every)
    chosen = torch.randperm(every, generator=torch.Generator().manual_seed(evidence.seed))[:count]
    for part in torch.split(chosen, min(CHUNK, affordable(evidence.network))):
        down.descend(tuple(x[part] for x in inputs))
    return by_score(evidence.topology, down.utility / count)


@torch.no_grad()
def check(evidence: Evidence) -> tuple[Reader, Tensor]:
    """The last layer, and the class of every sample. Raises UsageError where this is no classification."""
    network = evidence.network
    (output,) = network.graph.graph.find_nodes(op="output")
    shape = network.shapes.get(output.all_input_nodes[0].name) or tensors(network.graph(*network.example))[0].shape
    return _last_layer(network), _classes(evidence.samples, shape)


def discriminability(features: Tensor, targets: Tensor) -> Tensor:
    """σ²_b / (σ²_w + ε) of every neuron, from features (N, d) and classes (N,)."""
    present, number = torch.unique(targets, return_inverse=True)
    member = F.one_hot(number, len(present)).to(features.dtype)
    means = (member.T @ features) / member.sum(0).unsqueeze(1)
    within = (features - means[number]).square().mean(0)
    between = (means[number] - features.mean(0)).square().mean(0)
    return between / (within + FLOOR * (within + between).mean() + torch.finfo(features.dtype).tiny)


def _classes(samples: Samples, given: Sequence[int]) -> Tensor:
    """The class of every sample. given: the outputs' shape. Raises UsageError where it is no classification."""
    targets = samples.targets
    assert targets is not None, "NEEDS names targets"
    hint = "--criterion fisher takes any output."
    if len(given) != 2 or given[1] < 2:
        shape = ", ".join(["N", *(str(size) for size in given[1:])])
        raise UsageError(f"the criterion 'lda-deconv' needs logits (N, classes), the network gives ({shape}).", hint)
    if targets.dim() != 1 or targets.is_floating_point():
        shape = ", ".join(["N", *(str(size) for size in targets.shape[1:])])
        kind = str(targets.dtype).removeprefix("torch.")
        raise UsageError(f"the criterion 'lda-deconv' needs a class a sample, and targets are {kind} ({shape}).", hint)
    if bool((targets == targets[0]).all()):
        raise UsageError(
            f"the criterion 'lda-deconv' needs two classes at least, all {len(targets)} targets are {int(targets[0])}.",
            "give calibration samples of more classes.",
        )
    return targets


def _last_layer(network: Network) -> Reader:
    """The last layer on the way to the first output."""
    last = last_layer(network.graph)
    found = [reader for reader in network.readers if last is not None and reader.op == last.name]
    if not found:
        raise UsageError(
            "the criterion 'lda-deconv' needs a last layer, and no convolution or linear layer leads to the output.",
            "--criterion fisher takes any network.",
        )
    return found[0]


@torch.no_grad()
def _features(evidence: Evidence, top: Reader) -> Tensor:
    """What the last layer reads, of all samples, (N, channels, everything else)."""
    found: list[Tensor] = []

    def keep(reader: Reader, x: Tensor) -> Tensor:
        if reader.op == top.op:
            found.append(x.movedim(reader.axis, 1).reshape(len(x), x.shape[reader.axis], -1))
        return x

    for batch in evidence.samples.inputs:
        TouchedRun(evidence.network.graph, evidence.network.readers, keep).run(*batch)
    return torch.cat(found)


Signal = Tensor | list[Tensor | None]
"""Of a node's value: a tensor, or one for each part of a tuple."""


class _Deconvolution(fx.Interpreter):
    """Runs a network and carries the signal at its last layer back down. utility: of each unit, summed over samples."""

    def __init__(self, network: Network, top: Reader, start: Tensor, units: int) -> None:
        super().__init__(network.graph)
        self.top, self.start = top, start
        self.utility = torch.zeros(units)
        self.kinds = {op.name: op.kind for op in describe(network)}
        self.readers = {reader.op: reader for reader in network.readers}
        # the parts of a tuple lie as what is picked from it
        tensors = {n: n if n.name in network.shapes else next(iter(n.users), n) for n in network.graph.graph.nodes}
        self.along = {n: network.samples.get(own.name, 0) for n, own in tensors.items()}
        reach = ancestors(network.graph.graph)
        given = {node for node in network.graph.graph.nodes if node.op == "placeholder"}
        self.fixed = {node for node, before in reach.items() if not before & given}
        self.values: dict[fx.Node, Any] = {}
        self.count = 0

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def descend(self, inputs: tuple[Tensor, ...]) -> None:
        """Add the utilities that these samples give."""
        self.count = len(inputs[0])
        with torch.no_grad():
            self.run(*inputs)
        order = list(self.values)
        place = next(i for i, node in enumerate(order) if node.name == self.top.op)
        source = order[place].all_input_nodes[0]
        features: Tensor = self.values[source]
        view = [1] * features.dim()
        view[self.top.axis] = -1
        signals: dict[fx.Node, Signal] = {source: (features > 0) * self.start.reshape(view)}
        total = self._carried(signals)
        self._credit(self.top, signals[source], features)
        for node in reversed(order[:place]):
            if node in signals and node.op != "placeholder":
                self._step(node, signals, total)
        self.values.clear()

    def _step(self, node: fx.Node, signals: dict[fx.Node, Signal], total: Tensor) -> None:
        """Replace the signal of a node by those of its operands, all of them scaled to carry the same total again."""
        pulled = self._pull(node, signals.pop(node))
        for operand, signal in pulled.items():
            signals[operand] = _sum(signals[operand], signal) if operand in signals else signal
        reader = self.readers.get(node.name)
        if reader is None and not self._rectifies(node):
            return
        carried = self._carried(signals)
        factor = torch.where(carried > 0, total / carried.clamp_min(torch.finfo(carried.dtype).tiny), 1)
        for other, signal in signals.items():
            signals[other] = _scaled(signal, factor, self.along[other])
        operand = node.all_input_nodes[0]
        if reader is not None and self.kinds[node.name] not in _PASSES and operand in pulled:
            self._credit(reader, _scaled(pulled[operand], factor, self.along[operand]), self.values[operand])

    def _pull(self, node: fx.Node, signal: Signal) -> dict[fx.Node, Signal]:
        """Vector-Jacobian product of one operator, rectified where it is a non-linearity."""
        leaves = {n: _leaf(self.values[n]) for n in node.all_input_nodes}
        with torch.enable_grad():
            args, kwargs = fx.map_arg(node.args, leaves.__getitem__), fx.map_arg(node.kwargs, leaves.__getitem__)
            given = getattr(self, node.op)(node.target, args, kwargs)
        pairs = [(given, signal)] if isinstance(given, Tensor) else list(zip(given, signal, strict=True))
        pairs = [(g, s) for g, s in pairs if s is not None and g.requires_grad]
        wanted = [(n, part) for n, leaf in leaves.items() if n not in self.fixed for part in _parts(leaf)]
        wanted = [(n, part) for n, part in wanted if isinstance(part, Tensor) and part.requires_grad]
        if not pairs or not wanted:
            return {}
        results, seeds = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, [part for _, part in wanted], seeds, allow_unused=True)
        by_part = {id(part): g for (_, part), g in zip(wanted, found, strict=True)}
        if self._rectifies(node):
            by_part = {key: None if g is None else g.clamp_min(0) for key, g in by_part.items()}
        pulled: dict[fx.Node, Signal] = {}
        for n, _ in wanted:
            leaf = leaves[n]
            if isinstance(leaf, Tensor):
                gradient = by_part[id(leaf)]
                pulled[n] = torch.zeros_like(leaf) if gradient is None else gradient
            else:
                pulled[n] = [by_part.get(id(part)) for part in leaf]
        return pulled

    def _rectifies(self, node: fx.Node) -> bool:
        if self.kinds.get(node.name) not in ("unary", "prelu"):
            return False
        named: Any = self.fetch_attr(str(node.target)).__class__ if node.op == "call_module" else node.target
        return str(getattr(named, "__name__", named)) not in _LINEAR

    def _carried(self, signals: dict[fx.Node, Signal]) -> Tensor:
        """Σ (R ⊙ A)⁺ over all tensors that carry a signal, (N,)."""
        parts = [
            _by_sample((part * value).clamp_min(0).movedim(self.along[node], 0), self.count)
            for node, signal in signals.items()
            for part, value in zip(_parts(signal), _parts(self.values[node]), strict=True)
            if part is not None
        ]
        return torch.stack(parts).sum(0)

    def _credit(self, reader: Reader, signal: Signal, x: Tensor) -> None:
        assert isinstance(signal, Tensor)
        share = (signal * x).clamp_min(0).movedim(reader.axis, 0).flatten(1).sum(1)
        ids = torch.from_numpy(reader.ids).long()
        self.utility.index_add_(0, ids[ids >= 0], share[ids >= 0])


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    return tuple(_leaf(part) for part in value) if isinstance(value, tuple | list) else value


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _sum(a: Signal, b: Signal) -> Signal:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    return [q if p is None else p if q is None else p + q for p, q in zip(a, b, strict=True)]


def _by_sample(x: Tensor, count: int) -> Tensor:
    """Sums over all but the samples, (count,), also where windows of a sample are folded into the leading axis."""
    if len(x) % count:
        return x.sum().expand(count) / count
    return x.reshape(count, -1).sum(1)


def _scaled(signal: Signal, factor: Tensor, along: int) -> Signal:
    """A signal times the factor of each sample, (count,). along: the axis of the samples."""
    if not isinstance(signal, Tensor):
        return [None if part is None else cast(Tensor, _scaled(part, factor, along)) for part in signal]
    if signal.shape[along] % len(factor):
        return signal * factor.mean()
    view = [1] * signal.dim()
    view[along] = -1
    return signal * factor.repeat_interleave(signal.shape[along] // len(factor)).reshape(view)
