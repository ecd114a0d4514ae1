"""An ONNX Runtime with GPU providers: the processor's own sessions, which say that they run on a GPU.

Imported as a process of the agent starts. Like the real one it names the providers that were compiled in, loads what
they run on when a session is opened, and runs on the processor without a word where that does not load (FAKE_LACKS).
"""

import ctypes
import glob
import os

import onnxruntime as ort

GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
HERE = os.path.dirname(os.path.abspath(__file__))
ctypes.CDLL(os.path.join(HERE, "nvidia", "cuda_runtime", "lib", "libcudart.so"))
available, Real = ort.get_available_providers(), ort.InferenceSession


class Session(Real):
    """A session on the processor."""

    def __init__(self, source, settings=None, providers=(), **more):
        given = [(each, {}) if isinstance(each, str) else each for each in providers]
        lacks = os.environ.get("FAKE_LACKS", "").split()
        self.fake = {name: dict(options) for name, options in given if name in GPU and name not in lacks}
        for name, file in zip(GPU, ("libnvinfer.so*", "libcudnn.so*"), strict=True):
            if name in self.fake:
                ctypes.CDLL(glob.glob(os.path.join(HERE, file))[0])
        if "CUDAExecutionProvider" in self.fake:
            self.fake["CUDAExecutionProvider"]["enable_cuda_graph"] = os.environ.get("FAKE_GRAPH", "0")
        super().__init__(source, settings, providers=["CPUExecutionProvider"], **more)

    def get_providers(self):
        return [*self.fake, "CPUExecutionProvider"]

    def get_provider_options(self):
        return {**self.fake, "CPUExecutionProvider": {}}


ort.get_available_providers = lambda: [*GPU, *available]
ort.InferenceSession = Session
