"""Where ONNX Runtime runs a network, what each of its GPU providers is asked for, and whether it really runs there.

The TensorRT provider builds an engine in every process unless it may keep it, and names a kept one by the graph's name
and structure: networks with other weights, even with other shapes, then share one and give each other's answers
(github.com/microsoft/onnxruntime, issues 6455 and 32254). So each network has a folder of its own, under a key that
holds its bytes and those of the weights beside it, and what runs it: GPU, driver, CUDA, cuDNN, TensorRT; and, since the
builder chooses by its own timings, the power mode and whether the clocks are locked. It writes an engine in place and
trusts what it finds, so a folder is sealed once a session is open, and emptied where the seal does not fit. Only
options are given that every version knows which takes any by name, since an unknown one is an error (onnxruntime.ai,
"CUDA Execution Provider", "TensorRT Execution Provider"). Values are text.

get_available_providers() names what was compiled in. Where CUDA, cuDNN or TensorRT do not load, a session is opened on
the processor instead, with a warning in the log and nothing else: so each session is asked where it runs.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import sys
from typing import Any, Dict, List, Sequence

from . import jetson, machine
from .base import Table
from .files import whole

CUDA: Dict[str, str] = {
    "device_id": "0",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "do_copy_in_default_stream": "1",
}
"""The provider's own defaults, said so that another version's defaults change no number."""
GRAPHS = {"TensorrtExecutionProvider": "trt_cuda_graph_enable", "CUDAExecutionProvider": "enable_cuda_graph"}
"""The providers that run on an NVIDIA GPU, and the option by which each captures a CUDA graph: off in every version."""
LIBRARIES = {"tensorrt": "TensorRT", "cudnn": "cuDNN"}
"""What these providers run on, as `library` calls it, and its name."""
SMALL = (
    b'\x08\x04\x12\x00:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\t"
)
"""An ONNX file: y = relu(x), one float32 each, opset 9, which every version of ONNX Runtime reads."""
START_HINT = (
    "put CUDA, cuDNN and TensorRT of the versions that this onnxruntime was built with where the loader finds them "
    "(ldconfig -p, LD_LIBRARY_PATH), or set providers to others."
)


def on_gpu(names: Sequence[str]) -> bool:
    """Whether one of these providers runs on an NVIDIA GPU."""
    return any(name in GRAPHS for name in names)


def take_gpu(options: Table) -> bool:
    """Whether networks opened with these options take a GPU: engines of a library of their own, or ONNX Runtime's."""
    return bool(options.get("library")) or on_gpu(options["providers"])


def opened(path: str, settings: Any, options: Table) -> Any:
    """ONNX Runtime's session of a file, on the providers that the options ask for and on no others in their place.

    settings: of the session; options: as of `asked`, and spin, which says how a GPU is waited for. Raises BoardError
    where a provider is not there or does not start.
    """
    prepare(options["providers"], bool(options.get("spin")))
    wanted = asked(path, options)
    folders = [each[1].get("trt_engine_cache_path") for each in wanted if not isinstance(each, str)]
    with contextlib.ExitStack() as held:
        for folder in filter(None, folders):
            held.enter_context(whole(folder))
        return session(path, settings, wanted)


def prepare(names: Sequence[str], spin: bool) -> None:
    """Say how this process waits for the GPU, spinning or asleep, before anything else uses it.

    Raises BoardError where ONNX Runtime was built without one of these providers, or there is no GPU for them.
    """
    import onnxruntime as ort

    from .tensorrt import cuda
    from .tensorrt.errors import BoardError

    there = ort.get_available_providers()
    for name in names:
        if name not in there:
            hint = "set providers to some of them, or install an onnxruntime that has it, as onnxruntime-gpu."
            raise BoardError("device", "no provider %s, there are %s" % (name, ", ".join(there)), hint)
    if not on_gpu(names):
        return
    if hasattr(ort, "preload_dlls"):  # where pip has put CUDA and cuDNN no loader looks
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    try:
        cuda.Cuda().open(spin)
    except BoardError as error:
        raise refusal(next(name for name in names if name in GRAPHS), error.message) from None


def session(source: Any, settings: Any, wanted: Sequence[Any]) -> Any:
    """A session on these providers, each a name or a name with its options. source: path of an ONNX file, or its bytes.

    Raises BoardError where ONNX Runtime runs it elsewhere; what it prints about that goes to stderr.
    """
    import onnxruntime as ort

    with contextlib.redirect_stdout(sys.stderr):
        made = ort.InferenceSession(source, settings, providers=list(wanted))
    made.disable_fallback()
    there = made.get_providers()
    for each in wanted:
        name = each if isinstance(each, str) else each[0]
        if name not in there:
            raise refusal(name, reason(name) or "it runs the network on %s instead" % there[0])
    return made


def refusal(name: str, why: str) -> Exception:
    """The BoardError for a provider that does not start."""
    import onnxruntime as ort

    from .tensorrt.errors import BoardError

    return BoardError("device", "ONNX Runtime %s gives up %s: %s" % (ort.__version__, name, why), START_HINT)


def reason(name: str) -> str:
    """Why the library of a provider that ONNX Runtime has just given up does not load, or ""."""
    import onnxruntime as ort

    file = "libonnxruntime_providers_%s.so" % name.replace("ExecutionProvider", "").lower()
    path = os.path.join(os.path.dirname(str(ort.__file__)), "capi", file)
    try:
        ctypes.CDLL(path)
    except OSError as error:
        return str(error)
    return ""


def run_small(names: Sequence[str]) -> None:
    """Open a small network on these providers, for which this process is prepared, and run it once.

    Raises BoardError where it does not. The TensorRT provider starts and gets no part of it: an engine takes seconds.
    """
    import numpy as np
    import onnxruntime as ort

    from .model import error_text, runtime_errors

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    own = {"TensorrtExecutionProvider": {"device_id": "0", "trt_min_subgraph_size": "2"}, "CUDAExecutionProvider": CUDA}
    try:
        made = session(SMALL, settings, [(name, dict(own[name])) if name in own else name for name in names])
        made.run(None, {"x": np.ones(1, np.float32)})
    except runtime_errors() as error:
        raise refusal(names[0], error_text(error)) from None


def there(names: Sequence[str]) -> List[str]:
    """All providers that this ONNX Runtime has, after a small network ran on these; not tried where it lacks one."""
    import onnxruntime as ort

    found = list(ort.get_available_providers())
    if all(name in found for name in names):
        prepare(names, False)
        run_small(names)
    return found


@functools.lru_cache(maxsize=None)
def hardware(*names: str) -> Table:
    """What runs a network on these providers here: `gpu`, and the `libraries` that ONNX Runtime loads for them.

    Only a process that has opened a session knows what the loader finds. Raises BoardError as `run_small`.
    """
    from .tensorrt import cuda, library
    from .tensorrt.errors import BoardError

    run_small(names)
    try:
        gpu = cuda.Cuda().facts()
    except BoardError as error:
        raise refusal(names[0], error.message) from None
    found = {title: library.loaded_facts(name) for name, title in LIBRARIES.items()}
    return {"gpu": gpu, "libraries": {title: facts for title, facts in found.items() if facts["version"]}}


def facts(names: Sequence[str]) -> Table:
    """What a fingerprint holds of `hardware`, in words; nothing where no GPU is asked for."""
    if not on_gpu(names):
        return {}
    from .tensorrt import opening

    prepare(names, False)
    found = hardware(*names)
    told = ["%s %s %s" % (title, each["version"], each["build"]) for title, each in sorted(found["libraries"].items())]
    return {"gpu": opening.described(found["gpu"]), "libraries": ", ".join(told)}


def protocol(options: Table, made: Any = None) -> str:
    """The id of how networks are timed on a GPU, the first word of a session's protocol; "" on the processor.

    options: providers and spin; made: a session, which knows whether it captures a CUDA graph. Inputs and outputs are
    bound in the memory of the processor, so both copies count.
    """
    if not on_gpu(options["providers"]):
        return ""
    known = made.get_provider_options() if made is not None else {}
    graph = any(known.get(name, {}).get(option, "0") in ("1", "True", "true") for name, option in GRAPHS.items())
    return "ort-gpu-1/clock=wall/cuda_graph=%d/spin=%d/copies=1" % (graph, bool(options["spin"]))


def asked(path: str, options: Table) -> List[Any]:
    """The providers that a session of a file is opened with, best first: a name, or a name with its options.

    options: providers, their names; engine_cache: the folder where engines are kept, or "". Raises AgentError where the
    TensorRT provider is asked for and the file is no ONNX file, or where it does not start and is to keep engines.
    """
    cache, names = str(options.get("engine_cache") or ""), options["providers"]
    return [given(name, path, cache, names) for name in names]


def given(name: str, path: str, cache: str, names: Sequence[str]) -> Any:
    """A provider with what it is asked for. Which types it may use is what the file holds. names: of all that are."""
    if name == "CUDAExecutionProvider":
        return name, dict(CUDA)
    if name != "TensorrtExecutionProvider":
        return name
    from .tensorrt import onnxfile

    model = onnxfile.read(path)
    half, int8 = "float16" in model.elements, model.quantized
    settings = {"device_id": "0", "trt_fp16_enable": str(int(half)), "trt_int8_enable": str(int(int8))}
    if cache:
        folder = os.path.join(cache, key(path, settings, hardware(*names)))
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.utime(folder)  # what is used stays young for what sweeps
        settings.update(trt_engine_cache_enable="1", trt_engine_cache_path=folder)
    return name, settings


def key(path: str, settings: Dict[str, str], where: Table) -> str:
    """The key of what the TensorRT provider builds of a file here, 64 hex digits; names of files play no part.

    where: as of `hardware`.
    """
    from .tensorrt import onnxfile

    what = {
        "model": onnxfile.digests(path),
        "options": settings,
        "runtime": machine.runtime_build("onnxruntime"),
        "device": [machine.machine(), jetson.release(), where, jetson.power_mode(), jetson.gpu_locked()],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
