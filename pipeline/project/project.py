"""A loaded project: the user's network, data and metric, each checked where it crosses into our code.

What the user's code raises becomes an error that names their file and line, with the cause chained; randomness it
draws from the global generators of Python, numpy and torch is seeded and put back.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.outputs import parts, tensors
from pipeline.project.batches import Batches, TrainBatches, a, collect, declared, grouped, natural_noise, pair
from pipeline.project.rules import OwnRule, load_rules
from pipeline.project.schema import FILE, ProjectFile, read_project_file
from pipeline.project.usercode import Reference, UserCode
from pipeline.project.weights import load_weights, make_hint, read_weights
from profiles.errors import DeployError, UsageError
from profiles.schema import InputSpec

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<default>:-[^}]*)?\}")

Predict = Callable[..., Any]
"""numpy arrays in (one an input, any batch size), numpy out (a tuple where the network has several outputs)."""

TrainData = Callable[[int, int], TrainBatches]
"""(epoch, seed) -> the batches of that epoch."""


def load_project(folder: Path) -> Project:
    """Read deploy.toml, import the modules it names and resolve every name; no function of the user's is called yet.

    Raises UsageError for a missing file, an unknown key, a name that does not exist or is hidden; DeployError where a
    module fails to import.
    """
    folder = folder.resolve() if folder.is_dir() else folder
    file = read_project_file(folder)
    weights = _expand(file.model.weights, "model.weights", folder) if file.model.weights else None
    if weights and not weights.is_file():
        raise UsageError(f"there is no weights file '{weights}'.", make_hint(weights))
    code = UserCode((folder, *(_folder(text, folder) for text in file.path)))
    code.refuse_our_names()
    named = {"model.factory": file.model.factory, **file.data.named()}
    references = {key: code.resolve(key, text) for key, text in named.items()}
    return Project(folder, file, code, weights, references, load_rules(code, file.model.rules))


@dataclass(frozen=True)
class Project:
    """A project whose names are resolved. weights: file of the trained weights, None where the factory brings them.

    rules: the user's own, by the kind of operator that each speaks for.
    """

    folder: Path
    file: ProjectFile
    code: UserCode
    weights: Path | None
    references: dict[str, Reference]
    rules: dict[str, OwnRule] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The network's inputs, batch axis first."""
        return self.file.model.inputs or ((self.file.model.input,) if self.file.model.input else ())

    @property
    def max_drop(self) -> float:
        """Largest drop of `evaluate` against the dense network, in its own unit."""
        return self.file.accuracy.max_drop

    @property
    def overrides(self) -> dict[str, Any]:
        """The profile's keys that deploy.toml sets, as nested tables for `load_profile`."""
        return self.file.model_dump(include={"prune", "prepare", "recover"}, exclude_unset=True)

    @cached_property
    def _state(self) -> dict[str, Tensor] | None:
        return read_weights(self.weights) if self.weights else None

    def lacks(self, key: str) -> str:
        """Why there is no `data.<key>`: `the project has no [data]`, or no such key there. Empty where there is one."""
        if f"data.{key}" in self.references:
            return ""
        return f"the project has no {f'data.{key}' if 'data' in self.file.model_fields_set else '[data]'}"

    def model(self) -> nn.Module:
        """A fresh dense network with its weights, in eval mode, that has been seen to take the declared inputs.

        Raises DeployError for a factory that fails or gives no module, weights that do not fit, inputs it refuses.
        """
        factory = self.references["model.factory"]
        with seeded(0), self.code.blame(f"the factory {factory.text}"):
            module = factory.call()
        if not isinstance(module, nn.Module):
            message = f"the factory {factory.place} gave {a(module)}, not a torch.nn.Module."
            raise DeployError(message, "return the network.")
        if self._state is not None:
            load_weights(module, self._state, str(self.weights), factory.text)
        module.eval()
        self._try(module)
        return module

    def example(self) -> tuple[Tensor, ...]:
        """One batch of the declared shapes, for tracing: seeded normal values, zeros where integers are asked."""
        generator = torch.Generator().manual_seed(0)
        floats = (spec.dtype == "float32" for spec in self.inputs)
        return tuple(
            torch.randn(spec.shape, generator=generator) if float_ else torch.zeros(spec.shape, dtype=torch.int64)
            for spec, float_ in zip(self.inputs, floats, strict=True)
        )

    def _try(self, module: nn.Module) -> None:
        shapes = " and ".join(str(list(spec.shape)) for spec in self.inputs)
        what = f"an input of shape {shapes}" if len(self.inputs) == 1 else f"inputs of shapes {shapes}"
        try:
            with torch.inference_mode():
                out = module(*self.example())
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            hint = "set model.input in deploy.toml to what the network takes, batch axis first."
            raise DeployError(f"the network refuses {what}: {text}", hint) from error
        outs = parts(out)
        if not outs or not all(isinstance(each, Tensor) for each in outs):
            message = f"the network gives {a(out)}, not a tensor or a tuple of tensors."
            raise DeployError(message, "let forward return tensors, in tuples, lists and dicts as you like.")

    def noise(self, samples: int) -> Batches:
        """Seeded inputs that stand in for data: `natural_noise`, and 0 and 1 where integers are asked."""
        generator = torch.Generator().manual_seed(0)
        columns = []
        for spec in self.inputs:
            shape = (samples, *spec.shape[1:])
            whole = spec.dtype == "int64"
            drawn = torch.randint(0, 2, shape, generator=generator) if whole else natural_noise(shape, generator)
            columns.append(drawn)
        return Batches(grouped(columns), None)

    def calibration(self, limit: int) -> Batches:
        """The first `limit` calibration samples, the same at every call; none where the project names none.

        Raises DeployError for an empty or odd set.
        """
        reference = self.references.get("data.calibration")
        if reference is None:
            return Batches([], None)
        with seeded(0):
            return collect(self._read(reference, self._call(reference)), self.inputs, limit, reference.place)

    @property
    def train(self) -> TrainData | None:
        """(epoch, seed) -> batches of (inputs, targets), or None where the project has no training data."""
        reference = self.references.get("data.train")
        if reference is None:
            return None

        def batches(epoch: int, seed: int) -> TrainBatches:
            read, form = lambda raw: self._read(reference, raw), lambda item: pair(item, self.inputs, reference.place)
            return TrainBatches(self._call(reference, epoch, seed), read, form)

        return batches

    @property
    def loss(self) -> Callable[[Any, Any], Tensor]:
        """(outputs, targets) -> scalar tensor: the user's, else cross-entropy."""
        reference = self.references.get("data.loss")
        if reference is None:
            return _cross_entropy

        def scalar(outputs: Any, targets: Any) -> Tensor:
            value = self._call(reference, outputs, targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else a(value)
                message = f"{reference.place} gave {given}, not a scalar tensor."
                raise DeployError(message, "return the mean over the batch.")
            return value.reshape(())

        return scalar

    @property
    def validates(self) -> bool:
        """Whether the project names a `validate`."""
        return "data.validate" in self.references

    def evaluate(self, predict: Predict) -> float | None:
        """The user's metric of a network, higher is better, or None where the project names none.

        Raises DeployError where it fails or is not finite.
        """
        return self._metric("data.evaluate", predict)

    def validate(self, predict: Predict) -> float | None:
        """Like `evaluate` on other samples, or None where the project names none."""
        return self._metric("data.validate", predict)

    def digest(self) -> str:
        """SHA-256 over the names and contents of deploy.toml, the weights and every Python file of the project."""
        total = hashlib.sha256()
        for path in [self.folder / FILE, *([self.weights] if self.weights else []), *self.code.files()]:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{os.path.relpath(path, self.folder)}\0{content}\n".encode())
        return total.hexdigest()

    @cached_property
    def data(self) -> str | None:
        """SHA-256 over path, size and time of change of every file that the data functions read, as `make` would judge.

        None where they train or judge and the project does not say what they read, so that nothing tells whether it
        changed. Calibration samples are looked at themselves. Raises UsageError for a file that is not there.
        """
        named = self.file.data.files
        if named is None:
            return None if {"data.train", "data.validate", "data.evaluate"} & {*self.references} else ""
        total = hashlib.sha256()
        for path in sorted({path for text in named for path in _within(_data(text, self.folder))}):
            stat = path.stat() if path.exists() else path.lstat()
            total.update(f"{os.path.relpath(path, self.folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return total.hexdigest()

    def _call(self, reference: Reference, *arguments: Any) -> Any:
        with self.code.blame(reference.text):
            return reference.call(*arguments)

    def _metric(self, key: str, predict: Predict) -> float | None:
        reference = self.references.get(key)
        if reference is None:
            return None

        def typed(*arrays: Any) -> Any:
            given, known, place = len(arrays), len(self.inputs), reference.place
            if given != known:
                message = f"{place} calls predict with {given} arrays, and the network has {known} inputs."
                raise DeployError(message, "give predict one array an input.")
            return predict(*(declared(array, spec, place) for array, spec in zip(arrays, self.inputs, strict=True)))

        with seeded(0):
            value = self._call(reference, typed)
        if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
            message = f"{reference.place} gave {a(value)}, not a number."
            raise DeployError(message, "return one number, higher is better.")
        if not math.isfinite(value):
            message = f"{reference.place} gave {float(value)}, which is not a finite number."
            raise DeployError(message, "look for a division by zero.")
        return float(value)

    def _read(self, reference: Reference, raw: Any) -> Iterator[Any]:
        """Iterate over what the user's function gave, so that an error inside a generator names its line too."""
        if not isinstance(raw, Iterable):
            raise DeployError(f"{reference.place} gave {a(raw)}, not an iterable of batches.", "yield the batches.")
        with self.code.blame(reference.text):
            iterator = iter(raw)
        while True:
            with self.code.blame(reference.text):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def predict_torch(module: nn.Module, batch: int = 256) -> Predict:
    """A `predict` that runs a torch network in inference mode, `batch` samples at a time, on the device it lies on.

    The network is in eval mode while it runs and gets its own mode back.
    """

    def predict(*arrays: Any) -> Any:
        samples = len(arrays[0])
        if samples == 0:
            raise DeployError("predict was given an empty batch.", "give it at least one sample.")
        training = module.training
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        module.eval()
        try:
            with torch.inference_mode():
                outs = [
                    module(*(torch.from_numpy(array[start : start + batch]).to(device) for array in arrays))
                    for start in range(0, samples, batch)
                ]
        finally:
            module.train(training)
        if isinstance(outs[0], Tensor):
            return torch.cat(outs).cpu().numpy()
        columns = [torch.cat(column).cpu().numpy() for column in zip(*map(tensors, outs), strict=True)]
        return columns[0] if len(columns) == 1 else tuple(columns)

    return predict


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, and put their states back afterwards."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def _expand(text: str, key: str, folder: Path) -> Path:
    """A path of deploy.toml: `${NAME}` and `${NAME:-default}` replaced, relative to the project's folder."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match["name"]) or (match["default"] or "").removeprefix(":-")
        if not found:
            name = match["name"]
            raise UsageError(f"deploy.toml: {key} names the variable {name}, which is not set.", f"export {name}=…")
        return found

    return Path(os.path.normpath(folder / Path(_VARIABLE.sub(value, text)).expanduser()))


def _data(text: str, folder: Path) -> Path:
    path = _expand(text, "data.files", folder)
    if not path.exists():
        hint = "name what is there; files = [] where nothing is read."
        raise UsageError(f"deploy.toml: data.files names '{text}', and there is no '{path}'.", hint)
    return path


def _within(path: Path) -> Iterator[Path]:
    """A file itself; every file in a folder and below, through links too, but into each folder once."""
    if not path.is_dir():
        yield path
    entered = {os.path.realpath(path)}
    for folder, names, files in os.walk(path, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(names)}
        names[:] = [name for name, place in places.items() if place not in entered]
        entered.update(places.values())
        yield from (Path(folder, name) for name in files)


def _folder(text: str, folder: Path) -> Path:
    path = _expand(text, "path", folder).resolve()
    if not path.is_dir():
        raise UsageError(f"deploy.toml: path names '{text}', and there is no folder '{path}'.")
    return path


def _cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """The loss of a project that names none. Raises DeployError for one score a sample, of which it is always zero."""
    if isinstance(outputs, Tensor) and outputs.dim() > 1 and outputs.shape[1] == 1:
        raise DeployError(
            f"the loss is cross-entropy where deploy.toml names none, and outputs of shape {list(outputs.shape)} have "
            "one class, of which it is zero whatever the target.",
            "name data.loss in deploy.toml.",
        )
    return nn.functional.cross_entropy(outputs, targets)
