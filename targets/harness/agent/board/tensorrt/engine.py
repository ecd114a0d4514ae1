"""Builds an engine from an ONNX file, with whatever TensorRT there is: 8.2, 8.5, 8.6, 10, 11, or TensorRT for RTX.

Precision is what the ONNX file says. A library that has strong typing takes it from there; an older one gets the flags
that permit what the file holds, FP16 for float16 and INT8 for Q/DQ, and its layers are held to their types. Whether
something is there is asked of the library, and what was asked for and is not there is an error, never left out.

    build(job, tell) -> Table      job: onnx, out, library, options (OPTIONS), timing_cache (a path, or "")
"""

import hashlib
import os
import time
from typing import Any, Dict, List, Optional, Tuple

from . import dla, layers, library, onnxfile, parsing
from .errors import BoardError, Table
from .library import Library
from .onnxfile import OnnxFile
from .progress import Beat, Phases, Tell, make_monitor

OPTIONS: Table = {
    "workspace_mib": None,  # largest scratch memory of a layer; None: workspace_share of what is free
    "workspace_share": 0.5,
    "version_compatible": False,  # runs under later versions of the library too
    "hardware_compatible": "none",  # none, ampere+ or same-compute-capability
    "dla_core": None,  # the DLA core that runs what it can, the GPU the rest
    "compute_capability": None,  # as 8.6: of another GPU than this machine's
    "optimization_level": None,  # 0 to 5; None: as the library has it
    "tf32": True,  # float32 products may round their operands to 10 bits
}
"""What a builder may be asked for, with its default. All of it is part of an engine's key."""
BEGUN_ANEW = "the timing cache was damaged or of another device or version, and was begun anew"
TIMING = b"edge-deploy timing 1 "
"""Begins a file of a timing cache, before the SHA-256 of the rest."""
CONSTRAINTS = ("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "STRICT_TYPES")
"""Flags that hold layers to their types, strictest first; a build that fails under one is tried with the next."""
LEVELS = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
HELD = (
    "CONVOLUTION", "DECONVOLUTION", "FULLY_CONNECTED", "MATRIX_MULTIPLY", "SCALE", "SOFTMAX", "POOLING", "REDUCE",
    "ACTIVATION", "ELEMENTWISE", "UNARY", "LRN", "NORMALIZATION", "PARAMETRIC_RELU", "EINSUM", "RESIZE",
)  # fmt: skip
"""Layers that compute, whose type is held where typing is weak; the others hand on what they are given."""
SCARCE_HINT = "lower tensorrt.workspace_mib, close what else holds memory there, or add swap while building."
OUTSIDE_HINT = "take another tensorrt.%s, or leave it out."


class Way(object):
    """One way to try a build. strong: strong typing; constraint: the flag that holds types, or ""."""

    def __init__(self, strong: bool, constraint: str) -> None:
        self.strong, self.constraint = strong, constraint

    def __str__(self) -> str:
        return "strong typing" if self.strong else "weak typing" + (" " + self.constraint if self.constraint else "")


def build(job: Table, tell: Tell, loaded: Optional[Library] = None) -> Table:
    """Build an engine and write it; returns what was done. loaded: the library, loaded by its name if left out.

    The result: title, way, flags, workspace_mib, free_mib, timing_cache, seconds, bytes, notes, dla (what runs on a
    DLA core, {} where none was asked for), layers and ports; the last two are empty, with a note, where an engine
    cannot be opened here. Raises BoardError.
    """
    begin = time.monotonic()
    lib = loaded or library.load(job["library"])
    options = dict(OPTIONS, **job["options"])
    model = onnxfile.read(job["onnx"])
    done = Attempt(lib, model, options, job.get("timing_cache", ""))
    with Beat(tell, done.phases):
        plan = done.run()
    write(job["out"], plan)
    done.table.update(seconds=round(time.monotonic() - begin, 2), bytes=len(plan), title=lib.title)
    return done.table


class Attempt(object):
    """The building of one engine. table: what was done so far."""

    def __init__(self, lib: Library, model: OnnxFile, options: Table, cache: str) -> None:
        self.lib, self.api, self.model, self.options, self.cache = lib, lib.api, model, options, cache
        self.phases = Phases() if hasattr(lib.api, "IProgressMonitor") else None
        self.monitor = make_monitor(lib.api, self.phases) if self.phases is not None else None
        self.notes: List[str] = []
        self.flags: List[str] = []
        self.workspace, self.free = workspace(options)
        self.table: Table = {
            "notes": self.notes, "flags": self.flags, "workspace_mib": self.workspace, "free_mib": self.free,
            "timing_cache": "none", "dla": {}, "layers": [], "ports": [],
        }  # fmt: skip

    def run(self) -> bytes:
        """The serialized engine, by the first way that works."""
        tried = ways(self.lib, self.model, self.options)
        for index, way in enumerate(tried):
            self.flags[:] = []
            del self.lib.errors[:], self.lib.placed[:]
            plan = self.build(way)
            if plan is not None:
                self.table["way"] = str(way)
                return plan
            reason = self.lib.last_error("it does not say why")
            if self.lib.errors and library.lacks_driver(self.lib.errors[0]):
                raise library.no_driver(self.lib.title, self.lib.errors[0])
            if library.tells_scarce(self.lib.errors):
                raise self.scarce()
            if index + 1 < len(tried):
                self.notes.append("with %s it did not build (%s)" % (way, reason))
        raise BoardError("model", "%s cannot build '%s': %s" % (self.lib.title, self.model.path, reason))

    def build(self, way: Way) -> Optional[bytes]:
        """The serialized engine, or None where the library finds none."""
        builder = self.lib.make("Builder")
        network = self.network(builder, way)
        config = builder.create_builder_config()
        self.configure(builder, config, way)
        self.shapes(builder, network, config)
        if way.constraint:
            hold(self.api, network)
        cache = self.timing(config)
        try:
            plan = builder.build_serialized_network(network, config)
        except MemoryError:
            raise self.scarce() from None
        if plan is None:
            return None
        self.keep(config, cache)
        data = bytes(memoryview(plan))
        self.describe(data)
        if self.options["dla_core"] is not None:
            said = "\n".join(self.lib.placed)
            self.table["dla"], note = dla.used(self.options["dla_core"], said, self.table["layers"], self.model)
            self.notes.append(note)
        return data

    def network(self, builder: Any, way: Way) -> Any:
        """The network as parsed. Raises BoardError in one sentence for what the parser refuses."""
        creation, flags = self.api.NetworkDefinitionCreationFlag, 0
        wanted = ("EXPLICIT_BATCH",) + (("STRONGLY_TYPED",) if way.strong else ())
        for name in wanted:
            if hasattr(creation, name):
                flags |= 1 << int(getattr(creation, name))
        network = builder.create_network(flags)
        parser = self.api.OnnxParser(network, self.lib.logger)
        if not parser.parse_from_file(self.model.path):
            found = parsing.complaints_of(parser, self.model)
            raise parsing.refusal(
                self.lib.title, self.model, found or parsing.complaints_in(self.lib.errors, self.model)
            )
        return network

    # --- configuration

    def flag(self, config: Any, name: str) -> None:
        """Set a builder flag."""
        config.set_flag(getattr(self.api.BuilderFlag, name))
        self.flags.append(name)

    def configure(self, builder: Any, config: Any, way: Way) -> None:
        """Everything of a build that is not the network."""
        options = self.options
        if self.workspace is not None:
            if hasattr(config, "set_memory_pool_limit"):
                config.set_memory_pool_limit(self.api.MemoryPoolType.WORKSPACE, self.workspace << 20)
            else:
                config.max_workspace_size = self.workspace << 20
        for name in [] if way.strong else permitted(self.model, self.lib):
            self.flag(config, name)
        if way.constraint:
            self.flag(config, way.constraint)
        verbosity = self.api.ProfilingVerbosity
        config.profiling_verbosity = getattr(verbosity, "DETAILED", getattr(verbosity, "VERBOSE", None))
        if self.lib.has("BuilderFlag", "TF32"):
            if options["tf32"]:
                self.flag(config, "TF32")
            else:
                config.clear_flag(self.api.BuilderFlag.TF32)
        else:
            self.need(options["tf32"], "tf32", "switch that turns TF32 off")
        if options["version_compatible"]:
            self.need(
                self.lib.has("BuilderFlag", "VERSION_COMPATIBLE"), "version_compatible", "engines for later versions"
            )
            self.flag(config, "VERSION_COMPATIBLE")
        if options["hardware_compatible"] != "none":
            level = LEVELS[options["hardware_compatible"]]
            here = hasattr(config, "hardware_compatibility_level") and self.lib.has("HardwareCompatibilityLevel", level)
            self.need(
                here, "hardware_compatible", "engines for other GPUs of the kind %s" % options["hardware_compatible"]
            )
            config.hardware_compatibility_level = getattr(self.api.HardwareCompatibilityLevel, level)
        if options["optimization_level"] is not None:
            self.need(hasattr(config, "builder_optimization_level"), "optimization_level", "optimization levels")
            config.builder_optimization_level = options["optimization_level"]
        if options["dla_core"] is not None:
            self.use_dla(builder, config, int(options["dla_core"]))
        if options["compute_capability"] is not None:
            self.cross(config, options["compute_capability"])
        if self.monitor is not None:
            config.progress_monitor = self.monitor

    def need(self, there: bool, option: str, what: str) -> None:
        """Raise BoardError for an option that the library does not have."""
        if not there:
            raise BoardError("option", "%s has no %s" % (self.lib.title, what), OUTSIDE_HINT % option, option=option)

    def use_dla(self, builder: Any, config: Any, number: int) -> None:
        """Run on a DLA core what it can run, the rest on the GPU."""
        there = int(getattr(builder, "num_DLA_cores", 0))
        if number >= there:
            text = "the DLA core %d was asked for, %s finds %d here" % (number, self.lib.title, there)
            raise BoardError("option", text, OUTSIDE_HINT % "dla_core", option="dla_core")
        config.default_device_type = self.api.DeviceType.DLA
        config.DLA_core = number
        self.flag(config, "GPU_FALLBACK")

    def cross(self, config: Any, capability: str) -> None:
        """Build for a GPU that is not here."""
        self.need(hasattr(config, "set_compute_capability"), "compute_capability", "engines for GPUs that are not here")
        offered, name = self.lib.capabilities(), "SM" + capability.replace(".", "")
        if capability not in offered:
            text = "%s builds for the compute capabilities %s, not for %s"
            text = text % (self.lib.title, ", ".join(offered), capability)
            raise BoardError("option", text, OUTSIDE_HINT % "compute_capability", option="compute_capability")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.api.ComputeCapability, name), 0)

    def shapes(self, builder: Any, network: Any, config: Any) -> None:
        """Fix a free batch at 1. Raises BoardError where another size is free."""
        profile = None
        for index in range(network.num_inputs):
            port = network.get_input(index)
            shape = [int(size) for size in port.shape]
            if any(size < 0 for size in shape[1:]):
                text = "input '%s' of '%s' has free sizes (%s); only the batch may be free"
                sizes = ", ".join("any" if size < 0 else str(size) for size in shape)
                raise BoardError("model", text % (port.name, self.model.path, sizes), "export it with fixed sizes.")
            if shape and shape[0] < 0:
                profile = profile or builder.create_optimization_profile()
                fixed = [1] + shape[1:]
                profile.set_shape(port.name, fixed, fixed, fixed)
        if profile is not None:
            config.add_optimization_profile(profile)

    # --- the timing cache

    def timing(self, config: Any) -> Any:
        """The timing cache that was set, or None; one of another device or version is left aside with a note."""
        if not self.cache or not hasattr(config, "create_timing_cache"):
            return None
        there, known = read_timing(self.cache)
        cache = config.create_timing_cache(known) if known else None
        if cache is not None and config.set_timing_cache(cache, False):
            self.table["timing_cache"] = "reused"
            return cache
        if there:
            self.notes.append(BEGUN_ANEW)
        self.table["timing_cache"] = "discarded" if there else "new"
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            self.table["timing_cache"] = "none"
            return None
        return cache

    def keep(self, config: Any, cache: Any) -> None:
        """Write the timing cache after a build."""
        if cache is None:
            return
        write_timing(self.cache, bytes(memoryview(config.get_timing_cache().serialize())))

    # --- afterwards

    def describe(self, data: bytes) -> None:
        """Note the layers, where an engine can be opened here."""
        if self.options["compute_capability"] is not None:
            self.notes.append("built for another GPU: its layers are not listed")
            return
        from . import running

        try:
            self.table.update(layers.inspect(self.lib, running.opened(self.lib, data, self.options)))
        except BoardError as error:
            self.notes.append("its layers are not listed: %s" % error.message)

    def scarce(self) -> BoardError:
        """The error for a build that ran out of memory."""
        limit = "its own workspace limit" if self.workspace is None else "a workspace of %d MiB" % self.workspace
        free = " with %d MiB free" % min(self.free.values()) if self.free else ""
        text = "building '%s' ran out of memory under %s%s" % (self.model.path, limit, free)
        return BoardError("memory", text, SCARCE_HINT, workspace_mib=self.workspace, free_mib=self.free)


# --- what a library is asked for ---------------------------------------------------------------------------------


def ways(lib: Library, model: OnnxFile, options: Table) -> List[Way]:
    """Ways to build, best first: strong typing where there is one; weak typing with every flag that holds types.

    Where a DLA is asked for and the library knows both, weak typing comes after strong typing.
    """
    weak = lib.has("BuilderFlag", "FP16")
    strong = lib.has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") or not weak
    found = [Way(True, "")] if strong else []
    if weak and (not strong or options["dla_core"] is not None):
        mixed = "float16" in model.elements or "bfloat16" in model.elements
        held = [name for name in CONSTRAINTS if lib.has("BuilderFlag", name)] if mixed else []
        found += [Way(False, name) for name in held] or [Way(False, "")]
    return found


def permitted(model: OnnxFile, lib: Library) -> List[str]:
    """Builder flags that permit what the file holds, where typing is weak. Raises BoardError for a type without one."""
    held = (("float16", "FP16"), ("bfloat16", "BF16"), ("float8", "FP8"), ("int4", "INT4"))
    wanted = [(kind, flag) for kind, flag in held if kind in model.elements]
    wanted += [("int8", "INT8")] if model.quantized and "float8" not in model.elements else []
    for kind, flag in wanted:
        if not lib.has("BuilderFlag", flag):
            raise BoardError("model", "%s has no %s, which '%s' holds" % (lib.title, kind, model.path))
    return [flag for _, flag in wanted]


def hold(api: Any, network: Any) -> None:
    """Hold every layer that computes to the type that the file gives its output.

    Layers between Q/DQ are left alone: they are to run in INT8, though their output is called float.
    """
    made: Dict[str, Any] = {}
    kinds = {getattr(api.LayerType, name) for name in HELD if hasattr(api.LayerType, name)}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            made[layer.get_output(output).name] = layer.type
    quantising = getattr(api.LayerType, "DEQUANTIZE", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type not in kinds or not layer.num_outputs:
            continue
        fed = [layer.get_input(i) for i in range(layer.num_inputs)]
        if any(tensor is not None and made.get(tensor.name) == quantising for tensor in fed):
            continue
        kind = layer.get_output(0).dtype
        if kind in (api.DataType.FLOAT, api.DataType.HALF):
            layer.precision = kind
            layer.set_output_type(0, kind)


def workspace(options: Table) -> Tuple[Optional[int], Dict[str, int]]:
    """The workspace limit in MiB and the free memory that was seen; None where neither is known.

    A share of the free memory is rounded down to a power of two, so that it is the same from one build to the next.
    """
    free, seen = library.free_mib()
    if options["workspace_mib"] is not None:
        return int(options["workspace_mib"]), seen
    if free is None or options["compute_capability"] is not None:
        return None, seen
    return 1 << max(4, int(free * options["workspace_share"]).bit_length() - 1), seen


def read_timing(path: str) -> Tuple[bool, bytes]:
    """Whether there is a timing cache, and what it holds: nothing where its bytes are not those that were written.

    The library checks for which device and version a cache is, but not every version checks that it is whole.
    """
    try:
        with open(path, "rb") as file:
            head, _, data = file.read().partition(b"\n")
    except OSError:
        return os.path.exists(path), b""
    sound = head == TIMING + hashlib.sha256(data).hexdigest().encode()
    return True, data if sound else b""


def write_timing(path: str, data: bytes) -> None:
    """Keep a timing cache, sealed with its SHA-256. Raises BoardError where it cannot be written."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write(path, TIMING + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def write(path: str, data: bytes) -> None:
    """Write under a temporary name, force it to the disk and move it. Raises BoardError where that fails."""
    part = "%s.%d.part" % (path, os.getpid())
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        raise BoardError("disk", "cannot write %d bytes to '%s': %s" % (len(data), path, error.strerror)) from None
