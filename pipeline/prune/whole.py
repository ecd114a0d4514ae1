"""A module that capture leaves whole: it runs as it is, and the ONNX exporter sees every branch of it.

The exporter follows one run of the network: of an `if` on data it would write the branch that this run took. So for it
the forward is compiled by TorchScript, whose `if` and `while` become If and Loop of ONNX, to a function that takes the
module's tensors as arguments: they keep their names. A module that is TorchScript already runs through that function
always, since copies of it would not be trainable; what is in it behaves as in eval mode, in training too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from profiles.errors import DeployError

HINT = "write its forward so that torch.jit.script takes it, or choose between both results with torch.where."
OWN = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Compiled:
    """A forward as a function of its inputs and of tensors, given by name: the module's, or constants of its own.

    inputs: name -> default of each, or None.
    """

    function: Any
    inputs: Mapping[str, Any]
    names: tuple[str, ...]
    constants: Mapping[str, Tensor]

    def __deepcopy__(self, memo: Any) -> Compiled:
        return self

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        given = {**self.inputs, **dict(zip(self.inputs, inputs, strict=False)), **keywords}
        tensors = (self.constants[n] if n in self.constants else _tensor(module, n) for n in self.names)
        return self.function(*given.values(), *tensors)


class Whole(nn.Module):
    """A module whose channels stay. Its tensors and submodules are those of the module, under the same names.

    kind: what it is called. on_data: its forward asks what only data can answer: exporting it raises DeployError where
    that could not be compiled. A forward that asks nothing of the data is then exported as it runs.
    """

    _module: Any

    def __init__(self, module: nn.Module, kind: str, *, on_data: bool) -> None:
        super().__init__()
        self.kind, self.on_data, self.reason = kind, on_data, ""
        self.compiled: Compiled | None = None
        self.__dict__["_module"] = None
        try:
            self.compiled, tensors = _compile(module)
        except Exception as error:  # noqa: BLE001  TorchScript's compiler raises what it likes
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.reason = lines[0].rstrip(":.") if lines else type(error).__name__
        if not isinstance(module, torch.jit.ScriptModule):
            _replace_scripts(module)
            self.__dict__["_module"] = module
            self.__dict__.update({name: module.__dict__[name] for name in OWN})
        elif self.compiled is not None:
            self.compiled = replace(self.compiled, constants={})
            own = {name for name, _ in module.named_parameters()}
            for name, value in tensors.items():
                _put(self, name, nn.Parameter(value.detach(), value.requires_grad) if name in own else value.detach())
        else:
            message = f"the network cannot be captured: TorchScript in it has no function: {self.reason}."
            raise DeployError(message, "give the torch.nn.Module that it was made from.")
        self.train(module.training)

    def train(self, mode: bool = True) -> Whole:
        """Training mode of everything in it."""
        if self._module is not None:
            self._module.training = mode
        return super().train(mode)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        exporting = torch.onnx.is_in_onnx_export()
        if self.compiled is not None and (exporting or self._module is None):
            return self.compiled(self, inputs, keywords)
        if exporting and self.on_data:
            message = (
                f"the network cannot be exported to ONNX: {self.kind} reads numbers out of its data, and "
                f"TorchScript cannot compile it: {self.reason}."
            )
            raise DeployError(message, HINT)
        return self._module(*inputs, **keywords)

    def extra_repr(self) -> str:
        return self.kind


def _replace_scripts(module: nn.Module) -> None:
    """TorchScript inside a module becomes `Whole` too: copies of it would not be trainable."""
    done: list[str] = []
    for path, inner in list(module.named_modules()):
        if path and isinstance(inner, torch.jit.ScriptModule) and not any(path.startswith(f"{p}.") for p in done):
            module.set_submodule(path, Whole(inner, inner.original_name, on_data=False))
            done.append(path)


def _compile(module: nn.Module) -> tuple[Compiled, dict[str, Tensor]]:
    """The forward as a function, and the tensors that it takes, by the names that they have in the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = module if isinstance(module, torch.jit.ScriptModule) else torch.jit.script(module)
    inside: Any = torch._C  # its stubs know these calls by other types
    frozen = inside._freeze_module(script.eval()._c, [], True, True)
    forward = frozen._get_method("forward")
    inputs = {each.name: each.default_value for each in forward.schema.arguments[1:]}
    graph, tensors = inside._jit_pass_lower_graph(forward.graph, frozen)
    known = {_memory(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
    names = tuple(known.get(_memory(value), f"constant_{number}") for number, value in enumerate(tensors))
    given = dict(zip(names, tensors, strict=True))
    constants = {name: value for name, value in given.items() if name not in known.values()}
    return Compiled(inside._create_function_from_graph("forward", graph), inputs, names, constants), given


def _memory(value: Tensor) -> tuple[int, tuple[int, ...]]:
    return value.data_ptr(), tuple(value.shape)


def _put(root: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value)


def _tensor(root: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(root.get_submodule(path), last)
    return found
