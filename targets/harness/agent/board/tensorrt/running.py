"""Runs an engine: buffers bound once, wall times and CUDA-event times of the same inferences, every setting said.

An inference is: inputs to the GPU (where copies are asked for), the engine (enqueued, or launched as a CUDA graph),
outputs back, and waiting for the stream, spinning or blocked. The wall clock is read around all of it; the events lie
around the engine alone. What was asked for is part of the protocol's id, so that numbers taken in two manners are
never compared. Tensors are bound by name where the version can (execute_async_v3), else by number.
"""

import random
import struct
from ctypes import c_void_p, memmove, string_at
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..timing import Timed
from . import layers, library
from .cuda import TO_DEVICE, TO_HOST, Cuda
from .errors import BoardError, Table
from .library import Library

KINDS = {
    "FLOAT": ("float32", 4), "HALF": ("float16", 2), "BF16": ("bfloat16", 2), "INT8": ("int8", 1),
    "UINT8": ("uint8", 1), "INT32": ("int32", 4), "INT64": ("int64", 8), "BOOL": ("bool", 1), "FP8": ("float8", 1),
}  # fmt: skip
"""DataType -> numpy's name and bytes of an element."""
CODES = {"float32": "f", "float16": "e", "int8": "b", "uint8": "B", "int32": "i", "int64": "q", "bool": "?"}
ONNX_TYPES = {"float32": "float", "float16": "float16", "bool": "bool"}
CAPTURE_RELAXED = 2
GRAPH_HINT = "set tensorrt.cuda_graph = false; engines that use a DLA or loops cannot be captured."

Port = NamedTuple("Port", [("name", str), ("shape", Tuple[int, ...]), ("dtype", str), ("fed", bool), ("bytes", int)])
"""A tensor of an engine. fed: whether it is an input; bytes: of its buffer."""


def protocol(options: Table) -> str:
    """The id of how an engine is timed through Python: the first word of a session's protocol."""
    switches = "/".join("%s=%d" % (name, bool(options[name])) for name in ("cuda_graph", "spin", "copies"))
    return "tensorrt-python-1/clock=wall/" + switches


def opened(lib: Library, data: bytes, options: Table) -> Any:
    """An engine from its serialized form. Raises BoardError, in one sentence where there is no driver.

    options: dla_core; version_compatible, which lets an engine bring the code of the runtime that it was built with.
    """
    del lib.errors[:]
    runtime = lib.make("Runtime")
    if options.get("dla_core") is not None:
        runtime.DLA_core = options["dla_core"]
    if options.get("version_compatible"):
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is not None:
        return engine
    if lib.errors and library.lacks_driver(lib.errors[0]):
        raise library.no_driver(lib.title, lib.errors[0])
    reason = lib.last_error("it does not say why")
    text = "%s cannot open the engine: %s" % (lib.title, reason)
    if library.tells_scarce(lib.errors):
        raise BoardError("memory", text, library.SCARCE_HINT)
    raise BoardError("model", text, "build it again on this device with this version.")


def ports_of(lib: Library, engine: Any, context: Any) -> List[Port]:
    """Inputs and outputs of an engine in its order, a free batch set to 1. Raises BoardError for other free sizes."""
    named = hasattr(engine, "num_io_tensors")
    ports = []
    for index in range(engine.num_io_tensors if named else engine.num_bindings):
        if named:
            name = engine.get_tensor_name(index)
            fed = engine.get_tensor_mode(name) == lib.api.TensorIOMode.INPUT
            shape, kind = engine.get_tensor_shape(name), engine.get_tensor_dtype(name)
        else:
            name, fed = engine.get_binding_name(index), engine.binding_is_input(index)
            shape, kind = engine.get_binding_shape(index), engine.get_binding_dtype(index)
        sizes = [int(size) for size in shape]
        if any(size < 0 for size in sizes[1:]) or kind.name not in KINDS:
            raise BoardError("model", "tensor '%s' of the engine is %s %s" % (name, kind.name, sizes))
        if sizes and sizes[0] < 0:
            sizes[0] = 1
            if fed and named:
                context.set_input_shape(name, sizes)
            elif fed:
                context.set_binding_shape(index, sizes)
        count = 1
        for size in sizes:
            count *= size
        dtype, each = KINDS[kind.name]
        ports.append(Port(name, tuple(sizes), dtype, bool(fed), count * each))
    return ports


class EngineModel(Timed):
    """An opened engine with buffers bound once; it is timed like any other model of the agent.

    options: library, seed, cuda_graph, spin and copies, and those of `opened`. Inputs are seeded noise. events:
    nanoseconds between the CUDA events around the engine in every timed inference of the last block.
    """

    def __init__(
        self, path: str, options: Table, loaded: Optional[Library] = None, cuda: Optional[Cuda] = None
    ) -> None:
        self.options = options
        self.lib = loaded or library.load(options["library"])
        self.cuda = cuda or Cuda()
        self.cuda.open(bool(options["spin"]))
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise BoardError("model", "'%s' cannot be read: %s" % (path, error.strerror)) from None
        self.events: List[int] = []
        self.held: List[Tuple[str, c_void_p]] = []
        self.steps: Tuple[Callable[[], None], ...] = ()
        self.enqueue: Any = None
        try:
            self._open(path, data)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str, data: bytes) -> None:
        self.engine = opened(self.lib, data, self.options)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            text = "the engine '%s' does not fit: %s" % (path, self.lib.last_error("no context"))
            raise BoardError("memory", text, library.SCARCE_HINT)
        self.ports = ports_of(self.lib, self.engine, self.context)
        self._allocate()
        self.fill(noise(self.ports, self.options["seed"]))
        self._prepare()

    # --- buffers

    def _hold(self, release: str, handle: c_void_p) -> c_void_p:
        self.held.append((release, handle))
        return handle

    def _allocate(self) -> None:
        """Buffers on both sides for every tensor, the stream, the events."""
        make = self.cuda.handle
        self.stream = self._hold("cudaStreamDestroy", make("cudaStreamCreateWithFlags", 1))
        self.begin, self.end = (self._hold("cudaEventDestroy", make("cudaEventCreateWithFlags", 0)) for _ in range(2))
        self.device: Dict[str, c_void_p] = {}
        self.host: Dict[str, c_void_p] = {}
        for port in self.ports:
            size = max(1, port.bytes)
            self.device[port.name] = self._hold("cudaFree", make("cudaMalloc", size))
            self.host[port.name] = self._hold("cudaFreeHost", make("cudaMallocHost", size))
        if hasattr(self.context, "set_tensor_address"):
            for name, place in self.device.items():
                if self.context.set_tensor_address(name, place.value) is False:
                    raise BoardError("model", "tensor '%s' takes no buffer" % name)

    def close(self) -> None:
        """Give back what was taken; the model cannot be used afterwards."""
        self.steps, self.enqueue, self.context, self.engine = (), None, None, None
        while self.held:
            release, handle = self.held.pop()
            getattr(self.cuda.lib, release)(handle)

    def fill(self, values: Dict[str, bytes]) -> None:
        """Put bytes into inputs, on both sides."""
        for port in self.ports:
            if port.fed:
                data = values[port.name]
                if len(data) != port.bytes:
                    text = "input '%s' takes %d bytes, %d were given"
                    raise BoardError("model", text % (port.name, port.bytes, len(data)))
                memmove(self.host[port.name], data, port.bytes)
                self._copying(port, TO_DEVICE)()
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def _copying(self, port: Port, way: int) -> Callable[[], None]:
        """A copy of a tensor to the GPU or back, ready to be made."""
        there, here = self.device[port.name], self.host[port.name]
        target, source = (there, here) if way == TO_DEVICE else (here, there)
        return self.cuda.bound("cudaMemcpyAsync", target, source, port.bytes, way, self.stream)

    def fetch(self) -> Dict[str, bytes]:
        """Bytes of every output after the last inference."""
        made = [port for port in self.ports if not port.fed]
        for port in made:
            self._copying(port, TO_HOST)()
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return {port.name: string_at(self.host[port.name], port.bytes) for port in made}

    # --- inference

    def _enqueuing(self) -> Callable[[], None]:
        """A function that gives the engine to the stream, with everything looked up before."""
        context, stream = self.context, self.stream.value
        named = hasattr(context, "execute_async_v3")
        run: Any = context.execute_async_v3 if named else context.execute_async_v2
        places = [] if named else [[self.device[port.name].value for port in self.ports]]
        arguments: List[Any] = places + [stream]

        def enqueue() -> None:
            if run(*arguments) is False:
                reason = self.lib.last_error("it does not say why")
                raise BoardError("model", "%s does not run the engine: %s" % (self.lib.title, reason))

        return enqueue

    def _prepare(self) -> None:
        """One inference, so that everything is there; then the graph where it is asked for, and the calls of `once`."""
        self.enqueue = self._enqueuing()
        self.enqueue()
        self.cuda.call("cudaStreamSynchronize", self.stream)
        launch = self._captured() if self.options["cuda_graph"] else self.enqueue
        bound, stream = self.cuda.bound, self.stream
        fed = [self._copying(port, TO_DEVICE) for port in self.ports if port.fed]
        made = [self._copying(port, TO_HOST) for port in self.ports if not port.fed]
        steps = [bound("cudaEventRecord", self.begin, stream), launch, bound("cudaEventRecord", self.end, stream)]
        if self.options["copies"]:
            steps = fed + steps + made
        self.steps = tuple(steps + [bound("cudaStreamSynchronize", stream)])

    def _captured(self) -> Any:
        """A function that launches the engine as a graph."""
        try:
            self.cuda.call("cudaStreamBeginCapture", self.stream, CAPTURE_RELAXED)
            self.enqueue()
            graph = self._hold("cudaGraphDestroy", self.cuda.handle_after("cudaStreamEndCapture", self.stream))
            ready = self._hold("cudaGraphExecDestroy", self.cuda.instantiate(graph))
        except BoardError as error:
            text = "the engine cannot be captured as a CUDA graph: %s" % error.message
            raise BoardError("option", text, GRAPH_HINT, option="cuda_graph") from None
        return lambda: self.cuda.call("cudaGraphLaunch", ready, self.stream)

    def once(self) -> None:
        """One complete inference."""
        for step in self.steps:
            step()

    def settle(self) -> None:
        """Note the time between the events around the engine."""
        self.events.append(self.cuda.elapsed_ns(self.begin, self.end))

    def block(self, dropped: int, timed: int) -> List[int]:
        """Wall nanoseconds of `timed` inferences after `dropped` untimed ones; `events` holds those of the GPU."""
        self.events = []
        return Timed.block(self, dropped, timed)

    def paced(self, dropped: int, timed: int, period_ns: int) -> Tuple[List[int], int]:
        """As `Timed.paced`; `events` holds the nanoseconds of the GPU."""
        self.events = []
        return Timed.paced(self, dropped, timed, period_ns)

    def check(self) -> None:
        """Raise BoardError where the last inference left a value in an output that is no finite number."""
        for port in self.ports:
            if not port.fed and port.dtype in ("float32", "float16"):
                data = self.fetch()[port.name]
                wrong = sum(1 for (value,) in struct.iter_unpack("<" + CODES[port.dtype], data) if value - value != 0.0)
                if wrong:
                    count = len(data) // struct.calcsize(CODES[port.dtype])
                    text = "%d of %d values of its output '%s' are NaN or infinite"
                    raise BoardError("model", text % (wrong, count, port.name))

    def infer(self, values: Dict[str, bytes]) -> Dict[str, bytes]:
        """Bytes of the outputs for bytes of the inputs."""
        self.fill(values)
        self.once()
        return self.fetch()

    def profile(self, runs: int) -> Dict[Tuple[str, str], float]:
        """(name, operator) of every layer -> its ms per inference, over `runs` inferences under the library's profiler.

        The profiler works without a graph, and slows the run.
        """
        seen: Dict[str, float] = {}
        self.context.profiler = make_profiler(self.lib.api, seen)
        for _ in range(runs):
            self.enqueue()
            self.cuda.call("cudaStreamSynchronize", self.stream)
        known = {layer["name"]: layer["op"] for layer in layers.inspect(self.lib, self.engine)["layers"]}
        return {(name, known.get(name, "")): ms / runs for name, ms in seen.items()}


def make_profiler(api: Any, seen: Dict[str, float]) -> Any:
    """An IProfiler of the library that adds up milliseconds by layer."""

    class Profiler(api.IProfiler):  # type: ignore[misc]
        """Told of every layer after every inference."""

        def __init__(self) -> None:
            api.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            """A layer took so long."""
            seen[layer_name] = seen.get(layer_name, 0.0) + ms

    return Profiler()


class EngineSession(object):
    """An engine with the few methods of an ONNX Runtime session that the agent's inference uses."""

    Value = NamedTuple("Value", [("name", str), ("shape", List[int]), ("type", str)])

    def __init__(self, model: EngineModel) -> None:
        self.model = model
        for port in model.ports:
            if port.dtype not in CODES:
                raise BoardError(
                    "model", "tensor '%s' of the engine is %s, which numpy lacks" % (port.name, port.dtype)
                )

    def close(self) -> None:
        """Give back what the engine took."""
        self.model.close()

    def _values(self, fed: bool) -> List[Any]:
        ports = [port for port in self.model.ports if port.fed is fed]
        return [self.Value(p.name, list(p.shape), "tensor(%s)" % ONNX_TYPES.get(p.dtype, p.dtype)) for p in ports]

    def get_inputs(self) -> List[Any]:
        """Inputs with name, shape and ONNX type."""
        return self._values(True)

    def get_outputs(self) -> List[Any]:
        """Outputs with name, shape and ONNX type."""
        return self._values(False)

    def run(self, names: Optional[Sequence[str]], feeds: Dict[str, Any]) -> List[Any]:
        """Outputs as numpy arrays, all of them where names is None."""
        import numpy as np

        ports = {port.name: port for port in self.model.ports}
        given = {n: np.ascontiguousarray(a, dtype=ports[n].dtype).tobytes() for n, a in feeds.items()}
        made = self.model.infer(given)
        wanted = [value.name for value in self.get_outputs()] if names is None else list(names)
        return [np.frombuffer(made[n], ports[n].dtype).reshape(ports[n].shape).copy() for n in wanted]


def noise(ports: Sequence[Port], seed: int) -> Dict[str, bytes]:
    """Seeded noise for every input: standard normal for floats, 0 and 1 for others; numpy's where it is there."""
    try:
        import numpy as np
    except ImportError:
        return _plain_noise(ports, seed)
    source, values = np.random.RandomState(seed), {}
    for port in ports:
        if port.fed and port.dtype in CODES:
            floating = port.dtype.startswith("float")
            array = source.standard_normal(port.shape) if floating else source.randint(0, 2, port.shape)
            values[port.name] = np.asarray(array).astype(port.dtype).tobytes()
        elif port.fed:
            values[port.name] = bytes(port.bytes)
    return values


def _plain_noise(ports: Sequence[Port], seed: int) -> Dict[str, bytes]:
    source, values = random.Random(seed), {}
    for port in ports:
        code = CODES.get(port.dtype)
        if port.fed and code is None:
            values[port.name] = bytes(port.bytes)
        elif port.fed and code is not None:
            count = port.bytes // struct.calcsize(code)
            if code in "fe":
                values[port.name] = struct.pack(
                    "<%d%s" % (count, code), *(source.gauss(0.0, 1.0) for _ in range(count))
                )
            else:
                values[port.name] = struct.pack("<%d%s" % (count, code), *(source.randint(0, 1) for _ in range(count)))
    return values
