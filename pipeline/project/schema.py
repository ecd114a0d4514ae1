"""The tables of deploy.toml as types. Frozen; an unknown key is an error that names its near miss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from profiles.errors import UsageError
from profiles.schema import InputSpec, PrepareSpec, PruneSpec, RecoverSpec, Spec, explain, read_toml

FILE = "deploy.toml"


class ModelTable(Spec):
    """`[model]`: the network, its weights and its inputs. Without `weights` the factory gives a trained network.

    rules: modules that say how channels pass through operators of the user's own (docs/operators.md).
    """

    factory: str
    weights: str | None = None
    input: InputSpec | None = None
    inputs: tuple[InputSpec, ...] = ()
    rules: str | tuple[str, ...] = ()


class DataTable(Spec):
    """`[data]`: functions of the user's, as "module:function". Each may be left out, and so may the table.

    Without `calibration` only weights can rank and repair, without `train` nothing is trained, and without `evaluate`
    the accuracy is not judged, which the report says. files: files and folders that they read, so that later builds
    can see whether what was trained and judged on them still holds; an empty list where they read none.
    """

    calibration: str | None = None
    evaluate: str | None = None
    train: str | None = None
    validate_with: str | None = Field(default=None, alias="validate")
    loss: str | None = None
    files: tuple[str, ...] | None = None

    def named(self) -> dict[str, str]:
        """Key in deploy.toml -> "module:function", for those that are set."""
        named = self.model_dump(by_alias=True, exclude_none=True, exclude={"files"})
        return {f"data.{key}": str(text) for key, text in named.items()}


class AccuracyTable(Spec):
    """`[accuracy]`: what may be lost against the dense network, in the metric's own unit."""

    max_drop: float = Field(default=0.01, ge=0)


class ProjectFile(Spec):
    """deploy.toml. path: more folders where modules are found. prune, prepare, recover: override the profile's keys."""

    version: Literal[1]
    path: tuple[str, ...] = ()
    model: ModelTable
    data: DataTable = DataTable()
    accuracy: AccuracyTable = AccuracyTable()
    prune: PruneSpec = PruneSpec()
    prepare: PrepareSpec = PrepareSpec()
    recover: RecoverSpec = RecoverSpec()


def read_project_file(folder: Path) -> ProjectFile:
    """Read and check deploy.toml. Raises UsageError for a missing folder or file, an unknown key, a senseless value."""
    if not folder.is_dir():
        raise UsageError(f"there is no project folder '{folder}'.", "deploy build --project DIR")
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"there is no {FILE} in '{folder}'.", f"write one; examples/digits/{FILE} shows how.")
    try:
        file = ProjectFile.model_validate(read_toml(path))
    except ValidationError as error:
        raise explain(error, ProjectFile, str(path)) from None
    _check_inputs(file.model, path)
    return file


def _check_inputs(model: ModelTable, path: Path) -> None:
    specs = model.inputs or ((model.input,) if model.input else ())
    if not specs:
        hint = "add 'input = { shape = [1, 3, 32, 32] }' to [model]."
        raise UsageError(f"{path}: the key 'model.input' is missing.", hint)
    if model.input and model.inputs:
        raise UsageError(f"{path}: [model] has both 'input' and [[model.inputs]].", "keep one of them.")
    for spec in specs:
        if min(spec.shape) < 1:
            shape = list(spec.shape)
            raise UsageError(f"{path}: input '{spec.name}' has the shape {shape}; every size must be 1 or more.")
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}: two inputs are named '{twice}'.", "give each of [[model.inputs]] a name of its own.")
