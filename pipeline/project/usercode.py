"""The user's own modules: found beside their deploy.toml, kept apart from ours and from those of other projects.

The project's folders stand at the end of `sys.path`, so nothing of theirs can replace an installed module; a module
of theirs that would be hidden for that reason is an error, not a surprise. What a project imported leaves
`sys.modules` when another project is used, and comes back with it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from profiles.errors import DeployError, UsageError, near_miss

OURS = ("pipeline", "profiles", "targets")
_HOUSE = Path(__file__).resolve().parents[2]
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist", "runs"}


@dataclass(frozen=True)
class Reference:
    """A callable of the user's, as deploy.toml names it: `key = "module:function"`."""

    key: str
    text: str
    call: Callable[..., Any]
    line: int | None

    @property
    def place(self) -> str:
        """`data:evaluate (data.py, line 12)`, as far as it is known."""
        code = getattr(self.call, "__code__", None)
        return f"{self.text} ({Path(code.co_filename).name}, line {self.line})" if code else self.text


@dataclass
class UserCode:
    """The modules of one project. folders: its own folder first, then those that `path` names."""

    folders: tuple[Path, ...]
    _modules: dict[str, ModuleType] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """Every Python file of the project, sorted; hidden folders, environments and build folders are left out."""
        own = [path for path in self.folders[0].rglob("*.py") if not _left_out(path.relative_to(self.folders[0]))]
        shared = [path for folder in self.folders[1:] for path in folder.glob("*.py")]
        return sorted({*own, *shared})

    def owns(self, file: str | None) -> bool:
        """Whether a source file lies in one of the folders and is the user's: not ours, not of an environment there."""
        if file is None:
            return False
        path = Path(file).resolve()
        inside = [path.relative_to(folder) for folder in self.folders if path.is_relative_to(folder)]
        ours = any(path.is_relative_to(_HOUSE / name) for name in OURS)
        return not ours and any(not _left_out(part) for part in inside)

    def activate(self) -> None:
        """Make this project's modules the importable ones; those of the project before it step aside."""
        global _active
        if _active is self:
            return
        if _active is not None:
            _active.leave()
        sys.path.extend(str(folder) for folder in self.folders)
        sys.modules.update(self._modules)
        _active = self

    def leave(self) -> None:
        """Take the folders off `sys.path` and the modules out of `sys.modules`; `activate` brings them back."""
        global _active
        if _active is not self:
            return
        _active = None
        for folder in self.folders:
            if str(folder) in sys.path:
                sys.path.remove(str(folder))
        self._modules = {name: module for name, module in sys.modules.items() if self._gave(name, module)}
        for name in self._modules:
            del sys.modules[name]

    def _gave(self, name: str, module: ModuleType) -> bool:
        """Whether a module has its name from one of the folders.

        What lies there under another name (`__main__`, a package that a folder is a part of) is the process's.
        """
        file: str | None = getattr(module, "__file__", None)
        if file is None or not self.owns(file):
            return False
        path, top = Path(file).resolve(), name.partition(".")[0]
        inside = [path.relative_to(folder) for folder in self.folders if path.is_relative_to(folder)]
        return any(part.parts[0] in (top, f"{top}.py") for part in inside)

    def resolve(self, key: str, text: str) -> Reference:
        """The callable that `module:function` names. Raises UsageError for a wrong name, else DeployError."""
        module_name, _, function = text.partition(":")
        if not module_name or not function.isidentifier():
            hint = "write it like nets:resnet20, with nets.py beside deploy.toml."
            raise UsageError(f"deploy.toml: {key} is '{text}', which is not 'module:function'.", hint)
        module = self._import(key, text, module_name)
        found = getattr(module, function, None)
        if found is None:
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            near = near_miss(function, names)
            raise UsageError(f"deploy.toml: {key} is '{text}', and {module_name} has no '{function}'. {near}")
        if not callable(found):
            raise UsageError(f"deploy.toml: {key} is '{text}', which is {type(found).__name__} and cannot be called.")
        code = getattr(found, "__code__", None)
        return Reference(key, text, found, code.co_firstlineno if code else None)

    def module(self, key: str, name: str) -> ModuleType:
        """The module that a key of deploy.toml names. Raises UsageError for one that is not there, else DeployError."""
        if not all(part.isidentifier() for part in name.split(".")):
            hint = "write it without .py, like my_rules, with my_rules.py beside deploy.toml."
            raise UsageError(f"deploy.toml: {key} is '{name}', which is no name of a module.", hint)
        return self._import(key, name, name)

    def _import(self, key: str, text: str, name: str) -> ModuleType:
        self.activate()
        self._refuse_hidden({name.partition(".")[0]})
        importlib.invalidate_caches()
        writes = sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        try:
            with self.blame(f"importing the module '{name}'"):
                return importlib.import_module(name)
        except DeployError as error:
            missing = error.__cause__
            if isinstance(missing, ModuleNotFoundError) and missing.name == name.partition(".")[0]:
                near = near_miss(name, [path.stem for folder in self.folders for path in folder.glob("*.py")])
                message = f"deploy.toml: {key} is '{text}', and there is no module '{name}' in {self.folders[0]}."
                raise UsageError(f"{message} {near}") from None
            raise
        finally:
            sys.dont_write_bytecode = writes

    def refuse_our_names(self) -> None:
        """Raise UsageError where a file of the project imports a module of the project that one of our names hides."""
        self._refuse_hidden(self._imported() & set(OURS))

    def _refuse_hidden(self, names: set[str]) -> None:
        for top in sorted(names):
            file = next((found for folder in self.folders if (found := _module_file(folder, top))), None)
            spec = importlib.util.find_spec(top) if file else None
            if file and spec and not self.owns(spec.origin or next(iter(spec.submodule_search_locations or []), None)):
                whose = "of edge-deploy" if top in OURS else f"at {spec.origin}"
                raise UsageError(f"{file} is hidden by the module '{top}' {whose}.", "rename yours.")

    def _imported(self) -> set[str]:
        """Top-level names that the project's files import. A file that does not parse is left to its own import."""
        names: set[str] = set()
        for path in self.files():
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    names.update(alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names.add(node.module.partition(".")[0])
        return names

    @contextmanager
    def blame(self, doing: str, hint: str = "") -> Iterator[None]:
        """Run code of the user's; what it raises becomes a DeployError with their file and line, the cause chained."""
        self.activate()
        try:
            yield
        except DeployError:
            raise
        except Exception as error:
            where = self._where(error)
            text = " ".join(str(error).split()) or "no message"
            if isinstance(error, ModuleNotFoundError) and not hint:
                hint = f"install '{error.name}' beside edge-deploy." if error.name else ""
            raise DeployError(f"{doing} failed{where}: {type(error).__name__}: {text}", hint) from error

    def _where(self, error: Exception) -> str:
        if isinstance(error, SyntaxError) and self.owns(error.filename):
            return f" ({Path(str(error.filename)).name}, line {error.lineno})"
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if self.owns(frame.filename)]
        return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


_active: UserCode | None = None


def _left_out(path: Path) -> bool:
    return any(part in _SKIPPED or part.startswith(".") or part.endswith("venv") for part in path.parts[:-1])


def _module_file(folder: Path, name: str) -> Path | None:
    file, package = folder / f"{name}.py", folder / name / "__init__.py"
    return file if file.is_file() else package if package.is_file() else None
