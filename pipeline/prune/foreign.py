"""Calls that torch.fx does not see while it traces, and that would take a proxy for a tensor.

autograd functions   `F.apply(x)`, also where `apply` was kept under another name, becomes a call of a module that
                     applies it (operators.Applied), so that its own backward stays
scripted functions   become such a call too: nobody can look into them
wrapped functions    what a user wrapped to keep torch.fx out is traced, since its control flow is on shapes; it stays
                     one operator only where a rule names it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import utils as functorch
from torch.autograd.function import _SingleLevelFunction
from torch.fx import _symbolic_trace as fx_trace

from pipeline.prune.proxy import known

Apply = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def caught(kinds: Collection[str], apply: Apply) -> Iterator[None]:
    """While tracing: such calls reach us. kinds: operators that rules name. apply: records one."""
    with _unwrapped(kinds), _applied(apply), _scripted(apply):
        yield


@contextmanager
def _unwrapped(kinds: Collection[str]) -> Iterator[None]:
    wrapped = fx_trace._wrapped_fns_to_patch
    kept = dict(wrapped)
    wrapped.clear()
    wrapped.update({key: table for key, table in kept.items() if f"{table.get('__name__')}.{key[1]}" in kinds})
    try:
        yield
    finally:
        wrapped.clear()
        wrapped.update(kept)


@contextmanager
def _applied(apply: Apply) -> Iterator[None]:
    """`Function.apply` asks its base class last, and unpacks its arguments before: both let proxies through."""
    unwrap = functorch.unwrap_dead_wrappers

    def unpacked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if any(known(a) for a in args) else unwrap(args)

    def called(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(known(a) for a in (*args, *kwargs.values())):
            return apply(cls, args, kwargs)
        return super(_SingleLevelFunction, cls).apply(*args, **kwargs)

    functorch.unwrap_dead_wrappers = unpacked
    _SingleLevelFunction.apply = classmethod(called)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        functorch.unwrap_dead_wrappers = unwrap
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


@contextmanager
def _scripted(apply: Apply) -> Iterator[None]:
    call = torch.jit.ScriptFunction.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(known(a) for a in (*args, *kwargs.values())):
            return apply(self, args, kwargs)
        return call(self, *args, **kwargs)

    torch.jit.ScriptFunction.__call__ = called  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.jit.ScriptFunction.__call__ = call  # type: ignore[method-assign]
