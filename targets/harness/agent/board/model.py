"""One network in ONNX Runtime: opened, warmed up, timed in blocks, or run on arrays."""

import time
from typing import Any, List, Sequence, Tuple, Type

from . import providers
from .base import CLOCK, AgentError, Table
from .machine import usable_cores
from .timing import SPIN_NS, Timed

NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def runtime_errors() -> Tuple[Type[Exception], ...]:
    """The exception classes that ONNX Runtime raises."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as native
    except ImportError:  # a board that runs engines only
        own: List[Type[Exception]] = []
    else:
        own = [value for value in vars(native).values() if isinstance(value, type) and issubclass(value, Exception)]
    return tuple(own) + (RuntimeError, ValueError, TypeError, OSError, MemoryError)


def error_text(error: BaseException) -> str:
    """First line of an error, without ONNX Runtime's prefix of codes and without its source file names."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    scarce = text.find("Failed to allocate")
    return text[max(0, scarce) :].strip().rstrip(".")


def open_model(path: str, options: Table) -> Any:
    """A network that can be timed, in the runtime that the options name; ONNX Runtime where they name none."""
    if options.get("library"):
        from .tensorrt import opening

        return opening.model(path, options)
    return Model(path, options)


def open_session(path: str, options: Table) -> Any:
    """A network that infers on arrays: a session of ONNX Runtime, or an engine that looks like one.

    options: threads (0: all cores), spin, providers, engine_cache (see `providers.opened`), profile; of an engine those
    of its own runtime.
    """
    if options.get("library"):
        from .tensorrt import opening

        return opening.session(path, options)
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options["threads"] or usable_cores()
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options["spin"] else "0")
    if options.get("profile"):
        settings.enable_profiling = True
        settings.profile_file_prefix = options["profile"]
    return providers.opened(path, settings, options)


class Model(Timed):
    """An opened session of ONNX Runtime with input and output buffers bound once.

    options: threads, spin, providers, seed; profile: the beginning of the path of the profiler's file, where the
    runtime's profiler is to run. Inputs are seeded noise of the declared shapes; a free batch axis is 1.
    protocol: the id of how it is timed on a GPU, else "".
    """

    def __init__(self, path: str, options: Table) -> None:
        try:
            self._open(path, options)
        except runtime_errors() as error:
            text = error_text(error)
            scarce = isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text
            raise AgentError("memory" if scarce else "model", text, path) from None

    def _open(self, path: str, options: Table) -> None:
        self.session = open_session(path, options)
        self.protocol = providers.protocol(options, self.session)
        self.binding = self.session.io_binding()
        self._bind(options["seed"])

    def _bind(self, seed: int) -> None:
        import numpy as np
        import onnxruntime as ort

        noise = np.random.RandomState(seed)
        self.values = []
        for port in self.session.get_inputs():
            shape = [1 if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(port.shape)]
            free = [size for size in shape if not isinstance(size, int)]
            if free:
                raise ValueError("input '%s' has the free size '%s'; only the batch may be free" % (port.name, free[0]))
            if port.type not in NUMPY_TYPES:
                raise ValueError("input '%s' is a %s, which cannot be filled" % (port.name, port.type))
            kind = np.dtype(NUMPY_TYPES[port.type])
            array = noise.standard_normal(shape) if kind.kind == "f" else noise.randint(0, 2, shape)
            self.values.append(ort.OrtValue.ortvalue_from_numpy(aligned(array, kind)))
            self.binding.bind_ortvalue_input(port.name, self.values[-1])
        names = [port.name for port in self.session.get_outputs()]
        for name in names:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)
        made = self.binding.get_outputs()
        self.binding.clear_binding_outputs()
        for name, value in zip(names, made):
            self.binding.bind_ortvalue_output(name, value)
        self.values.extend(made)

    def block(self, dropped: int, timed: int) -> List[int]:
        """Nanoseconds of `timed` inferences after `dropped` untimed ones."""
        run, binding, clock = self.session.run_with_iobinding, self.binding, CLOCK
        for _ in range(dropped):
            run(binding)
        out = [0] * timed
        for i in range(timed):
            begin = clock()
            run(binding)
            out[i] = clock() - begin
        return out

    def paced(self, dropped: int, timed: int, period_ns: int) -> Tuple[List[int], int]:
        """Nanoseconds of `timed` inferences, one at each tick, after `dropped` untimed ones; and the deadline misses.

        Ticks are the multiples of the period on the monotonic clock, which all processes of a machine share. The
        process sleeps until shortly before a tick, as a control loop does: clocks fall and caches cool, which is what
        pacing is to show and what spinning through the whole period would hide. Only the last moment, at most SPIN_NS
        and a tenth of the period, is spun, since a sleep ends late. The nanoseconds are those of the inference alone;
        it misses its deadline when it has not finished before the next tick, be it slow or late to start. The ticks
        that it ran over are skipped.
        """
        run, binding, clock = self.session.run_with_iobinding, self.binding, CLOCK
        spin = min(SPIN_NS, period_ns // 10)
        out, missed, end = [0] * timed, 0, clock()
        for i in range(-dropped, timed):
            tick = (end // period_ns + 1) * period_ns
            rest = tick - spin - clock()
            if rest > 0:
                time.sleep(rest * 1e-9)
            begin = clock()
            while begin < tick:
                begin = clock()
            run(binding)
            end = clock()
            if i >= 0:
                out[i] = end - begin
                missed += int(end >= tick + period_ns)
        return out, missed

    def check(self) -> None:
        """Raise AgentError where the last inference left a value in an output that is no finite number."""
        import numpy as np

        for port, value in zip(self.session.get_outputs(), self.values[-len(self.session.get_outputs()) :]):
            if not value.is_tensor() or value.data_type() not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
                continue
            array = value.numpy()
            wrong = int(array.size - np.count_nonzero(np.isfinite(array)))
            if wrong:
                text = "%d of %d values of its output '%s' are NaN or infinite" % (wrong, array.size, port.name)
                raise AgentError("model", text)


def aligned(array: Any, kind: Any) -> Any:
    """The array as `kind` in memory that starts at a multiple of 64 bytes, as the runtime's own buffers do.

    numpy promises 16 bytes only, and where a buffer happens to start would move the time of small networks.
    """
    import numpy as np

    size = array.size * kind.itemsize
    raw = np.empty(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + size].view(kind).reshape(array.shape)
    out[...] = array
    return out


def port_tables(ports: Sequence[Any]) -> List[Table]:
    """Name, shape (None where it is free) and numpy's type of inputs or outputs."""
    shape = [[size if isinstance(size, int) else None for size in port.shape] for port in ports]
    return [{"name": p.name, "shape": s, "dtype": NUMPY_TYPES.get(p.type, p.type)} for p, s in zip(ports, shape)]


def run_batch(session: Any, arrays: Sequence[Any]) -> List[Any]:
    """Outputs for a batch of any size; a fixed batch is run over it, the last part filled with its last sample."""
    import numpy as np

    ports = session.get_inputs()
    fixed = ports[0].shape[0] if ports[0].shape and isinstance(ports[0].shape[0], int) else 0
    total, parts = int(arrays[0].shape[0]), []
    step = fixed or max(1, total)
    for start in range(0, total, step):
        count = min(step, total - start)
        pieces = [array[start : start + step] for array in arrays]
        if count < fixed:
            pieces = [np.concatenate([piece, np.repeat(piece[-1:], fixed - count, axis=0)]) for piece in pieces]
        outputs = session.run(None, {port.name: piece for port, piece in zip(ports, pieces)})
        for port, output in zip(session.get_outputs(), outputs):
            if output.ndim == 0 or output.shape[0] != max(count, fixed):
                raise ValueError("its output '%s' has shape %s, so no batch axis" % (port.name, output.shape))
        parts.append([output[:count] for output in outputs])
    return [np.concatenate(column) for column in zip(*parts)]
