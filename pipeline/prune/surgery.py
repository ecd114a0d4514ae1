"""Surgery: a plan carried out on a copy of the captured network.

Parameters are sliced, constants rewritten, branches removed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.nouns import Cut, PruningPlan
from pipeline.prune import operators
from pipeline.prune.capture import Network
from pipeline.prune.layout import as_before
from pipeline.prune.plan import resolve
from profiles.errors import DeployError

Shared = dict[int, tuple[Tensor, Tensor]]


def prune(network: Network, plan: PruningPlan) -> fx.GraphModule:
    """A trainable copy of the network with the plan carried out; the network itself is never touched.

    Raises DeployError for a plan that is not of this network.
    """
    return carry_out(network.graph, resolve(network.topology, plan))


def carry_out(graph: fx.GraphModule, cut: Cut, *, share: bool = False) -> fx.GraphModule:
    """Copy a captured graph and cut it. share: parameters that are not cut stay those of the graph."""
    pruned = copy.deepcopy(graph, {id(p): p for p in graph.parameters()} if share else {})
    if cut.dropped:
        _drop_blocks(pruned, cut)
    shared: Shared = {}
    left = dict(pruned.named_modules())
    for name, axes in cut.params.items():
        if name.rpartition(".")[0] not in left:  # a layer that only removed blocks shared
            continue
        _slice(pruned, name, {axis: torch.from_numpy(kept) for axis, kept in axes.items()}, shared)
    for node, (kind, _, value) in cut.constants.items():
        _rewrite(pruned.get_submodule(node), kind, value)
    for module in pruned.modules():
        _refit(module)
    pruned.recompile()
    return pruned


def _drop_blocks(pruned: fx.GraphModule, cut: Cut) -> None:
    adds = {block.add: block.skip for block in cut.dropped}
    for node in list(pruned.graph.nodes):
        if node.op == "call_module" and node.target in adds:
            node.replace_all_uses_with(node.args[adds[str(node.target)]])
    pruned.graph.eliminate_dead_code()
    pruned.delete_all_unused_submodules()


def _slice(pruned: fx.GraphModule, name: str, axes: dict[int, Tensor], shared: Shared) -> None:
    """Cut one tensor. shared: id of a tensor that was cut -> (kept alive) itself and what it became, for its names."""
    path, _, leaf = name.rpartition(".")
    owner = pruned.get_submodule(path)
    value: Tensor = getattr(owner, leaf)
    if id(value) in shared:
        setattr(owner, leaf, shared[id(value)][1])
        return
    cut = value.detach()
    for axis, kept in axes.items():
        cut = cut.index_select(axis, kept)
    if isinstance(value, nn.Parameter):
        made: Tensor = nn.Parameter(as_before(cut, value), requires_grad=value.requires_grad)
    else:
        made = as_before(cut, value)
    shared[id(value)] = (value, made)
    setattr(owner, leaf, made)


def _rewrite(module: nn.Module, kind: str, value: tuple[int, ...]) -> None:
    if isinstance(module, operators.ChannelPad):
        module.before, module.after = value
    elif isinstance(module, operators.ChannelSplit):
        module.sizes = value
    elif isinstance(module, operators.ChannelSlice):
        module.start, module.stop = value
    elif isinstance(module, operators.Reshape):
        module.sizes = value
    elif isinstance(module, operators.ChannelGather):
        module.indices = torch.tensor(value, dtype=torch.int64)
    else:
        raise AssertionError(f"a constant of kind {kind} names a {type(module).__name__}")


def _refit(module: nn.Module) -> None:
    """Bring a layer's own numbers in line with its parameters."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        out, into = weight.shape[:2]
        if module.groups > 1 and into == 1 and module.groups == module.in_channels:
            module.groups = out // (module.out_channels // module.groups)
        module.out_channels, module.in_channels = out, into * module.groups
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = weight.shape[0]
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(module.running_mean, Tensor):
        module.num_features = module.running_mean.shape[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase) and weight is not None:
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()


def restore(pruned: fx.GraphModule, state: Mapping[str, Tensor], where: str) -> fx.GraphModule:
    """Load the weights of a pruned network into its structure, in place; biases that a repair has added are made.

    Raises DeployError naming the first tensor that is missing, unexpected or of another shape.
    """
    for name in state:
        path, _, leaf = name.rpartition(".")
        try:
            owner = pruned.get_submodule(path)
        except AttributeError:
            continue
        if leaf == "bias" and getattr(owner, "bias", 0) is None:
            learns = any(p.requires_grad for p in owner.parameters())
            owner.bias = nn.Parameter(torch.zeros(state[name].shape), learns)
    own = pruned.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            raise DeployError(
                f"{where}: the tensor '{name}' is {'missing' if name not in state else 'unexpected'}.",
                "the plan and the weights are not of one run.",
            )
        if own[name].shape != state[name].shape:
            raise DeployError(
                f"{where}: '{name}' is {tuple(state[name].shape)}, and the plan makes it {tuple(own[name].shape)}."
            )
    pruned.load_state_dict(dict(state))
    return pruned
