"""Trained weights from a file that runs no code: safetensors, or a torch file that loads with weights_only=True.

Forms that are met in the wild: a plain state dict, one under `state_dict`, `model_state_dict`, `state`, `model` or
`net`, and names that start with `module.` (data parallel) or `_orig_mod.` (compiled).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from profiles.errors import DeployError, UsageError

_KEYS = ("state_dict", "model_state_dict", "state", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 4
_PICKLE = b"\x80"
_CONVERT = """convert it once, where you trust it: python -c "import torch; from safetensors.torch import save_file; \
d = torch.load('{name}', weights_only=False); save_file(d.get('state_dict', d), '{stem}.safetensors')\""""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Parameter and buffer name -> tensor, on the CPU. Raises UsageError, DeployError for what is not safe to read."""
    if not path.is_file():
        raise UsageError(f"there is no weights file '{path}'.", make_hint(path))
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    return _plain_names(_state_dict(content, path))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], file: str, network: str) -> None:
    """Copy weights into a network, all of them and no more. Raises DeployError that names what does not fit."""
    own = module.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {list(weights[name].shape)} in the file and {list(own[name].shape)} in the network"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    complaints = [f"missing {_some(missing)}"] if missing else []
    complaints += [f"unexpected {_some(unexpected)}"] if unexpected else []
    complaints += [_some(shapes)] if shapes else []
    if complaints:
        hint = "the factory must build the network that was trained: mend model.factory or model.weights."
        raise DeployError(f"the weights {file} do not fit {network}: {'; '.join(complaints)}.", hint)
    module.load_state_dict({**own, **weights})


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest


def make_hint(path: Path) -> str:
    """What to do about a weights file that is not there: run the train.py beside it, where there is one."""
    script = path.parent / "train.py"
    return f"make it: python {script}" if script.is_file() else "set model.weights in deploy.toml to where it is."


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return tensors


def _torch_file(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None and path.read_bytes()[:1] != _PICKLE:
            raise _unreadable(path, ValueError("no torch file")) from error
        what = f" ({wanted[1]})" if wanted else ""
        message = f"{path} is a pickle that would run code when loaded{what}, and is refused."
        raise DeployError(message, _CONVERT.format(name=path, stem=path.with_suffix(""))) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DeployError:
    text = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    hint = "save it again: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    return DeployError(f"{path} is not a weights file that can be read: {text}.", hint)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise DeployError(f"{path} holds a {type(content).__name__}, not a state dict.", "save model.state_dict().")
    for found in (content, *(content.get(key) for key in _KEYS)):
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return {str(name): value for name, value in found.items()}
    keys = _some([str(key) for key in content]) or "none"
    raise DeployError(f"{path} holds no state dict; its keys: {keys}.", "save model.state_dict().")


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
