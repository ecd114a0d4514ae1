"""Whether a bundle is what it says: checked from the outside in, and nothing in it is trusted or run as code.

First names, sizes and checksums; only when these hold are the files opened: the manifest's schema, the plan, the raw
samples (every released number is computed again from them), the weights, the graphs, and at last the sample's output.
With a target the networks are measured again and the budget is judged anew. A problem is one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.nouns import BUILT, PruningPlan
from pipeline.release.encoders.base import load_encoder
from pipeline.release.manifest import Accuracy, Latency, Manifest, Sample, TensorSpec, latency_of
from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import Budget, explain
from targets.base import Progress, Target
from targets.harness.agent.board.model import runtime_errors
from targets.harness.device import Fingerprint
from targets.harness.measurement import Judgement, Session, judge

MANIFEST_BYTES = 16 << 20
TEXT_BYTES = 512 << 20
FILE_BYTES = 4 << 30
TOTAL_BYTES = 16 << 30
SAMPLES = "measurement.json"
"""Required where a latency is told, and refused where none is."""
REQUIRED = (
    "model.onnx", "dense.onnx", "plan.json", "sample.safetensors", SAMPLES, "passes.json", "report.html",
    "LICENSES.txt",
)  # fmt: skip

ROUNDING = 1e-12
"""By how much an accuracy may seem to miss its limit, as at the gate of a build."""
CLOSE = 1e-5
"""By how much a released number may differ from what the samples give: a budget is written in six digits."""

LAYOUTS = {1: "N", 2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}

Array = NDArray[Any]
Infer = Callable[[Path, Sequence[Array]], list[Array]]
"""Outputs of an ONNX file for one array an input: `Target.infer` of the machine at hand."""


def verify(bundle: Path, infer: Infer) -> list[str]:
    """Everything that is wrong with a bundle, nothing when it is whole. Raises UsageError where there is none."""
    if not bundle.is_dir():
        raise UsageError(f"there is no bundle in '{bundle}'.", "deploy verify BUNDLE, with the bundle/ of a run.")
    manifest, problems = _read_manifest(bundle)
    if manifest is None:
        return problems
    problems += _files(bundle, manifest)
    if problems:
        return problems
    problems = _texts(bundle, manifest)
    problems += _graph(bundle / "model.onnx", manifest) + _graph(bundle / "dense.onnx", manifest)
    return problems or _precision(bundle, manifest) + _sample(bundle, manifest, infer)


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle. Raises DeployError with the first thing that is wrong with it."""
    manifest, problems = _read_manifest(bundle)
    if manifest is None:
        raise DeployError(problems[0], f"deploy verify {bundle}")
    return manifest


def recorded(bundle: Path) -> tuple[str, str]:
    """The verdict of a whole bundle and its reason, by its own samples and the accuracy that its manifest tells."""
    manifest = read_manifest(bundle)
    latency, told = manifest.latency, manifest.accuracy
    verdict, reason = BUILT, manifest.unmeasured
    if latency is not None:
        session = Session.from_json((bundle / SAMPLES).read_text(encoding="utf-8"))
        judged = judge(session, latency.network, latency.reference, Budget.parse(latency.budget))
        verdict, reason = judged.verdict, judged.reason
    if verdict not in ("met", BUILT) or not _fell_too_far(told):
        return verdict, reason
    return "accuracy missed", f"{told.pruned:g} against {told.dense:g} dense, allowed drop {told.max_drop:g}"


def _fell_too_far(accuracy: Accuracy) -> bool:
    if accuracy.dense is None or accuracy.pruned is None:
        return False
    return accuracy.dense - accuracy.pruned > accuracy.max_drop + ROUNDING


def measure_again(
    bundle: Path, target: Target, work: Path, progress: Progress | None = None
) -> tuple[Judgement, Session]:
    """Measure both networks in one accepting session on a target and judge the released budget on it.

    work: folder for what the target builds. progress: told how far building is, then measuring. Raises UndecidedError
    where nothing can be timed on the target, or where the bundle has no budget to judge; else what the target raises.
    """
    manifest = read_manifest(bundle)
    target.require_latency()
    if manifest.latency is None:
        message = f"'{bundle}' was built and not measured, so it tells no budget to judge: {manifest.unmeasured}."
        raise UndecidedError(message, "deploy build, on a machine where the target can be measured.")
    files = {manifest.latency.network: bundle / "model.onnx", manifest.latency.reference: bundle / "dense.onnx"}
    built = {name: work / f"{name}.artifact" for name in files}
    target.build_each({path: built[name] for name, path in files.items()}, progress)
    session = target.measure(built, target.profile.measure, "accept", progress)
    budget = Budget.parse(manifest.latency.budget)
    return judge(session, manifest.latency.network, manifest.latency.reference, budget), session


# --- names, sizes, checksums -----------------------------------------------------------------------------------------


def _read_manifest(bundle: Path) -> tuple[Manifest | None, list[str]]:
    path = bundle / "manifest.json"
    if path.is_symlink() or not path.is_file():
        return None, ["manifest.json is missing."]
    if path.stat().st_size > MANIFEST_BYTES:
        return None, [f"manifest.json has {path.stat().st_size} bytes, more than {MANIFEST_BYTES}."]
    try:
        return Manifest.model_validate(json.loads(path.read_bytes())), []
    except ValidationError as error:
        return None, [explain(error, Manifest, "manifest.json").message]
    except (ValueError, RecursionError) as error:
        return None, [f"manifest.json is not JSON: {error}."]


def _files(bundle: Path, manifest: Manifest) -> list[str]:
    try:
        required = {*REQUIRED, f"pruned{load_encoder(manifest.encoder).SUFFIX}"}
        if manifest.latency is None:
            required.remove(SAMPLES)
        else:
            Budget.parse(manifest.latency.budget)
    except UsageError as error:
        return [f"manifest.json: {error.message}"]
    there, listed = {path.name: path for path in bundle.iterdir()}, manifest.files.keys()
    problems = [f"{name} is not listed in the manifest." for name in sorted(required - listed)]
    problems += [f"{name} is missing." for name in sorted(listed - there.keys())]
    extra = there.keys() - listed - {"manifest.json"}
    problems += [f"{name} does not belong to the bundle." for name in sorted(extra)]
    total = sum(entry.bytes for entry in manifest.files.values())
    if total > TOTAL_BYTES:
        problems.append(f"the files have {total} bytes together, more than {TOTAL_BYTES}.")
    for name in sorted(manifest.files.keys() & there.keys()):
        problems += _file(there[name], manifest)
    return problems


def _file(path: Path, manifest: Manifest) -> list[str]:
    entry, found = manifest.files[path.name], path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return [f"{path.name} is not a plain file."]
    if found.st_size != entry.bytes:
        return [f"{path.name} has {found.st_size} bytes, the manifest says {entry.bytes}."]
    limit = TEXT_BYTES if path.suffix in (".json", ".html", ".txt") else FILE_BYTES
    if entry.bytes > limit:
        return [f"{path.name} has {entry.bytes} bytes, more than {limit}."]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        return [f"{path.name} was changed: its SHA-256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}…."]
    return []


# --- what the files hold ---------------------------------------------------------------------------------------------


def _texts(bundle: Path, manifest: Manifest) -> list[str]:
    problems = []
    try:
        PruningPlan.from_json((bundle / "plan.json").read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"plan.json is not a plan: {error}.")
    try:
        encoder = load_encoder(manifest.encoder)
        encoder.decode((bundle / f"pruned{encoder.SUFFIX}").read_bytes())
    except DeployError as error:
        problems.append(error.message)
    if manifest.latency is None:
        return problems + _unmeasured(manifest)
    try:
        session = Session.from_json((bundle / SAMPLES).read_text(encoding="utf-8"))
        problems += _latency(session, manifest, manifest.latency)
    except (DeployError, ValueError, RecursionError) as error:
        problems.append(f"measurement.json: {error}")
    return problems


def _unmeasured(manifest: Manifest) -> list[str]:
    """What contradicts a manifest that tells no latency."""
    problems = []
    if SAMPLES in manifest.files:
        problems.append(f"the manifest tells that nothing was measured, and {SAMPLES} is there.")
    try:
        same = Fingerprint.from_table(manifest.device).digest() == manifest.device_sha256
    except (TypeError, KeyError):
        same = False
    return problems if same else [*problems, "the manifest's device is not the one that its device_sha256 tells."]


def _latency(session: Session, manifest: Manifest, latency: Latency) -> list[str]:
    """The released numbers against the raw samples."""
    problems = []
    for name, other in ((latency.network, "dense"), (latency.reference, "model")):
        if name not in session.measurements:
            return [f"measurement.json holds no network named '{name}'."]
        hashes = {entry.sha256 for file, entry in manifest.files.items() if file.partition(".")[0] != other}
        if session.measurements[name].sha256 not in hashes:
            problems.append(f"'{name}' was measured from a file that is not in the bundle.")
    budget = Budget.parse(latency.budget)
    found = latency_of(session, budget, latency.network, latency.reference).model_dump()
    for key, told in latency.model_dump().items():
        if not _close(found[key], told):
            problems.append(f"the raw samples give {key} {_told(found[key])}, the manifest says {_told(told)}.")
    device = json.loads(json.dumps(session.fingerprint.to_table()))
    if session.fingerprint.digest() != manifest.device_sha256 or device != manifest.device:
        problems.append("the samples were taken on another device than the manifest says.")
    if session.measurements[latency.network].runtime != manifest.runtime:
        problems.append(f"the samples were taken with another runtime than '{manifest.runtime}'.")
    return problems


def _close(found: Any, told: Any) -> bool:
    if isinstance(found, tuple) and isinstance(told, tuple):
        return all(_close(*pair) for pair in zip(found, told, strict=True))
    numbers = isinstance(found, float) and isinstance(told, float)
    return math.isclose(found, told, rel_tol=CLOSE) if numbers else bool(found == told)


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _graph(path: Path, manifest: Manifest) -> list[str]:
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        return [f"{path.name} is not ONNX: {error}."]
    outside = sorted({tensor.name for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL})
    if outside:
        return [f"{path.name} keeps '{outside[0]}' in a file outside itself."]
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RecursionError) as error:
        return [f"{path.name} is not valid ONNX: {str(error).splitlines()[0]}."]
    fixed = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in fixed]
    return _ports(path, "inputs", inputs, manifest.inputs) + _ports(
        path, "outputs", model.graph.output, manifest.outputs
    )


def _ports(path: Path, kind: str, values: Iterable[onnx.ValueInfoProto], told: tuple[TensorSpec, ...]) -> list[str]:
    found, wanted = (
        [f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs] for specs in (tensor_specs(values), told)
    )
    return [] if found == wanted else [f"{path.name} has the {kind} {found}, the manifest says {wanted}."]


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of an ONNX graph; the layout is what their number of axes suggests."""
    specs = []
    for value in values:
        shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape, layout=LAYOUTS.get(len(shape), "")))
    return tuple(specs)


def _precision(bundle: Path, manifest: Manifest) -> list[str]:
    """The precision that the manifest tells against the types of the graph and of the weights beside it."""
    model, encoder, half = onnx.load(bundle / "model.onnx"), load_encoder(manifest.encoder), onnx.TensorProto.FLOAT16
    weights = encoder.decode((bundle / f"pruned{encoder.SUFFIX}").read_bytes())
    exact = {name for name, array in weights.items() if array.dtype == np.float32}
    rounded = sorted({tensor.name for tensor in model.graph.initializer if tensor.data_type == half} & exact)
    if manifest.precision == "fp32" and rounded:
        return [f"model.onnx holds {len(rounded)} weights in float16, '{rounded[0]}' first; the manifest says fp32."]
    casts = (a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    if manifest.precision == "fp16" and half not in casts:
        return ["model.onnx computes nothing in float16, the manifest says fp16."]
    return []


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and functions too."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs.extend(attribute.graphs)
            if attribute.HasField("g"):
                graphs.append(attribute.g)


def _run_errors() -> tuple[type[Exception], ...]:
    return (DeployError, *runtime_errors())


def _sample(bundle: Path, manifest: Manifest, infer: Infer) -> list[str]:
    try:
        sample = load((bundle / "sample.safetensors").read_bytes())
        given = [sample[f"input.{spec.name}"] for spec in manifest.inputs]
        expected = [sample[f"output.{spec.name}"] for spec in manifest.outputs]
    except (SafetensorError, ValueError, TypeError) as error:
        return [f"sample.safetensors cannot be read: {error}."]
    except KeyError as error:
        return [f"sample.safetensors has no tensor {error}."]
    try:
        found = infer(bundle / "model.onnx", given)
    except _run_errors() as error:
        return [f"model.onnx does not run on the sample: {str(error).splitlines()[0]}"]
    problems = []
    for spec, want, got in zip(manifest.outputs, expected, found, strict=True):
        if manifest.sample.atol > max(Sample().atol, float(np.max(np.abs(want), initial=0.0))):
            allowed = f"the tolerance {manifest.sample.atol:g} of the sample"
            problems.append(f"{allowed} is larger than output '{spec.name}'.")
        if want.shape != got.shape:
            problems.append(f"output '{spec.name}' of the sample has shape {list(got.shape)}, not {list(want.shape)}.")
        elif not np.allclose(got, want, rtol=manifest.sample.rtol, atol=manifest.sample.atol):
            worst = float(np.max(np.abs(got.astype(np.float64) - want.astype(np.float64))))
            problems.append(f"output '{spec.name}' of the sample differs by up to {worst:.3g} from the recorded one.")
    return problems
