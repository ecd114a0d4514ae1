"""The CUDA runtime through ctypes: memory, streams, events and graphs, and no package that would have to be installed.

Signatures are those of cuda_runtime_api.h. The one that changed is cudaGraphInstantiate: from 11.4 on
cudaGraphInstantiateWithFlags is there and taken, before it the five arguments of CUDA 10.2 to 11.3.
"""

import ctypes
import glob
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..base import read_text
from .errors import BoardError
from .library import NO_DRIVER_HINT, SCARCE_HINT

SPIN, BLOCK = 1, 4
"""cudaDeviceScheduleSpin and cudaDeviceScheduleBlockingSync."""
TO_DEVICE, TO_HOST = 1, 2
NO_DRIVER, NO_DEVICE, NO_MEMORY = (35, 3), (100, 38), (2,)
"""cudaErrorInsufficientDriver and cudaErrorInitializationError; cudaErrorNoDevice as of CUDA 10.1 and before."""
MAJOR, MINOR, INTEGRATED, MULTIPROCESSORS = 75, 76, 18, 16
"""cudaDevAttrComputeCapabilityMajor and Minor, cudaDevAttrIntegrated, cudaDevAttrMultiProcessorCount."""
PLACES = (
    "/usr/local/cuda/lib64", "/usr/local/cuda/lib", "/usr/local/cuda/targets/*/lib", "/usr/lib/*-linux-gnu",
    "/usr/local/cuda-*/lib64", "/usr/local/cuda-*/targets/*/lib",
)  # fmt: skip
DRIVER = "/sys/module/nvidia/version"
"""Release of the driver, as 570.86.15: several offer the same CUDA."""

OUT = POINTER(c_void_p)
SIGNATURES: Dict[str, Sequence[Any]] = {
    "cudaGetDeviceCount": (POINTER(c_int),),
    "cudaSetDeviceFlags": (c_uint,),
    "cudaSetDevice": (c_int,),
    "cudaDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cudaMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
    "cudaRuntimeGetVersion": (POINTER(c_int),),
    "cudaDriverGetVersion": (POINTER(c_int),),
    "cudaMalloc": (OUT, c_size_t),
    "cudaFree": (c_void_p,),
    "cudaMallocHost": (OUT, c_size_t),
    "cudaFreeHost": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (OUT, c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaEventCreateWithFlags": (OUT, c_uint),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, OUT),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
}
LATER: Dict[str, Sequence[Any]] = {
    "cudaGraphInstantiateWithFlags": (OUT, c_void_p, c_ulonglong),
}
"""Functions that not every version has."""


class Cuda(object):
    """A loaded CUDA runtime. path: of the library; searched for where it is left out.

    Raises BoardError where there is none.
    """

    def __init__(self, path: str = "") -> None:
        self.path, self.lib = _load([path] if path else _candidates())
        for name, types in dict(SIGNATURES, **{k: v for k, v in LATER.items() if hasattr(self.lib, k)}).items():
            function = getattr(self.lib, name)
            function.argtypes, function.restype = list(types), c_int
        for name in ("cudaGetErrorName", "cudaGetErrorString"):
            function = getattr(self.lib, name)
            function.argtypes, function.restype = [c_int], c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises BoardError with its name for any status but 0."""
        status = getattr(self.lib, name)(*arguments)
        if status:
            raise self.error(name, status)

    def bound(self, name: str, *arguments: Any) -> Callable[[], None]:
        """A call that is ready to be made again and again."""
        function = getattr(self.lib, name)

        def make() -> None:
            status = function(*arguments)
            if status:
                raise self.error(name, status)

        return make

    def error(self, name: str, status: int) -> BoardError:
        """The error for a status that a function gave."""
        said = [getattr(self.lib, f)(status) or b"" for f in ("cudaGetErrorName", "cudaGetErrorString")]
        code = "cudaError %d, %s: %s" % (status, said[0].decode(), said[1].decode())
        if status in NO_DRIVER:
            text = "no engine can run here, since the CUDA runtime finds no driver that fits (%s)" % code
            return BoardError("device", text, NO_DRIVER_HINT, status=status)
        if status in NO_DEVICE:
            text = "no engine can run here, since there is no GPU (%s)" % code
            return BoardError("device", text, NO_DRIVER_HINT, status=status)
        if status in NO_MEMORY:
            text = "the GPU has no memory left for %s (%s)" % (name, code)
            return BoardError("memory", text, SCARCE_HINT, status=status)
        return BoardError("model", "%s failed (%s)" % (name, code), status=status)

    def number(self, name: str, *arguments: Any) -> int:
        """What a function writes into its first argument, an int."""
        out = c_int()
        self.call(name, byref(out), *arguments)
        return int(out.value)

    def handle(self, name: str, *arguments: Any) -> c_void_p:
        """What a function writes into its first argument, a pointer."""
        out = c_void_p()
        self.call(name, byref(out), *arguments)
        return out

    def handle_after(self, name: str, *arguments: Any) -> c_void_p:
        """What a function writes into its last argument, a pointer."""
        out = c_void_p()
        self.call(name, *arguments, byref(out))
        return out

    def open(self, spin: bool) -> None:
        """Take the first GPU and say how waiting for it is done. Raises BoardError where there is none."""
        if not self.number("cudaGetDeviceCount"):
            raise self.error("cudaGetDeviceCount", NO_DEVICE[0])
        status = self.lib.cudaSetDeviceFlags(SPIN if spin else BLOCK)
        if status and status != 708:  # cudaErrorSetOnActiveProcess: another model has set the same already
            raise self.error("cudaSetDeviceFlags", status)
        self.call("cudaSetDevice", 0)

    def free_memory(self) -> int:
        """Free bytes of the GPU."""
        free, total = c_size_t(), c_size_t()
        self.call("cudaMemGetInfo", byref(free), byref(total))
        return int(free.value)

    def shares_memory(self) -> bool:
        """Whether the GPU uses the system's memory, as on a Jetson."""
        return bool(self.number("cudaDeviceGetAttribute", INTEGRATED, 0))

    def capability(self) -> str:
        """Compute capability of the GPU, as 8.7."""
        major, minor = (self.number("cudaDeviceGetAttribute", which, 0) for which in (MAJOR, MINOR))
        return "%d.%d" % (major, minor)

    def name(self) -> str:
        """What the GPU is called: the first 256 bytes of cudaDeviceProp, whose size differs between versions."""
        out = ctypes.create_string_buffer(8192)
        newer = hasattr(self.lib, "cudaGetDeviceProperties_v2")
        self.call("cudaGetDeviceProperties_v2" if newer else "cudaGetDeviceProperties", out, 0)
        return out.raw[:256].partition(b"\0")[0].decode("utf-8", "replace")

    def facts(self) -> Dict[str, Any]:
        """What an engine depends on: two GPUs of one capability with other counts of processors share none.

        driver: the CUDA that it offers, and its own release where the system shows it.
        """
        runtime, driver = self.versions()
        release = read_text(DRIVER)
        driver += " (%s)" % release if release else ""
        multiprocessors = self.number("cudaDeviceGetAttribute", MULTIPROCESSORS, 0)
        return {
            "name": self.name(), "capability": self.capability(), "multiprocessors": multiprocessors,
            "cuda": runtime, "driver": driver,
        }  # fmt: skip

    def versions(self) -> Tuple[str, str]:
        """Versions of the runtime and of what the driver offers, as 12.6; the driver's is 0.0 without one."""
        found = [self.number(name) for name in ("cudaRuntimeGetVersion", "cudaDriverGetVersion")]
        return ("%d.%d" % _version(found[0]), "%d.%d" % _version(found[1]))

    def instantiate(self, graph: c_void_p) -> c_void_p:
        """An executable graph."""
        if hasattr(self.lib, "cudaGraphInstantiateWithFlags"):
            return self.handle("cudaGraphInstantiateWithFlags", graph, 0)
        self.lib.cudaGraphInstantiate.argtypes = [OUT, c_void_p, OUT, c_char_p, c_size_t]
        return self.handle("cudaGraphInstantiate", graph, None, None, 0)

    def elapsed_ns(self, begin: c_void_p, end: c_void_p) -> int:
        """Nanoseconds between two events that have passed; the runtime counts in half microseconds."""
        out = c_float()
        self.call("cudaEventElapsedTime", byref(out), begin, end)
        return int(round(out.value * 1e6))


def _version(number: int) -> Tuple[int, int]:
    return number // 1000, number % 1000 // 10


def _candidates() -> List[str]:
    """Paths and names under which the runtime may be found: loaded already, on the loader's path, where it is put."""
    found = []
    try:
        with open("/proc/self/maps") as file:
            found = sorted({line.split(None, 5)[5].strip() for line in file if "libcudart.so" in line})
    except OSError:
        pass
    found.append("libcudart.so")
    wheels = tuple(os.path.join(folder, "nvidia", "*", "lib") for folder in sys.path if folder)
    for place in PLACES + wheels:
        found += sorted(glob.glob(os.path.join(place, "libcudart.so*")), key=len)
    return found + ["libcudart.so.%s" % version for version in ("13", "12", "11.0", "10.2")]


def _load(paths: Sequence[str]) -> Tuple[str, Any]:
    last: Optional[OSError] = None
    for path in paths:
        try:
            return path, ctypes.CDLL(path)
        except OSError as error:
            last = error
    raise BoardError("library", "the CUDA runtime (libcudart) cannot be loaded here: %s" % last)
