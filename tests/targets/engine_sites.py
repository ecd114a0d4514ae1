"""A folder for Python's path with a stand-in for TensorRT and for the CUDA runtime, as a board has the real ones."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from boards import TestBoard
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
MODULE = '''
"""TensorRT 10.3's names, and a GPU whose kernels take 0.2 ms; see fake_tensorrt.py."""
import ctypes
import glob
import os
import time

from fake_tensorrt import Fake

_cuda = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(__file__), "nvidia", "*", "lib", "libcudart.so"))[0])
_cuda.fake_reset.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_int, ctypes.c_int]
_cuda.fake_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_cuda.fake_reset(int(os.environ.get("FAKE_STATUS", "0")), 200_000, 0, 0)
_cuda.fake_memory(ENGINE_MIB)
_fake = Fake("10.3")
_fake.refuses = lambda built: os.kill(os.getpid(), 9) if os.environ.get("FAKE_CRASH") else time.sleep(BUILD_S) or ""
_fake.launch = lambda stream, out, into, count: _cuda.fake_launch(stream, out, into, count) == 0
globals().update(vars(_fake.api))
'''


def compile_library(path: Path, source: Path | str, *flags: str) -> None:
    """A shared library of a C file or of a line of C; skips the test without a C compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler for the test's CUDA runtime")
    path.parent.mkdir(parents=True, exist_ok=True)
    line = source if isinstance(source, str) else None
    command = ["gcc", "-O1", "-shared", "-fPIC", *flags, "-o", path, "-x", "c", "-" if line else source]
    subprocess.run(command, check=True, input=line, text=True)


def make_gpu_site(folder: Path, card: str = "Orin", tensorrt: int = 100300, cudnn: int = 90300) -> Path:
    """A folder for Python's path with an ONNX Runtime for a GPU, and that GPU: see fake_onnxruntime.py."""
    cudart = folder / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so"
    compile_library(cudart, HERE / "cudart.c", f'-DGPU_NAME="{card}"')
    compile_library(folder / "libnvinfer.so.10", f"int getInferLibVersion(void) {{ return {tensorrt}; }}\n")
    compile_library(folder / "libcudnn.so.9", f"unsigned long cudnnGetVersion(void) {{ return {cudnn}; }}\n")
    shutil.copy(HERE / "fake_onnxruntime.py", folder)
    (folder / "sitecustomize.py").write_text("import fake_onnxruntime\n")  # for PYTHONPATH
    (folder / "fake_onnxruntime.pth").write_text("import fake_onnxruntime\n")  # for site-packages
    return folder


def make_site(folder: Path, engine_mib: int = 0, module: str = "tensorrt", build_s: float = 0.0) -> Path:
    """Such a folder, where an open engine takes so many of the GPU's 3000 MiB and its builder so long.

    Skips the test without a C compiler. module: what TensorRT is called there.
    """
    compile_library(folder / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so", HERE / "cudart.c")
    text = MODULE.replace("ENGINE_MIB", str(engine_mib)).replace("BUILD_S", str(build_s))
    (folder / f"{module}.py").write_text(text)
    shutil.copy(HERE / "fake_tensorrt.py", folder)
    shutil.copytree(HERE / "recordings" / "tensorrt", folder / "recordings" / "tensorrt")
    return folder


@contextmanager
def installed(board: TestBoard, made: Path) -> Iterator[None]:
    """A board that has what such a folder holds."""
    version = Path(sysconfig.get_path("purelib")).parent.name
    place = board.folder / "home" / "env" / "lib" / version / "site-packages"
    before = set(place.iterdir())
    for path in made.iterdir():
        shutil.move(path, place / path.name)
    try:
        yield
    finally:
        for path in set(place.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_scaled(path: Path, factor: float) -> Path:
    """A network that multiplies an input of shape (1, 3, 4, 4); the factor lies beside it, in a folder `weights`."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 4, 4]) for n in ("input", "output")]
    weight = numpy_helper.from_array(np.full((1, 3, 1, 1), factor, np.float32), "factor")
    node = helper.make_node("Mul", ["input", "factor"], ["output"], name="scale")
    model = helper.make_model(helper.make_graph([node], "scale", ports[:1], ports[1:], [weight]), ir_version=9)
    (path.parent / "weights").mkdir(parents=True)
    onnx.save(model, path, save_as_external_data=True, location="weights/factor.bin", size_threshold=0)
    return path


def write_relu(path: Path, name: str = "net") -> Path:
    """A network whose output has the shape of its input, (1, 3, 4, 4)."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 4, 4]) for n in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"], name=name)], name, ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
