"""Where ONNX Runtime runs a network, and what each of its GPU providers is asked for.

The TensorRT provider builds an engine in every process unless it may keep it, and names a kept one by the graph's name
and structure: networks with other weights, even with other shapes, then share one and give each other's answers
(github.com/microsoft/onnxruntime, issues 6455 and 32254). So each network has a folder of its own, under a key that
holds its bytes and those of the weights beside it. Only options are given that every version knows which takes any by
name, since an unknown one is an error (onnxruntime.ai, "CUDA Execution Provider", "TensorRT Execution Provider").
Values are text.
"""

import hashlib
import json
import os
from typing import Any, Dict, List

from . import jetson, machine
from .base import Table

CUDA: Dict[str, str] = {
    "device_id": "0",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "do_copy_in_default_stream": "1",
}
"""The provider's own defaults, said so that another version's defaults change no number."""


def asked(path: str, options: Table) -> List[Any]:
    """The providers that a session of a file is opened with, best first: a name, or a name with its options.

    options: providers, their names; engine_cache: the folder where engines are kept, or "". Raises AgentError where the
    TensorRT provider is asked for and the file is no ONNX file.
    """
    return [given(name, path, str(options.get("engine_cache") or "")) for name in options["providers"]]


def given(name: str, path: str, cache: str) -> Any:
    """A provider with what it is asked for. Which types it may use is what the file holds."""
    if name == "CUDAExecutionProvider":
        return name, dict(CUDA)
    if name != "TensorrtExecutionProvider":
        return name
    from .tensorrt import onnxfile

    model = onnxfile.read(path)
    half, int8 = "float16" in model.elements, model.quantized
    settings = {"device_id": "0", "trt_fp16_enable": str(int(half)), "trt_int8_enable": str(int(int8))}
    if cache:
        folder = os.path.join(cache, key(path, settings))
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.utime(folder)  # what is used stays young for what sweeps
        settings.update(trt_engine_cache_enable="1", trt_engine_cache_path=folder)
    return name, settings


def key(path: str, settings: Dict[str, str]) -> str:
    """The key of what the TensorRT provider builds of a file here, 64 hex digits; names of files play no part."""
    from .tensorrt import onnxfile

    what = {
        "model": onnxfile.digests(path),
        "options": settings,
        "runtime": machine.runtime_build("onnxruntime"),
        "device": [machine.machine(), jetson.release()],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
