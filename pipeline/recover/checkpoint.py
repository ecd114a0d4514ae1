"""What a recovery needs to go on after a kill: one safetensors file, its story as JSON in the header, no pickle.

The file is written under a temporary name and moved, so that it is always whole. Random states are not stored: every
epoch seeds the generators from (seed, attempt, epoch).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from profiles.errors import DeployError

_VERSION = 3


def write(path: Path, groups: Mapping[str, Mapping[str, Tensor]], story: Mapping[str, Any]) -> None:
    """Store groups of named tensors and a JSON-able story, whole or not at all. Raises DeployError where it cannot."""
    named = [(f"{group}/{name}", tensor) for group, tensors in groups.items() for name, tensor in tensors.items()]
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in named}
    data = save(tensors, metadata={"story": json.dumps({"version": _VERSION, **story})})
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        size = f"{len(data) / 2**20:.1f} MiB"
        message = f"the recovery checkpoint '{path}' ({size}) could not be written: {error.strerror}."
        raise DeployError(message, "free some space and run again with --resume.") from error


def read(path: Path, origin: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Groups and story of a checkpoint; None where there is none, it is damaged, or it has another origin."""
    if not path.is_file():
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            story = json.loads((file.metadata() or {})["story"])
            if story.get("version") != _VERSION or story.get("origin") != origin:
                return None
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError):
        return None
    return groups, dict(story)


def origin(spec: str, *states: Mapping[str, Tensor]) -> str:
    """What a recovery starts from, as a hash: its settings and the weights of both networks."""
    total = hashlib.sha256(spec.encode())
    for state in states:
        for name, tensor in state.items():
            total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
