"""What an operator is called where a rule of the user's names it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx, nn

from pipeline.prune import operators
from pipeline.prune.whole import Whole


def kind_of(value: Any) -> str:
    """`nets.Gate` of a module, an autograd function or a function of `nets`; `mylib::gate` of torch.library's."""
    if isinstance(value, operators.Applied):
        value = value.function
    if isinstance(value, Whole):
        return value.kind
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = value.overloadpacket if isinstance(value, torch._ops.OpOverload) else value
        return str(packet._qualified_op_name)
    if isinstance(value, torch.jit.ScriptModule):
        return _unmangled(value._c._type().qualified_name())
    if isinstance(value, torch.jit.ScriptFunction):
        return _unmangled(value.qualified_name)
    if isinstance(value, nn.Module):
        value = type(value)
    name = getattr(value, "__qualname__", getattr(value, "__name__", str(value)))
    home = getattr(value, "__module__", None)
    return f"{home}.{name}" if home else str(name)


def _unmangled(name: str) -> str:
    """TorchScript's name of a class or function as Python has it."""
    return re.sub(r"___torch_mangle_\d+\.", "", name.removeprefix("__torch__."))


def is_custom(kind: str) -> bool:
    """Whether a kind is an operator of torch.library that is not torch's own."""
    return "::" in kind and not kind.startswith(("aten::", "prims::"))


def is_torch(target: Any) -> bool:
    """Whether a function is torch's own, or one of Python's operators."""
    home = str(getattr(target, "__module__", None) or "torch")
    return home.split(".")[0] in ("torch", "_operator", "math") and not is_custom(kind_of(target))


def kind_of_node(graph: fx.GraphModule, node: fx.Node) -> str:
    """`kind_of` what a node calls, empty for what is no module and no function."""
    if node.op == "call_module":
        return kind_of(graph.get_submodule(str(node.target)))
    return kind_of(node.target) if node.op == "call_function" else ""
