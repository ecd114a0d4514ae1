"""Builds and times engines through trtexec, where a board has it and no Python bindings.

What a binary can do is read from its own `--help`, never from its version: flags came and went, and TensorRT 11 turned
the defaults of measuring round (CUDA graph and spinning on, copies off, where they were off, off and on). So whether
a graph is used, how the stream is waited for and whether copies count is always said; where the wanted way is a
binary's default and it has no flag for it, that is known from the flag for the opposite.

Times are those of `--exportTimes`: CUDA events, no wall clock. trtexec enqueues one inference ahead, so its latency is
not a control loop's: the protocol's id says so, and numbers of the two kinds are never compared.
"""

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

from ..base import die_with_parent, median
from ..files import sha256
from ..timing import Timed
from . import dla, layers, library, onnxfile, parsing
from .errors import BoardError, Table
from .progress import Beat, Tell

PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
PATIENCE_S = 3600.0
WARM_MS = 200
SPARE = 8
"""Inferences asked for beyond those kept: one that begins in the warm-up and ends behind it counts as neither."""
SWITCHES = {
    "cuda_graph": ("--useCudaGraph", "--noCudaGraph"),
    "spin": ("--useSpinWait", "--noSpinWait"),
    "copies": ("--includeDataTransfers", "--noDataTransfers"),
}
"""What is measured -> the flag that turns it on and the one that turns it off; a binary may have either or both."""
ON_BY_DEFAULT = {"copies"}
"""On where a binary knows no flag that turns it on: before TensorRT 11 data transfers are always counted."""
SCARCE = re.compile(r"out of memory|outofmemory|insufficient memory", re.IGNORECASE)


class Trtexec(object):
    """A binary. path: where it lies; flags: the options that its help lists; version: as its banner tells, or ""."""

    def __init__(self, path: str, help_text: Optional[str] = None) -> None:
        self.path = path
        text = run([path, "--help"], 60.0)[1] if help_text is None else help_text
        self.flags = flags_of(text)
        self.version = version_of(text)
        if not {"--onnx", "--loadEngine", "--exportTimes"} <= self.flags:
            raise BoardError("library", "'%s' is no trtexec: its help lists none of its options" % path)

    @property
    def title(self) -> str:
        """Name and version in words."""
        return "trtexec" + (" of TensorRT " + self.version if self.version else "")

    def has(self, flag: str) -> bool:
        """Whether the binary knows an option."""
        return flag in self.flags

    # --- command lines

    def build_command(
        self, model: onnxfile.OnnxFile, plan: str, options: Table, cache: str, strong: Optional[bool] = None
    ) -> List[str]:
        """The command that builds an engine. Raises BoardError for what was asked for and this binary has not.

        strong: whether it is strongly typed; left out, the first of `ways`.
        """
        command = [self.path, "--onnx=" + model.path, "--saveEngine=" + plan]
        command += self._first(("--skipInference", "--buildOnly"))
        command += ["--profilingVerbosity=detailed"] if self.has("--profilingVerbosity") else []
        if options["workspace_mib"] is not None:
            pool = "--memPoolSize=workspace:%d" if self.has("--memPoolSize") else "--workspace=%d"
            command.append(pool % options["workspace_mib"])
        command += self._precision(model, self.ways(options)[0] if strong is None else strong)
        command += [] if options["tf32"] else [self._need("--noTF32", "tf32")]
        command += ["--timingCacheFile=" + cache] if cache else []
        if options["version_compatible"]:
            command += [self._need("--versionCompatible", "version_compatible")]
        if options["hardware_compatible"] != "none":
            level = {"ampere+": "ampere+", "same-compute-capability": "sameComputeCapability"}
            flag = self._need("--hardwareCompatibilityLevel", "hardware_compatible")
            command.append("%s=%s" % (flag, level[options["hardware_compatible"]]))
        if options["optimization_level"] is not None:
            flag = self._need("--builderOptimizationLevel", "optimization_level")
            command.append("%s=%d" % (flag, options["optimization_level"]))
        if options["dla_core"] is not None:
            command.append("%s=%d" % (self._need("--useDLACore", "dla_core"), options["dla_core"]))
            command.append(self._need("--allowGPUFallback", "dla_core"))
        if options["compute_capability"] is not None:
            self._need("--computeCapabilities", "compute_capability")
            command.append("--computeCapabilities=" + options["compute_capability"])
        return command + self._batch(model)

    def _first(self, flags: Sequence[str]) -> List[str]:
        """The first of some flags that the binary knows."""
        return [flag for flag in flags if self.has(flag)][:1]

    def _need(self, flag: str, option: str) -> str:
        if self.has(flag):
            return flag
        hint = "leave out tensorrt.%s." % option
        raise BoardError("option", "%s has no %s, which %s needs" % (self.title, flag, option), hint, option=option)

    def ways(self, options: Table) -> List[bool]:
        """Whether to try strong typing, best first, as `engine.ways`: with a DLA weak typing comes after it.

        A binary without --fp16 and without --stronglyTyped knows strong typing only: its word for it is that of none.
        """
        strong, weak = self.has("--stronglyTyped"), self.has("--fp16")
        found = [True] if strong or not weak else []
        return found + ([False] if weak and (not strong or options["dla_core"] is not None) else [])

    def _precision(self, model: onnxfile.OnnxFile, strong: bool) -> List[str]:
        """Flags for the types that the file holds: one for strong typing, else those that permit them."""
        if strong:
            return self._first(("--stronglyTyped",))
        wanted = [flag for kind, flag in (("float16", "--fp16"), ("bfloat16", "--bf16")) if kind in model.elements]
        wanted += ["--int8"] if model.quantized else []
        return [flag for flag in wanted if self.has(flag)]

    def _batch(self, model: onnxfile.OnnxFile) -> List[str]:
        """Fixes a free batch at 1."""
        free = [port for port in model.inputs if None in port.shape]
        for port in free:
            if None in port.shape[1:]:
                text = "input '%s' of '%s' has free sizes; only the batch may be free" % (port.name, model.path)
                raise BoardError("model", text, "export it with fixed sizes.")
        shapes = ["%s:%s" % (p.name, "x".join(str(1 if size is None else size) for size in p.shape)) for p in free]
        return ["--shapes=" + ",".join(shapes)] if free else []

    def run_command(self, plan: str, options: Table, timed: int, times: str) -> List[str]:
        """The command that times an engine: `timed` inferences at least, one stream, times to a file."""
        command = [
            self.path,
            "--loadEngine=" + plan,
            "--warmUp=%d" % WARM_MS,
            "--duration=0",
            "--iterations=%d" % timed,
        ]
        command += [flag + "=1" for flag in self._first(("--infStreams", "--streams"))]
        return command + self.switches(options) + self._opening(options) + ["--exportTimes=" + times]

    def _opening(self, options: Table) -> List[str]:
        """Flags that an engine is opened with, whether it is timed or profiled."""
        found = []
        if options.get("dla_core") is not None:
            found.append("%s=%d" % (self._need("--useDLACore", "dla_core"), options["dla_core"]))
        if options.get("version_compatible"):
            found.append(self._need("--versionCompatible", "version_compatible"))
        return found

    def switches(self, options: Table) -> List[str]:
        """Flags for graph, spinning and copies. Raises BoardError for a way that the binary does not offer."""
        found = []
        for name, (on, off) in SWITCHES.items():
            wanted, default = bool(options[name]), self.default(name)
            flag = on if wanted else off
            if self.has(flag):
                found.append(flag)
            elif wanted != default:
                text = "%s cannot turn %s %s" % (self.title, name, "on" if wanted else "off")
                hint = "set tensorrt.%s = %s." % (name, str(default).lower())
                raise BoardError("option", text, hint, option=name)
        return found

    def default(self, name: str) -> bool:
        """Whether a way of measuring is on where nothing is said: what can only be turned off is on."""
        on, off = SWITCHES[name]
        if name in ON_BY_DEFAULT:
            return not self.has(on)
        return self.has(off)

    def profile_command(self, plan: str, options: Table, runs: int, profile: str, described: str) -> List[str]:
        """The command that writes each layer's time and what the layers are."""
        command = [self.path, "--loadEngine=" + plan, "--warmUp=0", "--duration=0", "--iterations=%d" % runs]
        command += self._opening(options)
        command += self._first(("--separateProfileRun",)) + self._first(("--dumpProfile",))
        command += ["--exportLayerInfo=" + described] if self.has("--exportLayerInfo") else []
        return command + ["--exportProfile=" + profile]


# --- what the binary prints --------------------------------------------------------------------------------------


def find(path: str = "") -> str:
    """Where trtexec lies. Raises BoardError where there is none."""
    named = [path] if path else [shutil.which("trtexec") or ""] + list(PLACES) + sorted(glob.glob("/opt/*/bin/trtexec"))
    for place in named:
        if place and os.access(place, os.X_OK):
            return place
    raise BoardError("library", "there is no trtexec at %s" % (path or ", ".join(PLACES)))


def flags_of(text: str) -> FrozenSet[str]:
    """Options that a help text lists: words that begin a line behind blanks."""
    return frozenset(re.findall(r"^ {1,4}(--[A-Za-z]\w*)", text, re.MULTILINE))


def version_of(text: str) -> str:
    """Version in a banner as `[TensorRT v8503]` or `[TensorRT v100300]`, "" without one."""
    found = re.search(r"\[TensorRT v(\d+)\]", text)
    if not found:
        return ""
    number = int(found.group(1))
    major, rest = divmod(number, 10000) if number >= 10000 else divmod(number, 1000)
    return "%d.%d.%d" % (major, rest // 100, rest % 100)


def read_times(text: str, warm_ms: float) -> Dict[str, List[int]]:
    """Nanoseconds of every inference after the warm-up: compute_ns of the engine alone, latency_ns with its copies.

    Older versions export the warm-up too; it is what began to compute before it was over, as trtexec itself counts.
    """
    try:
        rows = [row for row in json.loads(text) if row["startComputeMs"] >= warm_ms]
        found = {
            "compute_ns": [int(round(row["computeMs"] * 1e6)) for row in rows],
            "latency_ns": [int(round(row["latencyMs"] * 1e6)) for row in rows],
        }
    except (ValueError, TypeError, KeyError) as error:
        raise BoardError(
            "model", "the times of trtexec cannot be read: %s %s" % (type(error).__name__, error)
        ) from None
    if not rows:
        raise BoardError("model", "trtexec exported no inference after its warm-up of %d ms" % warm_ms)
    return found


def read_profile(text: str) -> Tuple[int, List[Table]]:
    """How many inferences were profiled, and each layer with its name and milliseconds per inference."""
    try:
        table = json.loads(text)
        runs = sum(int(row["count"]) for row in table if "count" in row)
        rows = [{"name": row["name"], "ms": float(row["averageMs"])} for row in table if "name" in row]
    except (ValueError, TypeError, KeyError) as error:
        text = "the profile of trtexec cannot be read: %s %s" % (type(error).__name__, error)
        raise BoardError("model", text) from None
    return runs, rows


def protocol(options: Table) -> str:
    """The id of how an engine is timed through trtexec: the first word of a session's protocol."""
    switches = "/".join("%s=%d" % (name, bool(options[name])) for name in ("cuda_graph", "spin", "copies"))
    return "tensorrt-trtexec-1/clock=event/" + switches


def failure(binary: Trtexec, log: str, path: str, model: Optional[onnxfile.OnnxFile]) -> BoardError:
    """The error for a run that failed, out of its log."""
    lines = log.splitlines()
    errors = [line.split("[E]", 1)[1] for line in lines if "[E]" in line]
    joined = " ".join(errors)
    if SCARCE.search(joined):
        hint = "lower tensorrt.workspace_mib, or close what else holds memory there."
        return BoardError("memory", "%s ran out of memory on '%s'" % (binary.title, path), hint)
    driver = re.search(
        r"(?:error(?: code)?:? |cudaError |Cuda failure: ?)(35|100)\b|driver version is insufficient", joined
    )
    if driver:
        text = "no engine can run here, since %s finds no GPU with a driver that fits (cudaError 35 or 100)"
        return BoardError("device", text % binary.title)
    if model is not None:
        found = parsing.complaints_in(lines, model)
        if found:
            return parsing.refusal(binary.title, model, found)
    told = [_plain(line) for line in errors if _plain(line)]
    return BoardError(
        "model", "%s failed on '%s': %s" % (binary.title, path, told[0] if told else "it does not say why")
    )


def _plain(line: str) -> str:
    return library.clean(line.replace("[TRT]", " ").strip())


def run(command: Sequence[str], patience_s: float) -> Tuple[int, str]:
    """Exit status and output of a command. Raises BoardError where it cannot be started or does not end."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=patience_s,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise BoardError("library", "'%s' cannot be run: %s" % (command[0], error.strerror)) from None
    except subprocess.TimeoutExpired:
        raise BoardError("time", "'%s' did not end within %.0f s" % (command[0], patience_s)) from None
    return done.returncode, done.stdout.decode("utf-8", "replace")


# --- building and timing -----------------------------------------------------------------------------------------


def build(binary: Trtexec, job: Table, tell: Tell) -> Table:
    """Build an engine; the job is that of `engine.build`, and so is the result, as far as trtexec tells."""
    from . import engine

    options = dict(engine.OPTIONS, **job["options"])
    options["workspace_mib"], free = engine.workspace(options)
    model = onnxfile.read(job["onnx"])
    notes = []
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(job["out"]))) as folder:
        asked = job.get("timing_cache", "")
        cache = TimingCache(asked if binary.has("--timingCacheFile") else "", os.path.join(folder, "timing"))
        copy, tried = cache.begin(), binary.ways(options)
        for strong in tried:
            command = binary.build_command(model, job["out"], options, copy, strong)
            with Beat(tell, None):
                status, log = run(command, PATIENCE_S)
            if not status and os.path.isfile(job["out"]):
                break
            error = failure(binary, log, job["onnx"], model)
            if strong == tried[-1] or error.kind != "model":
                raise error
            notes.append("with strong typing it did not build (%s)" % error.message)
        used = cache.end()
    half = not {"--stronglyTyped", "--int8"} & set(command) and options["dla_core"] is not None
    if half or "--fp16" in command:  # for a DLA it turns float16 on by itself, unless int8 is on
        notes.append("trtexec permits float16 everywhere: layers that the file keeps in float32 may run in it too")
    placed: Table = {}
    if options["dla_core"] is not None:
        placed, note = dla.used(options["dla_core"], log, (), model)
        notes.append(note)
    if used == "discarded":
        notes.append(engine.BEGUN_ANEW)
    if asked and used == "none":
        notes.append("%s has written no timing cache, so nothing that it timed is reused" % binary.title)
    return {
        "title": binary.title, "notes": notes,
        "flags": command[3:], "workspace_mib": options["workspace_mib"], "free_mib": free, "way": "trtexec",
        "bytes": os.path.getsize(job["out"]), "timing_cache": used, "dla": placed, "layers": [], "ports": [],
    }  # fmt: skip


class TimingCache(object):
    """A timing cache that trtexec is given a copy of, so that one that ends in the middle leaves none that is damaged.

    kept: where it lies between builds, or "" for none; copy: what trtexec reads and writes. It lies under the same seal
    as that of the library: one that is not what was written is begun anew.
    """

    def __init__(self, kept: str, copy: str) -> None:
        self.kept, self.copy, self.state = kept, copy, "none"

    def begin(self) -> str:
        """Path that trtexec is given, or ""."""
        from . import engine

        there, known = engine.read_timing(self.kept) if self.kept else (False, b"")
        if known:
            with open(self.copy, "wb") as file:
                file.write(known)
        self.state = "reused" if known else "discarded" if there else "new"
        return self.copy if self.kept else ""

    def end(self) -> str:
        """Keep what trtexec has written; what became of the cache, in the words of `engine.build`."""
        from . import engine

        if not os.path.isfile(self.copy):
            return "none"
        with open(self.copy, "rb") as file:
            engine.write_timing(self.kept, file.read())
        return self.state


class TrtexecModel(Timed):
    """An engine that trtexec times: each block is a process of its own. options: cuda_graph, spin, copies, dla_core.

    A number is what the GPU took, of the engine and, where copies are asked for, of the copies. events: the engine's.
    """

    def __init__(self, path: str, options: Table, binary: Optional[Trtexec] = None) -> None:
        self.path, self.options = path, options
        self.binary = binary or Trtexec(find())
        self.binary.switches(options)
        self.events: List[int] = []

    def block(self, dropped: int, timed: int) -> List[int]:
        """Nanoseconds of `timed` inferences after trtexec's own warm-up and `dropped` untimed ones."""
        with tempfile.TemporaryDirectory() as folder:
            times = os.path.join(folder, "times.json")
            command = self.binary.run_command(self.path, self.options, dropped + timed + SPARE, times)
            text = self._done(command, times)
        found = read_times(text, WARM_MS)
        self.events = found["compute_ns"][dropped : dropped + timed]
        kept = found["latency_ns" if self.options["copies"] else "compute_ns"][dropped : dropped + timed]
        if len(kept) < timed:
            raise BoardError("model", "trtexec timed %d inferences, %d were asked for" % (len(kept), timed))
        return kept

    def paced(self, dropped: int, timed: int, period_ns: int) -> Tuple[List[int], int]:
        """trtexec has no control period: always a BoardError."""
        raise BoardError("option", "trtexec cannot infer at a control period", "leave out measure.paced_ms.")

    def warm(self, rule: Table) -> Table:
        """Two blocks, since every process of trtexec warms up for itself."""
        count = int(rule["min_inferences"])
        medians = [median(self.block(0, count)) for _ in range(2)]
        steady = abs(medians[1] - medians[0]) < rule["steady"] * medians[0]
        return {"inferences": 2 * count, "seconds": 0.0, "windows_ns": medians, "steady": steady}

    def check(self) -> None:
        """trtexec does not tell what it computes, so nothing can be checked."""

    def profile(self, runs: int) -> Dict[Tuple[str, str], float]:
        """(name, operator) of every layer -> its ms per inference."""
        with tempfile.TemporaryDirectory() as folder:
            profile, described = (os.path.join(folder, name) for name in ("profile.json", "layers.json"))
            command = self.binary.profile_command(self.path, self.options, runs, profile, described)
            text = self._done(command, profile)
            known: Dict[str, str] = {}
            if os.path.isfile(described):
                with open(described, encoding="utf-8", errors="replace") as file:
                    known = {layer["name"]: layer["op"] for layer in layers.read(file.read())["layers"]}
        return {(row["name"], known.get(row["name"], "")): row["ms"] for row in read_profile(text)[1]}

    def _done(self, command: Sequence[str], made: str) -> str:
        """Text of the file that a command writes."""
        status, log = run(command, PATIENCE_S)
        if status or not os.path.isfile(made):
            raise failure(self.binary, log, self.path, None)
        with open(made, encoding="utf-8", errors="replace") as file:
            return file.read()


def loads(binary: Trtexec) -> str:
    """Path of the TensorRT library that the binary loads, or "" where that cannot be told, as of a script.

    It is linked to the library, or loads it by name once it runs: then the loader is asked what lies under that name.
    """
    try:
        status, said = run(["ldd", binary.path], 60.0)
    except BoardError:
        return ""
    linked = re.search(r"^\s*libnvinfer\.so\S* => (/.+) \(0x", said, re.MULTILINE)
    if status or linked or not binary.version:
        return linked.group(1) if linked and not status else ""
    try:
        ctypes.CDLL("libnvinfer.so." + binary.version.split(".")[0])
    except OSError:
        return ""
    return library.loaded_file("tensorrt")


def facts(binary: Trtexec) -> Dict[str, Any]:
    """Who the binary is, for a fingerprint. build: of its bytes and, where it is known, of the library's behind it."""
    build, path = sha256(binary.path), loads(binary)
    if path:
        build = hashlib.sha256((build + sha256(path)).encode()).hexdigest()
    return {"name": "trtexec", "version": binary.version, "build": build}
