"""Proxies of torch.fx that know the value they stand for: what a forward asks of a tensor without data is answered."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, fx
from torch.fx.node import map_aggregate


class OnData(TypeError):
    """The forward asks what only data can answer."""


class Known(fx.Proxy):
    """A proxy with its value: a tensor, or a tuple, list or dict that holds some."""

    value: Any = None
    base: Any = None  # the tensor that this is a part of, and the index

    @property
    def __class__(self) -> Any:  # isinstance(x, Tensor) holds where the value is one
        return Tensor if isinstance(self.value, Tensor) else Known

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise TypeError("the class of a proxy is fixed")

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.value, dict) and name in ("items", "keys", "values", "get", "copy"):
            return getattr({key: self._part(key) for key in self.value}, name)
        found = getattr(self.value, name)
        if isinstance(found, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return fx.proxy.Attribute(self, name) if callable(found) else found

    def _part(self, key: Any) -> Any:
        return operator.getitem(cast(Any, self), key)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(list(self.value))
        return iter([self._part(i) for i in range(len(self.value))])

    def __contains__(self, key: Any) -> bool:
        if isinstance(self.value, Tensor):
            raise OnData("a question to the data (in)")
        return key in self.value

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        if isinstance(self.value, Tensor):
            raise OnData("control flow on data (if, while, and, or)")
        return bool(self.value)

    def __int__(self) -> int:
        raise OnData("a number taken from data (int)")

    def __float__(self) -> float:
        raise OnData("a number taken from data (float)")

    def __index__(self) -> int:
        raise OnData("an index taken from data")

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("the forward writes into an activation")


def known(value: Any) -> bool:
    """Whether this is a proxy itself; isinstance would take it for a tensor."""
    return cast(Any, type(value)) is Known


def unproxied(value: Any) -> Any:
    """The same with the value in the place of every proxy."""
    return map_aggregate(value, lambda a: cast(Any, a).value if known(a) else a)


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in it, through tuples, lists and dicts."""
    if isinstance(value, dict):
        return any(holds_tensor(v) for v in value.values())
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(holds_tensor(v) for v in value))


def numbers(value: Any, place: str = "") -> dict[str, Any]:
    """What in it is neither a tensor nor None, by where it is, through tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {name: part for key, each in value.items() for name, part in numbers(each, f"{place}[{key!r}]").items()}
    return {} if value is None or isinstance(value, Tensor) else {place: value}


def without_data(value: Any) -> Any:
    """The same with every tensor on torch's device `meta`, through tuples, lists and dicts."""
    return map_aggregate(value, lambda a: cast(Any, a.to("meta") if isinstance(a, Tensor) else a))


def shapes_of(value: Any) -> Any:
    """Shape of a tensor, a list of those of a sequence, None of anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [shapes_of(v) for v in value]
    return None
