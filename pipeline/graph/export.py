"""Write a captured network as ONNX, with every parameter as an initializer of its own name.

torch's exporter merges equal initializers through Identity nodes, which would tie parameters that are only equal by
chance: that is undone. What narrowing slices by name is asserted here: each parameter that the network uses is an
initializer with the same name, shape and values. A network with operators of the user's own, or with modules that
capture left whole, is compared with its ONNX file on inputs of several signs and sizes.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn

from pipeline.graph.absorbed import absorb
from pipeline.graph.passes.base import is_parameter
from pipeline.graph.verify import compare_outputs, seeded_inputs
from pipeline.outputs import tensors
from profiles.errors import DeployError
from profiles.schema import InputSpec

SCALES = (1.0, -1.0, 0.1, -3.0, 3.0, -0.1)
"""Inputs that a branch on data is looked for with are standard normal values times these."""
LARGEST_GAP = 1e-3
OWN_HINT = "take numbers out of data in no module that stays whole, and freeze nothing of it in numpy or in constants."


def export(
    model: nn.Module, inputs: Sequence[InputSpec], out: Path, opset: int = 17, names: Collection[str] | None = None
) -> Path:
    """Export in eval mode with the batch size of `inputs`; the model's own mode and weights are left as they were.

    names: the parameters and buffers that must keep their name; all that the network's own layers use if left out.
    Raises DeployError naming the operator that ONNX has no form for, or the parameter that lost its name.
    """
    with _evaluating(model):
        results = _results(model, inputs)
        proto = _trace(model, inputs, opset, len(results))
        _restore_parameters(proto)
        _freeze(proto)
        state = {name: tensor.detach().cpu().numpy() for name, tensor in _state(model).items()}
        _check_names(proto, state, _used(model) if names is None else names)
        _fix_outputs(proto, results)
        if _has_own(model):
            _check_numbers(model, proto)
    onnx.save_model(proto, str(out))
    return out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _examples(inputs: Sequence[InputSpec], model: nn.Module) -> tuple[torch.Tensor, ...]:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    source = torch.Generator().manual_seed(0)

    def draw(spec: InputSpec) -> torch.Tensor:
        floating = spec.dtype == "float32"
        return torch.randn(spec.shape, generator=source) if floating else torch.zeros(spec.shape, dtype=torch.int64)

    return tuple(draw(spec).to(device) for spec in inputs)


def _results(model: nn.Module, inputs: Sequence[InputSpec]) -> list[torch.Tensor]:
    examples = _examples(inputs, model)
    try:
        with torch.no_grad():
            return tensors(model(*examples))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(list(spec.shape)) for spec in inputs)
        raise DeployError(f"the network refuses inputs of shape {shapes}: {_first_line(error)}") from error


def _trace(model: nn.Module, inputs: Sequence[InputSpec], opset: int, outputs: int) -> onnx.ModelProto:
    buffer = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                model,
                _examples(inputs, model),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=opset,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                input_names=[spec.name for spec in inputs],
                output_names=["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
            )
    except torch.onnx.errors.UnsupportedOperatorError as error:
        hint = f"raise graph.opset (now {opset}), or write the operation differently."
        found = re.search(r"'([^']+)'|namespace (\S+?)\.", str(error))
        name = next((text for text in found.groups() if text), "") if found else str(error)
        raise DeployError(f"the operator '{name}' has no ONNX form in opset {opset}.", hint) from error
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise DeployError(f"the network cannot be exported to ONNX: {_first_line(error)}") from error
    return onnx.load_from_string(buffer.getvalue())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, and without the whole graph that it prints on stdout when it fails."""
    logger, prints = logging.getLogger("torch.onnx"), torch._C._jit_onnx_log
    level = logger.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL)
            torch._C._jit_onnx_log = lambda *_: None
            yield
    finally:
        logger.setLevel(level)
        torch._C._jit_onnx_log = prints


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _restore_parameters(proto: onnx.ModelProto) -> None:
    """Identity(initializer) -> an initializer of its own under the output's name."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    results = {info.name for info in proto.graph.output}
    kept = []
    for node in proto.graph.node:
        merged = node.op_type == "Identity" and node.input[0] in stored and is_parameter(node.output[0])
        if not merged or node.output[0] in results:
            kept.append(node)
            continue
        copy = proto.graph.initializer.add()
        copy.CopyFrom(stored[node.input[0]])
        copy.name = node.output[0]
        stored[copy.name] = copy
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _freeze(proto: onnx.ModelProto) -> None:
    """Batch normalisation uses its stored statistics, whatever mode the exporter wrote."""
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            for attribute in node.attribute:
                if attribute.name == "training_mode":
                    attribute.i = 0
            del node.output[1:]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _used(model: nn.Module) -> set[str]:
    """Floating parameters and buffers that the graph reads: by attribute, or through one of torch's own layers.

    A layer of the user's own that was kept whole may use its parameters as it likes: its channels are never cut.
    """
    floating = {name for name, tensor in _state(model).items() if tensor.is_floating_point()}
    if not isinstance(model, fx.GraphModule):
        return floating
    used: set[str] = set()
    for node in model.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            used |= floating & {target}
        elif node.op == "call_module" and (
            type(model.get_submodule(target)).__module__.startswith("torch.nn") or "ruled" in node.meta
        ):
            used |= {name for name in floating if name.startswith(f"{target}.")}
    return used


def _has_own(model: nn.Module) -> bool:
    """Whether a captured network holds code of the user's that runs as it is."""
    return isinstance(model, fx.GraphModule) and any(node.meta.keys() & {"leaf", "ruled"} for node in model.graph.nodes)


def _check_numbers(model: nn.Module, proto: onnx.ModelProto) -> None:
    """Raise DeployError where the file computes something else than the network."""
    feeds = [
        {name: (x * scale).astype(x.dtype) if x.dtype.kind == "f" else x for name, x in feed.items()}
        for scale, feed in zip(SCALES, seeded_inputs(proto, count=len(SCALES)), strict=True)
    ]
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))

    def run(*arrays: Any) -> list[Any]:
        return [t.cpu().numpy() for t in tensors(model(*(torch.from_numpy(array).to(device) for array in arrays)))]

    with torch.no_grad():
        gap = compare_outputs(run, proto, feeds)
    if gap.max_rel > LARGEST_GAP:
        raise DeployError(
            f"the exported network differs from the given one by {gap.max_rel:.2g} of its largest output.", OWN_HINT
        )


def _check_names(proto: onnx.ModelProto, state: dict[str, Any], names: Collection[str]) -> None:
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    aliases = _aliases(state)
    absorb(proto, [name for name, others in aliases.items() if name not in stored and stored.keys() & set(others)])
    for name in sorted(names):
        if name not in state:
            continue
        found = next((stored[other] for other in (name, *aliases.get(name, ())) if other in stored), None)
        if found is None:
            hint = "freeze its layer with prune.freeze."
            raise DeployError(f"the parameter '{name}' has no initializer in the exported graph.", hint)
        if list(found.dims) != list(state[name].shape):
            shapes = f"{list(found.dims)} in the exported graph, {list(state[name].shape)} in the network"
            raise DeployError(f"the parameter '{name}' has shape {shapes}.")
        if not np.array_equal(numpy_helper.to_array(found), state[name], equal_nan=True):
            raise DeployError(f"the parameter '{name}' has other values in the exported graph than in the network.")


def _aliases(state: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names of the same memory: a parameter that two layers share has one initializer."""
    by_memory: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, array in state.items():
        by_memory.setdefault((array.__array_interface__["data"][0], array.shape), []).append(name)
    shared = [group for group in by_memory.values() if len(group) > 1]
    return {name: tuple(n for n in group if n != name) for group in shared for name in group}


def _fix_outputs(proto: onnx.ModelProto, results: Sequence[torch.Tensor]) -> None:
    """Write the shapes that the network gives: the exporter leaves some axes open."""
    if len(results) != len(proto.graph.output):
        raise DeployError(f"the network gives {len(results)} tensors, the exported graph {len(proto.graph.output)}.")
    for info, tensor in zip(proto.graph.output, results, strict=True):
        shape = info.type.tensor_type.shape
        del shape.dim[:]
        for size in tensor.shape:
            shape.dim.add().dim_value = int(size)
    del proto.graph.value_info[:]
