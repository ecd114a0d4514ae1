"""The rules of the house, read from the syntax trees: who may import whom, plug-in folders, names, docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli import PLUGINS

ROOT = Path(__file__).parents[1]
PACKAGES = ("profiles", "targets", "pipeline")
PARTS = ("prune", "latency", "recover", "graph", "release", "report", "nightly")
SHARED = "nouns|cache|database|run|last_layer|outputs"
"""Modules of pipeline/ that every part may import; they import no part."""
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path)) for path in FILES}

ALLOWED = {
    "torch": r"pipeline/(project|prune|recover)/|pipeline/graph/export\.py"
    r"|pipeline/(flow|last_layer|losses|outcome|outputs|prepare|work)\.py",
    "onnx": r"pipeline/(graph|latency)/|pipeline/(release/verify|nightly/baseline|flow|outcome|precision|prepare)\.py"
    r"|targets/(simulated|runtimes/ort)\.py",
    "onnx_graphsurgeon": r"pipeline/graph/",
    "onnxruntime": r"targets/(local\.py|runtimes/ort\.py|harness/agent/board/\w+\.py)|pipeline/graph/verify\.py",
    "tensorrt": r"targets/runtimes/tensorrt\.py",
    "click": r"pipeline/cli/",
    "rich": r"pipeline/cli/|pipeline/run\.py|pipeline/report/",
    "matplotlib": r"pipeline/report/",
    "jinja2": r"pipeline/report/",
    "sklearn": r"nowhere",
}
"""Which files may import a heavy module, at their top or inside a function; one that is not named here is free."""

AGENT = ("targets", "harness", "agent", "board")

FRAMEWORK = {"forward", "run_node", "call_module", "call_function", "call_method", "is_leaf_module", "extra_repr"}
"""Methods of torch's modules and interpreters, which are documented where they come from."""

BAD_WORDS = {"manager", "handler", "helper", "helpers", "util", "utils", "wrapper", "common", "core"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, in functions too, with its line; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.parts[:4] == AGENT:
                continue  # it runs on a device, where nothing of ours lies but itself
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield str(node.module), node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def ours(path: Path) -> Iterator[tuple[str, int]]:
    """Imports of our own packages."""
    return ((name, line) for name, line in imports(path) if name.partition(".")[0] in PACKAGES)


def of(package: str) -> list[Path]:
    """Files of a top folder."""
    return [path for path in FILES if path.parts[0] == package]


def foreign(package: str, allowed: str) -> list[str]:
    """Imports of ours in a top folder that the pattern does not allow."""
    return [f"{p}:{line} imports {name}" for p in of(package) for name, line in ours(p) if not re.match(allowed, name)]


def test_there_is_something_to_check():
    assert len(FILES) > 50 and {path.parts[0] for path in FILES} == set(PACKAGES)


def test_profiles_import_nothing_of_ours():
    assert foreign("profiles", r"profiles\b") == []


def test_targets_import_profiles_only():
    assert foreign("targets", r"(profiles|targets)\b") == []


def test_the_agent_needs_nothing_of_ours_because_it_runs_on_the_device():
    parts = [path for path in of("targets") if path.parts[:4] == AGENT]
    assert len(parts) > 10 and [each for path in parts for each in ours(path)] == []


def test_the_parts_of_the_pipeline_share_nouns_and_do_not_import_one_another():
    wrong = []
    for path in of("pipeline"):
        part = path.parts[1]
        if part not in PARTS:
            continue
        for name, line in ours(path):
            if name.startswith("pipeline.") and not re.match(rf"pipeline\.({SHARED}|{part})(\.|$)", name):
                wrong.append(f"{path}:{line} imports {name}")
    assert wrong == []


def test_only_the_flow_and_the_command_line_join_the_parts():
    joining = {"flow.py", "search.py", "outcome.py", "work.py", "precision.py", "prepare.py", "cli", "check.py"}
    joining |= {"demands.py", "losses.py", "ondevice.py", "unmeasured.py"}
    outside = [path for path in of("pipeline") if path.parts[1] not in (*PARTS, *joining)]
    part = re.compile(rf"pipeline\.({'|'.join(PARTS)})\b")
    assert [f"{path}:{line} imports {name}" for path in outside for name, line in ours(path) if part.match(name)] == []


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_heavy_module_is_imported_only_where_it_belongs(module: str):
    wrong = [
        f"{path}:{line}"
        for path in FILES
        for name, line in imports(path)
        if name.partition(".")[0] == module and not re.match(ALLOWED[module], path.as_posix())
    ]
    assert wrong == []


def test_profiles_and_the_command_line_import_nothing_heavy_at_their_top():
    light = [*of("profiles"), *(p for p in of("pipeline") if p.parts[1] == "cli")]
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "numpy", "scipy", "matplotlib", "rich"}
    for path in light:
        top = {alias.name for node in TREES[path].body if isinstance(node, ast.Import) for alias in node.names}
        top |= {str(node.module) for node in TREES[path].body if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in top} & heavy, path


# --- plug-in folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(PLUGINS))
def test_a_plug_in_folder_has_its_contract_and_no_catalogue(kind: str):
    folder = ROOT / PLUGINS[kind].replace(".", "/")
    assert (folder / "base.py").is_file(), "base.py is the contract"
    initial = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert all(isinstance(node, ast.Expr) for node in initial.body), "__init__.py holds a docstring at most"
    plugins = [path for path in folder.glob("*.py") if path.stem not in ("base", "__init__")]
    assert plugins, "at least one plug-in"
    for path in plugins:
        doc = ast.get_docstring(TREES[path.relative_to(ROOT)])
        assert doc, f"{path.name}: the first line of its docstring is its entry in `deploy list`"
        assert len(doc.split("\n", 1)[0]) < 160


@pytest.mark.parametrize("kind", sorted(set(PLUGINS) - {"targets"}))
def test_a_contract_knows_none_of_its_plug_ins(kind: str):
    folder = Path(PLUGINS[kind].replace(".", "/"))
    files = [path for path in (ROOT / folder).glob("*.py") if path.stem not in ("base", "__init__")]
    others = {f"{PLUGINS[kind]}.{path.stem}" for path in files}
    assert [name for name, _ in imports(folder / "base.py") if name in others] == []


# --- names, documentation, safety ------------------------------------------------------------------------------------


def _names(path: Path) -> Iterator[tuple[str, int]]:
    """Names that others read: of files and folders, classes, public functions, and arguments."""
    yield from ((part, 0) for part in path.with_suffix("").parts)
    for node in ast.walk(TREES[path]):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
        if function or isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_say_what_a_thing_is(path: Path):
    wrong = []
    for name, line in _names(path):
        words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_")
        wrong += [f"{path}:{line} {name}" for word in words if word in BAD_WORDS]
    assert wrong == []


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                inherited = [n for n in node.body if not (isinstance(n, ast.FunctionDef) and n.name in FRAMEWORK)]
                yield from _public(inherited, f"{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_and_every_public_function_says_what_it_does(path: Path):
    tree = TREES[path]
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{path} has no docstring"
    wrong = [name for name, node in _public(tree.body) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_unpickled_evaluated_or_printed(path: Path):
    wrong = []
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "os.system"):
            wrong.append(f"{path}:{node.lineno} {called}")
        if called == "torch.load" and "weights_only=True" not in ast.unparse(node):
            wrong.append(f"{path}:{node.lineno} {ast.unparse(node)}")
        if called == "print" and path.as_posix() != "pipeline/cli/frame.py":
            wrong.append(f"{path}:{node.lineno} print")
    assert wrong == []


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
