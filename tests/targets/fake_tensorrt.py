"""Stand-ins for the Python modules of TensorRT 8.2, 8.5, 8.6, 10.3 and 11.4, each with exactly what that version has.

Names come from the recordings beside this file (recordings/README.md says from where). Reading, calling or setting a
name that a version lacks raises AttributeError, as the real module does; a name that it has and nothing here behaves
like raises NotImplementedError. What they do is what the builder and the runner rely on, and no more: an "engine" is
JSON of what it was built of, and running one doubles its input. They stand only for what cannot run on a machine
without a GPU; TensorRT for RTX is the real library in test_tensorrt.py.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

RECORDINGS = Path(__file__).parent / "recordings" / "tensorrt"
VERSIONS = ("8.2", "8.5", "8.6", "10.3", "11.4")
KINDS = {1: "FLOAT", 10: "HALF", 3: "INT8", 7: "INT64", 6: "INT32", 9: "BOOL"}
LAYERS = {
    "Conv": "CONVOLUTION", "Relu": "ACTIVATION", "Cast": "CAST", "QuantizeLinear": "QUANTIZE", "Softmax": "SOFTMAX",
    "DequantizeLinear": "DEQUANTIZE", "GlobalAveragePool": "REDUCE", "Flatten": "SHUFFLE", "Add": "ELEMENTWISE",
}  # fmt: skip


class Fake:
    """A module of one version. said: what happened, in order. cores: DLA cores; refuses: (flags) -> why a build fails.

    placed: what is logged of where layers run; broken: why there is no builder; complaints: what the parser says, as
    (node, name, operator, description); launch: what runs an engine.
    """

    def __init__(self, version: str) -> None:
        table = json.loads((RECORDINGS / f"{version}.json").read_text(encoding="utf-8"))
        self.version, self.names = table["version"], table["classes"]
        self.said: list[tuple[str, Any]] = []
        self.cores = 0
        self.placed: list[str] = []
        self.broken = ""
        self.refuses: Callable[[dict[str, Any]], str] = lambda built: ""
        self.complaints: list[tuple[int, str, str, str]] = []
        self.launch: Callable[[int, int, int, int], bool] = lambda *a: True
        self.api = SimpleNamespace(__version__=self.version)
        for name, members in table["enums"].items():
            setattr(self.api, name, _enum(name, members))
        for name, members in self.names.items():
            setattr(self.api, name, _class(self, name, members))


def _enum(name: str, members: list[str]) -> Any:
    severities = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    ordered = [m for m in severities if m in members] or members
    return enum.IntEnum(name, {m: i for i, m in enumerate(ordered)})


def _class(fake: Fake, name: str, members: list[str]) -> Any:
    behaviour = BEHAVIOURS.get(name, object)
    space: dict[str, Any] = {}
    for member in members:
        if member in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
            space[member] = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE").index(member)
        elif hasattr(behaviour, member):
            space[member] = behaviour.__dict__[member]
        elif member in SETTINGS:
            space[member] = _setting(member)
        else:
            space[member] = property(_unknown(name, member))
    own = {"fake": fake, "__init__": behaviour.__dict__.get("__init__", lambda self, *a: None)}
    hidden = {k: v for k, v in behaviour.__dict__.items() if k.startswith("_x_") or k in ("__buffer__",)}
    made = type(name, (bytes,) if name == "IHostMemory" else (), {**space, **own, **hidden})
    if name not in ("ILogger", "IProfiler", "IProgressMonitor", "IHostMemory"):
        made.__setattr__ = _only({*members, "fake"}, name)  # type: ignore[assignment]
    return made


SETTINGS = {
    "engine_host_code_allowed",
    "profiling_verbosity", "max_workspace_size", "DLA_core", "default_device_type", "builder_optimization_level",
    "hardware_compatibility_level", "progress_monitor", "precision", "profiler", "name", "dtype", "shape", "type",
    "num_inputs", "num_outputs", "logger",
}  # fmt: skip
"""Properties that just hold what they are given."""


def _setting(member: str) -> property:
    def read(self: Any) -> Any:
        return self.__dict__.get("held", {}).get(member)

    def write(self: Any, value: Any) -> None:
        self.__dict__.setdefault("held", {})[member] = value
        self.fake.said.append((member, value))

    return property(read, write)


def _unknown(name: str, member: str) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        raise NotImplementedError(f"{name}.{member} is there and nothing here behaves like it")

    return read


def _only(names: set[str], kind: str) -> Callable[[Any, str, Any], None]:
    def write(self: Any, name: str, value: Any) -> None:
        if name not in names and not name.startswith("_x_"):
            raise AttributeError(f"{kind} has no attribute '{name}'")
        object.__setattr__(self, name, value)

    return write


def _held(thing: Any, name: str) -> Any:
    """What a property holds, None where it was never set."""
    return thing.__dict__.get("held", {}).get(name)


# --- what the classes do -----------------------------------------------------------------------------------------


class Builder:
    def __init__(self, logger: Any) -> None:
        self._x_log = logger
        if self.fake.broken:
            logger.log(1, self.fake.broken)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @property
    def num_DLA_cores(self) -> int:
        return self.fake.cores

    def create_network(self, flags: int = 0) -> Any:
        network = self.fake.api.INetworkDefinition()
        members = self.fake.api.NetworkDefinitionCreationFlag
        network._x_flags = sorted(m.name for m in members if flags >> int(m) & 1)
        network._x_layers, network._x_inputs, network._x_model = [], [], ""
        return network

    def create_builder_config(self) -> Any:
        config = self.fake.api.IBuilderConfig()
        config._x_flags, config._x_profiles, config._x_pools, config._x_cache = {"TF32"}, [], {}, None
        return config

    def create_optimization_profile(self) -> Any:
        profile = self.fake.api.IOptimizationProfile()
        profile._x_shapes = {}
        return profile

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        said = self.fake.said
        built = {
            "network": network._x_flags, "flags": sorted(config._x_flags), "pools": config._x_pools,
            "settings": {k: str(v) for k, v in config.__dict__.get("held", {}).items() if k != "progress_monitor"},
            "profiles": [p._x_shapes for p in config._x_profiles],
            "model": network._x_model,
            "version": self.fake.version,
            "precisions": {x.name: str(x.precision) for x in network._x_layers if _held(x, "precision")},
            "ports": network._x_ports,
        }  # fmt: skip
        said.append(("build", built))
        if (
            "EXPLICIT_BATCH" in self.fake.api.NetworkDefinitionCreationFlag.__members__
            and "EXPLICIT_BATCH" not in network._x_flags
        ):
            self._x_log.log(1, "Network must have explicit batch")
            return None
        if "STRONGLY_TYPED" in network._x_flags and config._x_flags & {"FP16", "INT8"}:
            self._x_log.log(1, "API Usage Error (precision flags in a strongly typed network)")
            return None
        why = self.fake.refuses(built)
        if why:
            self._x_log.log(1, why)
            return None
        for line in self.fake.placed:
            self._x_log.log(3, line)
        monitor = _held(config, "progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactics", "Building Engine", 4)
            for step in range(4):
                assert monitor.step_complete("Tactics", step)
            monitor.phase_finish("Tactics")
            monitor.step_complete("Building Engine", 0)
            monitor.phase_finish("Building Engine")
        if config._x_cache is not None:
            config._x_cache._x_data += b"+"
        return self.fake.api.IHostMemory(json.dumps(built, sort_keys=True).encode())


class IBuilderConfig:
    def set_flag(self, flag: Any) -> None:
        self._x_flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._x_flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._x_pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self._x_profiles.append(profile)
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        if serialized_timing_cache.startswith(b"damaged"):
            return None
        cache = self.fake.api.ITimingCache()
        cache._x_data = serialized_timing_cache or self.fake.version.encode() + b":"
        return cache

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if not cache._x_data.startswith(self.fake.version.encode() + b":") and not ignore_mismatch:
            return False
        self._x_cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._x_cache


class ITimingCache:
    def serialize(self) -> Any:
        return self.fake.api.IHostMemory(self._x_data)


class INetworkDefinition:
    @property
    def num_layers(self) -> int:
        return len(self._x_layers)

    @property
    def num_inputs(self) -> int:
        return len(self._x_inputs)

    def get_layer(self, index: int) -> Any:
        return self._x_layers[index]

    def get_input(self, index: int) -> Any:
        return self._x_inputs[index]


class ILayer:
    def get_input(self, index: int) -> Any:
        return self._x_fed[index]

    def get_output(self, index: int) -> Any:
        return self._x_made[index]

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.fake.said.append(("output type", (self.name, dtype.name)))


class IOptimizationProfile:
    def set_shape(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:
        self._x_shapes[input] = [min, opt, max]


class OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._x_network = network

    @property
    def num_errors(self) -> int:
        return len(self.fake.complaints)

    def get_error(self, index: int) -> Any:
        error = self.fake.api.ParserError()
        error._x_told = self.fake.complaints[index]
        return error

    def parse_from_file(self, model: str) -> bool:
        loaded = onnx.shape_inference.infer_shapes(onnx.load(model))
        graph, network, api = loaded.graph, self._x_network, self.fake.api
        kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}

        def tensor(name: str, shape: list[int]) -> Any:
            made = api.ITensor()
            kind = KINDS.get(kinds.get(name, 1), "FLOAT")
            made.name, made.dtype, made.shape = name, api.DataType[kind], shape
            return made

        weights = {t.name for t in graph.initializer}
        ports = [v for v in graph.input if v.name not in weights]
        shapes = {
            v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim]
            for v in (*ports, *graph.output)
        }
        network._x_inputs = [tensor(v.name, shapes[v.name]) for v in ports]
        network._x_model = hashlib.sha256(loaded.SerializeToString()).hexdigest()
        network._x_ports = [
            {"name": v.name, "shape": shapes[v.name], "kind": KINDS[kinds[v.name]], "fed": v in ports}
            for v in (*ports, *graph.output)
        ]  # fmt: skip
        for node in graph.node:
            layer = api.ILayer()
            layer.name, layer.type = node.name, api.LayerType[LAYERS.get(node.op_type, "IDENTITY")]
            layer._x_fed = [tensor(n, []) for n in node.input if n not in weights]
            layer._x_made = [tensor(n, []) for n in node.output]
            layer.num_inputs, layer.num_outputs = len(layer._x_fed), len(layer._x_made)
            network._x_layers.append(layer)
        return not self.fake.complaints


class ParserError:
    def node(self) -> int:
        return self._x_told[0]

    def node_name(self) -> str:
        return self._x_told[1]

    def node_operator(self) -> str:
        return self._x_told[2]

    def desc(self) -> str:
        return self._x_told[3]


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._x_log = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        try:
            built = json.loads(bytes(serialized_engine))
        except ValueError:
            built = {"version": "?"}
        if built["version"] != self.fake.version:
            why = "The engine plan file is not compatible with this version of TensorRT, expecting library version"
            where = "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error"
            self._x_log.log(1, f"{where} ({why} {self.fake.version})")
            return None
        engine = self.fake.api.ICudaEngine()
        engine._x_ports = built["ports"]
        return engine


class ICudaEngine:
    @property
    def num_io_tensors(self) -> int:
        return len(self._x_ports)

    def get_tensor_name(self, index: int) -> str:
        return self._x_ports[index]["name"]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.fake.api.TensorIOMode
        return modes.INPUT if next(p for p in self._x_ports if p["name"] == name)["fed"] else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        return next(p for p in self._x_ports if p["name"] == name)["shape"]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.fake.api.DataType[next(p for p in self._x_ports if p["name"] == name)["kind"]]

    @property
    def num_bindings(self) -> int:
        return len(self._x_ports)

    def get_binding_name(self, index: int) -> str:
        return self._x_ports[index]["name"]

    def binding_is_input(self, index: int) -> bool:
        return self._x_ports[index]["fed"]

    def get_binding_shape(self, index: int) -> list[int]:
        return self._x_ports[index]["shape"]

    def get_binding_dtype(self, index: int) -> Any:
        return self.fake.api.DataType[self._x_ports[index]["kind"]]

    def create_execution_context(self) -> Any:
        context = self.fake.api.IExecutionContext()
        context._x_ports, context._x_places = self._x_ports, {}
        return context

    def create_engine_inspector(self) -> Any:
        return self.fake.api.EngineInspector()


class IExecutionContext:
    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._x_places[name] = memory
        return True

    def set_input_shape(self, name: str, shape: list[int]) -> bool:
        self.fake.said.append(("input shape", (name, list(shape))))
        return True

    def set_binding_shape(self, binding: int, shape: list[int]) -> bool:
        self.fake.said.append(("binding shape", (binding, list(shape))))
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        return _run(self, [self._x_places[p["name"]] for p in self._x_ports], stream_handle)

    def execute_async_v2(self, bindings: list[int], stream_handle: int, input_consumed: Any = None) -> bool:
        return _run(self, bindings, stream_handle)


def _run(context: Any, places: list[int], stream: int) -> bool:
    """Doubles the first input into the first output, through the CUDA runtime that the test has."""
    fed = [i for i, p in enumerate(context._x_ports) if p["fed"]]
    made = [i for i, p in enumerate(context._x_ports) if not p["fed"]]
    count = 1
    for size in context._x_ports[made[0]]["shape"]:
        count *= abs(size)
    floats = all(p["kind"] == "FLOAT" for p in context._x_ports)
    went = context.fake.launch(stream, places[made[0]], places[fed[0]], count) if floats else True
    profiler = _held(context, "profiler")
    if profiler is not None:
        profiler.report_layer_time("conv + relu", 0.25)
        profiler.report_layer_time("pool", 0.125)
    return went


class EngineInspector:
    def get_engine_information(self, format: Any) -> str:
        assert format is self.fake.api.LayerInformationFormat.JSON
        old = int(self.fake.version.split(".")[0]) < 11
        output = {"Name": "r0", "Location": "Device", "Dimensions": [1, 16, 16, 16]}
        kind = "Channel major FP16 format where channel % 2 == 0"
        output.update({"Format/Datatype": kind} if old else {"Format": kind + " (kCHW2)", "Datatype": "Half"})
        layers = [
            {"Name": "conv + relu", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": [output]},
            {"Name": "pool", "LayerType": "CudaPooling", "Inputs": [], "Outputs": []},
        ]
        ports = {"Bindings": ["input", "output"]} if old else {"I/O Tensors": [{"Name": "input"}, {"Name": "output"}]}
        return json.dumps({"Layers": layers, **ports})


BEHAVIOURS = {
    kind.__name__: kind
    for kind in (
        Builder, IBuilderConfig, ITimingCache, INetworkDefinition, ILayer, IOptimizationProfile, OnnxParser,
        ParserError, Runtime, ICudaEngine, IExecutionContext, EngineInspector,
    )
}  # fmt: skip
