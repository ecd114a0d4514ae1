"""Pushes what tells the classes apart into few neurons of the last hidden layer, for pruning to find.

    extra = − SEPARATE · mean_i log(1 + v_i) + DECORRELATE · Σ_{i≠j} |S_w,ij| / (d tr S_w) + ALIGN · H(p) / log d

F (N, d) is what the last layer reads (last_layer.py; maps by their mean over space), σ²_b,i and σ²_w,i the variances of
neuron i between and within the classes of the batch, v_i = σ²_b,i / (σ²_w,i + ε), S_w the within-class covariance, H(p)
the entropy of p_i = v_i / Σ v. With S_w near diagonal the discriminants of S_b e = v S_w e lie along neurons, v_i is
what neuron i is worth to the task, and the entropy term gives the worth to few of them: what the criterion
`lda-deconv`, which starts at the same features, then carries down and prunes by.

The push of Grow-Push-Prune (Tian, Arbel, Clark, arXiv 2009.13716: separation up, covariances penalised, discriminants
aligned with a compact set of neurons); its formula is not public. Chosen here: neuron-wise separation with a logarithm,
covariances relative to the variances (scaling the features down does not help), all three terms of order one. ε is a
small share of the mean variance of the batch, so that a batch of one class or of one sample a class stays finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pipeline.last_layer import last_layer
from pipeline.recover.hooks.base import TrainHook
from profiles.errors import UsageError

SEPARATE, DECORRELATE, ALIGN = 0.3, 1.0, 1.0
FLOOR, TINY = 1e-2, 1e-12


class Hook(TrainHook):
    """Separation, decorrelation and alignment at the input of the last layer."""

    def __init__(self) -> None:
        self._attached: RemovableHandle | None = None
        self._read: Tensor | None = None

    def start(self, module: nn.Module, dense: nn.Module) -> None:
        """Listen to the last layer. Raises UsageError where there is none."""
        graph = module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)
        last = last_layer(graph)
        if last is None:
            raise UsageError(
                "the hook 'push' needs a last layer to read the last hidden layer from, and no convolution or linear "
                "layer leads to the output.",
                "leave 'push' out of the hooks.",
            )
        self._attached = module.get_submodule(str(last.target)).register_forward_pre_hook(self._listen)

    def _listen(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            axis = -1 if isinstance(layer, nn.Linear) else 1
            self._read = inputs[0].movedim(axis, 1).flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0]

    def extra_loss(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any, targets: Any) -> Tensor:
        """The push of this batch. Raises UsageError for targets that are not one class a sample."""
        if self._read is None:
            raise RuntimeError("extra_loss was asked before the network ran")
        features, self._read = self._read, None
        if not isinstance(targets, Tensor) or targets.shape != features.shape[:1] or targets.is_floating_point():
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise UsageError(
                f"the hook 'push' needs one class a sample, {len(features)} whole numbers; data.train gives {shape}.",
                "leave 'push' out of the hooks.",
            )
        return push(features, targets)

    def stop(self) -> None:
        """Listen no more."""
        if self._attached is not None:
            self._attached.remove()
        self._attached, self._read = None, None


def push(features: Tensor, targets: Tensor) -> Tensor:
    """The push loss of features (N, d) of these classes (N,), a scalar."""
    size = features.shape[1]
    present, number = torch.unique(targets, return_inverse=True)
    member = F.one_hot(number, len(present)).to(features.dtype)
    means = (member.T @ features) / member.sum(0).unsqueeze(1)
    centred = features - means[number]
    covariance = centred.T @ centred / len(features)
    within = covariance.diagonal()
    between = (means[number] - features.mean(0)).square().mean(0)
    worth = between / (within + FLOOR * (within + between).mean() + TINY)
    crossed = (covariance.abs().sum() - within.sum()) / (size * within.sum() + TINY)
    share = (worth + TINY) / (worth + TINY).sum()
    entropy = -(share * share.log()).sum() / torch.tensor(float(max(2, size))).log().to(features)
    return DECORRELATE * crossed + ALIGN * entropy - SEPARATE * worth.log1p().mean()
