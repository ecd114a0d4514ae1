"""The last layer of a network: what decides from the features of the last hidden layer."""

from __future__ import annotations

from torch import fx, nn


def last_layer(graph: fx.GraphModule) -> fx.Node | None:
    """The last convolution or linear layer that mixes channels on the way to the first output; None without one."""
    (end,) = (node for node in graph.graph.nodes if node.op == "output")
    leading = {end.all_input_nodes[0]}
    node: fx.Node
    for node in reversed(graph.graph.nodes):
        if node in leading:
            if node.op == "call_module" and _mixes(graph.get_submodule(str(node.target))):
                return node
            leading.update(node.all_input_nodes)
    return None


def _mixes(module: nn.Module) -> bool:
    """Whether it is a linear layer or a convolution other than a depthwise one."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1 or module.groups < module.in_channels
    return isinstance(module, nn.Linear)
