"""The folder is the registry: in a plug-in package `base.py` is the contract and every sibling file is one plug-in.

A plug-in's name is its file name with `_` read as `-`. A file is imported only when its plug-in is used, so a
list of names costs no import of torch, onnx or tensorrt.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from profiles.errors import UsageError, near_miss


def names(package: str) -> list[str]:
    """Names of the plug-ins in a package, sorted; nothing of them is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"no plug-in package named '{package}'.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = (path.stem for path in folder.glob("*.py"))
    return sorted(stem.replace("_", "-") for stem in files if stem != "base" and not stem.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import one plug-in by name; an unknown name is a UsageError that says what it is near to."""
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1]
        singular = {"criteria": "criterion", "passes": "pass"}.get(kind, kind.removesuffix("s"))
        raise UsageError(f"no {singular} named '{name}'. {near_miss(name, known)}", f"deploy list {kind}")
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")


def summary(package: str, name: str) -> str:
    """First line of a plug-in's docstring, read from its source without importing it."""
    import ast

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"no plug-in package named '{package}'.")
    path = Path(next(iter(spec.submodule_search_locations))) / f"{name.replace('-', '_')}.py"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.split("\n", 1)[0].strip()
