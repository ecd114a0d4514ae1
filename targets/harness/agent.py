"""The measuring agent: one file that runs on the device, with nothing but Python 3.6 or later, numpy and ONNX Runtime.

    agent.py facts                      who the device is, as JSON
    agent.py state FOLDER               how busy, hot and full it is, as JSON
    agent.py worker NAME                one process that holds models (NAME is for people): JSON requests on stdin,
                                        JSON answers on stdout
    agent.py drive JOB.json OUT.json    spawns workers and measures several models in turn (measurement.md, section 3)
    agent.py rows JOB.json OUT.json     many small models in turn in one process, for the latency table
    agent.py layers JOB.json OUT.json   several models in turn under the runtime's profiler: what each layer takes
    agent.py serve FOLDER               the far end of a link: requests on stdin, answers on stdout, files in FOLDER
    agent.py job FOLDER                 one job that outlives its link: takes the lease, runs drive, rows or layers, and
                                        spools the result into its FOLDER until it is fetched
    agent.py infer                      one process that infers for `serve`

The clock is read around a complete synchronous inference with pre-bound buffers, in the process that infers; no timing
crosses a pipe. A block is a few untimed inferences, then the timed ones, back to back or one at every tick of a
control period. In every round the models follow each other in a random order that the seed fixes. Results are written
with fsync under their SHA-256. Every wait and every duration is counted on the monotonic clock: a clock of the day that
jumps changes nothing.

A link carries JSON lines, each followed by as many raw bytes as it says, and nothing else: no pickle, no timing. Files
are named by their SHA-256, so a half-sent one goes on where it stopped; jobs are named by an id that the client chose,
so a request that is sent twice does nothing twice.
"""

import datetime
import errno
import fcntl
import gc
import glob
import hashlib
import json
import os
import platform
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

PROTOCOL = "ort-interleaved-1"
FLAG_SWITCHES = 5
CLOCK_CHANGE = 0.01
MAX_TIMED = 4096
SPIN_NS = 200_000
"""Longest spin before a tick. A sleeping process is woken 50 to 100 us late, which would pass for a late start."""
SUSTAINED_BLOCK_NS = 100_000_000
SUSTAINED_SAMPLES = 300_000
"""Timed inferences of a model that a sustained process keeps, about; the others load the device untimed."""
BUSY_CORES = 0.2
WATCH_S = 0.3
WARM_INFERENCES = 3
"""Fewest inferences of a window of the warm-up, unless they take too long: a median of two hides no outlier."""
WARM_WINDOWS = 6
"""Windows before a slow network is given up as not steady."""
MARK = "edge-deploy "
"""Begins the first line of a link: whatever a login shell prints before it is no part of it."""
IDLE_S, FOLLOWED_S, ALIVE_S, LOOK_S = 120.0, 45.0, 5.0, 0.25
"""A link's end without a request for so long closes itself, sooner while it follows a job; how often it says that it
is alive, and looks at a job."""
KEEP_S = 14 * 86400
"""Files and results that nobody asked for in this time are removed."""
SPARE_BYTES, RESERVE_BYTES = 8 << 20, 1 << 16
"""Free bytes on the disk that files sent there leave; what a job keeps for telling that the disk is full."""
OPEN_SESSIONS = 4

Table = Dict[str, Any]


class AgentError(Exception):
    """What ends a job. kind: model, memory, disk, killed, lost, late, long, job, full, busy, astray, absent or runtime.

    model: which one it is, or None; more: numbers that belong to it.
    """

    def __init__(self, kind: str, message: str, model: Optional[str] = None, **more: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.model = model
        self.more = more

    def to_table(self) -> Table:
        """Plain table for JSON."""
        return dict(self.more, event="error", kind=self.kind, message=self.message, model=self.model)


def now_ns() -> int:
    """Nanoseconds of the monotonic clock."""
    return int(time.perf_counter() * 1e9)


CLOCK: Callable[[], int] = getattr(time, "perf_counter_ns", now_ns)


# --- what the device is --------------------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """Text of a small system file, or "" where it is missing or not readable."""
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8", "replace").strip("\x00 \t\r\n")
    except OSError:
        return ""


def read_number(path: str) -> Optional[int]:
    """Whole number in a small system file, or None."""
    text = read_text(path).split()
    try:
        return int(text[0]) if text else None
    except ValueError:
        return None


def processor() -> Tuple[str, str]:
    """Name of the processor and the SHA-256 of its feature flags."""
    rows: Dict[str, str] = {}
    for line in read_text("/proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() not in rows:
            rows[key.strip()] = value.strip()
    arm = " ".join(rows[key] for key in ("CPU implementer", "CPU part", "CPU variant") if key in rows)
    name = rows.get("model name") or rows.get("Model") or arm or platform.processor() or platform.machine()
    flags = " ".join(sorted((rows.get("flags") or rows.get("Features") or "").split()))
    return name, hashlib.sha256(flags.encode()).hexdigest()


def machine() -> str:
    """Model of the board or computer, else its instruction set."""
    board = read_text("/proc/device-tree/model")
    vendor, product = read_text("/sys/class/dmi/id/sys_vendor"), read_text("/sys/class/dmi/id/product_name")
    return board or " ".join(part for part in (vendor, product) if part) or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def group_folders() -> List[str]:
    """Folders of the control groups, own and parents, that may limit this process's processor time."""
    found: List[str] = []
    for line in read_text("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if number == "0" and not kinds:
            roots = ["/sys/fs/cgroup"]
        elif "cpu" in kinds.split(","):
            roots = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/" + kinds]
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                folder = os.path.join(root, *parts[:depth])
                if folder not in found and os.path.exists(os.path.join(folder, "cpu.stat")):
                    found.append(folder)
    return found


def cpu_quota() -> Optional[float]:
    """Cores that the tightest control group allows, or None."""
    quotas = []
    for folder in group_folders():
        words = read_text(os.path.join(folder, "cpu.max")).split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = read_number(folder + "/cpu.cfs_quota_us"), read_number(folder + "/cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas) if quotas else None


def quota_stops(folders: Sequence[str]) -> int:
    """How often a processor quota has stopped this process's control groups."""
    total = 0
    for folder in folders:
        for line in read_text(folder + "/cpu.stat").splitlines():
            if line.startswith("nr_throttled "):
                total += int(line.split()[1])
    return total


def throttle_paths() -> List[str]:
    """Files that count how often the hardware lowered its clock."""
    found = glob.glob("/sys/class/hwmon/hwmon*/oc*_event_cnt")
    return sorted(found + glob.glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))


def clock_folders() -> List[str]:
    """Folders of the processor's frequency controls."""
    return sorted(glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq"))


def clocks() -> str:
    """Whether clocks are "locked" (lowest allowed frequency = highest), "floating", or "hidden" by the system."""
    spans = [(read_number(f + "/scaling_min_freq"), read_number(f + "/scaling_max_freq")) for f in clock_folders()]
    if not spans:
        return "hidden"
    return "locked" if all(low is not None and low == high for low, high in spans) else "floating"


def runtime_build(package: str) -> Tuple[str, str]:
    """Version of an installed package and the SHA-256 of its wheel's record (else of its library), not imported."""
    for folder in sys.path:
        for info in sorted(glob.glob(os.path.join(folder or ".", package + "*.dist-info"))):
            named = os.path.basename(info)[: -len(".dist-info")].rpartition("-")
            record = read_text(os.path.join(info, "RECORD"))
            if record and named[0].replace("-", "_") in (package, package + "_gpu"):
                wheel = [line for line in record.splitlines() if line.startswith(package + "/") and ".pyc" not in line]
                return named[2], hashlib.sha256("\n".join(sorted(wheel)).encode()).hexdigest()
    module = __import__(package)
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(os.path.dirname(str(module.__file__)), "capi", "*.so*"))):
        digest.update(sha256(path).encode())
    return str(module.__version__), digest.hexdigest()


def require_runtime() -> None:
    """Raise AgentError where what inference needs is not installed."""
    from importlib import util

    for package in ("onnxruntime", "numpy"):
        if util.find_spec(package) is None:
            raise AgentError("runtime", "%s is not installed" % package, package=package)


def facts(package: str) -> Table:
    """What does not change between two runs on this device: the fields of a fingerprint."""
    name, flags = processor()
    version, build = runtime_build(package)
    governors = sorted({read_text(folder + "/scaling_governor") for folder in clock_folders()})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": machine(),
        "cpu": name,
        "cpu_flags": flags,
        "cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "kernel": platform.system() + " " + platform.release(),
        "memory_mib": int(round(pages / 2.0**20 / 256.0)) * 256,
        "power": " ".join(governors),
        "clocks": clocks(),
        "runtime": package,
        "runtime_version": version,
        "runtime_build": build,
        "python": "%d.%d" % sys.version_info[:2],
    }


def processor_ticks() -> Tuple[int, int, int]:
    """All ticks, stolen ticks and runnable threads of the system so far; zeros where the system does not count them."""
    total, steal, running = 0, 0, 0
    for line in read_text("/proc/stat").splitlines():
        words = line.split()
        if words and words[0] == "cpu":
            ticks = [int(word) for word in words[1:9]]
            total, steal = sum(ticks), ticks[7] if len(ticks) > 7 else 0
        elif words and words[0] == "procs_running":
            running = int(words[1])
    return total, steal, running


def temperatures() -> Dict[str, float]:
    """Degrees Celsius of each thermal zone."""
    found = {}
    for zone in sorted(glob.glob("/sys/class/thermal/thermal_zone*")):
        value = read_number(zone + "/temp")
        if value is not None:
            found[(read_text(zone + "/type") or "zone") + " " + zone.rsplit("zone", 1)[-1]] = value / 1000.0
    return found


def free_memory_mib() -> Optional[int]:
    """Memory that can be had without swapping, or None where it is not shown."""
    for line in read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return None


def process_ticks() -> Dict[int, int]:
    """Process id -> processor ticks that it has used so far."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        words = read_text(path).rpartition(")")[2].split()
        if len(words) > 12:
            found[int(path.split("/")[2])] = int(words[11]) + int(words[12])
    return found


def command_of(pid: int) -> str:
    """Name of a process's program and of the script or module it runs; other arguments may hold secrets."""
    words = [word for word in read_text("/proc/%d/cmdline" % pid).split("\x00") if word]
    scripts = [word for word in words[1:] if not word.startswith("-") and word.endswith((".py", ".sh", ".pl", ".rb"))]
    modules = words[2:3] if words[1:2] == ["-m"] else []
    named = [os.path.basename(word) for word in words[:1] + (modules or scripts[:1])]
    return " ".join(named) or read_text("/proc/%d/comm" % pid) or "unknown"


def busy_processes(before: Dict[int, int], seconds: float) -> List[Table]:
    """The other processes that used most processor time since `before`, `seconds` ago, busiest first, at most three."""
    rate = seconds * os.sysconf("SC_CLK_TCK")
    used = [((ticks - before[pid]) / rate, pid) for pid, ticks in process_ticks().items() if pid in before]
    busy = sorted((each for each in used if each[0] >= BUSY_CORES and each[1] != os.getpid()), reverse=True)[:3]
    return [{"pid": pid, "command": command_of(pid), "cores": round(cores, 2)} for cores, pid in busy]


def throttle_counts() -> Dict[str, int]:
    """Path of each hardware throttle counter -> how often it has moved since the system started."""
    return {path: read_number(path) or 0 for path in throttle_paths()}


def state(folder: str, watch_s: float = WATCH_S) -> Table:
    """What moves from one moment to the next; looks on for `watch_s` seconds. folder: where results will be written."""
    begin, used, throttled = CLOCK(), process_ticks(), throttle_counts()
    first = processor_ticks()
    running = []
    for _ in range(15):
        time.sleep(watch_s / 15)
        running.append(processor_ticks()[2])
    last = processor_ticks()
    busy = busy_processes(used, (CLOCK() - begin) * 1e-9)
    counts = throttle_counts()
    ticks = last[0] - first[0]
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    disk = os.statvfs(folder)
    return {
        "load": os.getloadavg()[0],
        "cores": usable_cores(),
        "runnable": max(0, sorted(running)[len(running) // 2] - 1),
        "steal_percent": 100.0 * (last[1] - first[1]) / ticks if ticks > 0 else None,
        "cpu_quota": cpu_quota(),
        "power": " ".join(sorted({read_text(f + "/scaling_governor") for f in clock_folders()})),
        "clocks": clocks(),
        "clocks_khz": [read_number(f + "/scaling_cur_freq") for f in clock_folders()],
        "temperatures": temperatures(),
        "throttle": counts,
        "throttle_moved": sum(counts.values()) - sum(throttled.values()),
        "busy": busy,
        "memory_free_mib": free_memory_mib(),
        "disk_free_mib": int(disk.f_bavail * disk.f_frsize // 2**20),
        "folder": folder,
    }


# --- files ---------------------------------------------------------------------------------------------------------


def sha256(path: str) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def write_file(path: str, data: bytes) -> None:
    """Write under a temporary name, force it to the disk and move it."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        raise


def write_result(path: str, table: Table) -> str:
    """Write JSON under a temporary name, force it to the disk and move it; returns its SHA-256."""
    data = json.dumps(table, separators=(",", ":")).encode()
    try:
        write_file(path, data)
    except OSError as error:
        raise AgentError(
            "disk", "cannot write %d bytes of results to %s: %s" % (len(data), path, error.strerror)
        ) from None
    return hashlib.sha256(data).hexdigest()


def tell(table: Table) -> None:
    """One JSON line on stdout."""
    sys.stdout.write(json.dumps(table) + "\n")
    sys.stdout.flush()


# --- one model -----------------------------------------------------------------------------------------------------

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
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    own = [value for value in vars(native).values() if isinstance(value, type) and issubclass(value, Exception)]
    return tuple(own) + (RuntimeError, ValueError, TypeError, OSError, MemoryError)


def error_text(error: BaseException) -> str:
    """First line of an error, without ONNX Runtime's prefix of codes and without its source file names."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    scarce = text.find("Failed to allocate")
    return text[max(0, scarce) :].strip().rstrip(".")


def open_session(path: str, options: Table) -> Any:
    """A session of ONNX Runtime. options: threads (0: all cores), spin, providers, profile."""
    import onnxruntime as ort

    asked = list(options["providers"])
    lacking = [name for name in asked if name not in ort.get_available_providers()]
    if lacking:
        raise ValueError("no provider %s, there are %s" % (lacking[0], ", ".join(ort.get_available_providers())))
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
    return ort.InferenceSession(path, settings, providers=asked)


class Model(object):
    """An opened session with input and output buffers bound once.

    options: threads, spin, providers, seed; profile: the beginning of the path of the profiler's file, where the
    runtime's profiler is to run. Inputs are seeded noise of the declared shapes; a free batch axis is 1.
    """

    def __init__(self, path: str, options: Table) -> None:
        try:
            self._open(path, options)
        except runtime_errors() as error:
            text = error_text(error)
            scarce = isinstance(error, MemoryError) or "alloc" in text
            raise AgentError("memory" if scarce else "model", text, path) from None

    def _open(self, path: str, options: Table) -> None:
        self.session = open_session(path, options)
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

    def warm(self, rule: Table) -> Table:
        """Infer until min_s and min_inferences are reached and two windows' medians differ by less than `steady`.

        max_s ends it, steady or not. For a slow network half of max_s stands for min_inferences, and it goes on beyond
        max_s, to longest_s at most, until there were WARM_WINDOWS windows to compare.
        """
        begin, count, steady = CLOCK(), 0, False
        longest_s = max(rule["max_s"], rule.get("longest_s", 0.0))
        medians: List[int] = []
        while True:
            samples = self.window(rule["window_s"], 0.25 * longest_s)
            medians.append(median(samples))
            count += len(samples)
            seconds = (CLOCK() - begin) * 1e-9
            enough = count >= rule["min_inferences"] or seconds >= 0.5 * rule["max_s"]
            if len(medians) > 1 and seconds >= rule["min_s"] and enough:
                steady = abs(medians[-1] - medians[-2]) < rule["steady"] * medians[-2]
            tried = len(medians) >= WARM_WINDOWS or (len(medians) > 1 and seconds >= longest_s)
            if steady or (tried and seconds >= rule["max_s"]):
                return {"inferences": count, "seconds": seconds, "windows_ns": medians[-8:], "steady": steady}

    def window(self, least_s: float, most_s: float) -> List[int]:
        """Nanoseconds of the inferences of least_s, and of WARM_INFERENCES at least, begun before most_s are over."""
        samples: List[int] = []
        begin = CLOCK()
        while True:
            samples.extend(self.block(0, 1))
            seconds = (CLOCK() - begin) * 1e-9
            if seconds >= most_s or (seconds >= least_s and len(samples) >= WARM_INFERENCES):
                return samples


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


def median(values: Sequence[int]) -> int:
    """Middle value; the lower middle of an even count is averaged with the upper one."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2


# --- the worker: one process that infers ---------------------------------------------------------------------------


class Watch(object):
    """Reads, around a block, what may have disturbed it."""

    def __init__(self) -> None:
        self.paths = throttle_paths()
        self.clocks = [f + "/scaling_cur_freq" for f in clock_folders()] if clocks() == "locked" else []
        self.membership = ""
        self.groups: List[str] = []

    def read(self) -> Table:
        """Counters at this moment."""
        import resource

        membership = read_text("/proc/self/cgroup")
        if membership != self.membership:
            self.membership, self.groups = membership, group_folders()
        return {
            "switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
            "throttle": sum(read_number(path) or 0 for path in self.paths),
            "stops": quota_stops(self.groups),
            "khz": [read_number(path) or 0 for path in self.clocks],
        }


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that happens."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def quiet_collector() -> None:
    """Collect once, then never during a measurement."""
    gc.collect()
    gc.disable()
    if hasattr(gc, "freeze"):
        gc.freeze()


def worker() -> int:
    """Answer requests until stdin ends. stdout is kept for answers; whatever a library prints goes to stderr."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    models: Dict[str, Model] = {}
    watch = Watch()
    for line in sys.stdin:
        try:
            answer = answer_request(json.loads(line), models, watch)
        except AgentError as error:
            answer = error.to_table()
        except MemoryError:
            answer = AgentError("memory", "out of memory").to_table()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def answer_request(request: Table, models: Dict[str, Model], watch: Watch) -> Table:
    """Do one request: open, warm or block."""
    verb, name = request["do"], request["name"]
    if verb == "open":
        models[name] = Model(request["path"], request["options"])
        quiet_collector()
        return {"opened": name}
    if verb == "warm":
        warmth = models[name].warm(request["rule"])
        models[name].check()
        return warmth
    if verb == "block":
        dropped, timed, period_ns, missed = request["dropped"], request["timed"], request.get("period_ns", 0), 0
        before = watch.read()
        if period_ns:
            ns, missed = models[name].paced(dropped, timed, period_ns)
        else:
            ns = models[name].block(dropped, timed)
        after = watch.read()
        moved = {key: after[key] - before[key] for key in ("switches", "throttle", "stops")}
        return dict(moved, ns=ns, missed=missed, khz=[before["khz"], after["khz"]])
    raise AgentError("job", "unknown request '%s'" % verb)


# --- the driver: spawns workers and gives them turns ---------------------------------------------------------------


class Worker(object):
    """The driver's end of a worker process."""

    def __init__(self, name: str, environment: Dict[str, str]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile()
        self.buffer = b""
        command = [sys.executable, os.path.abspath(__file__), "worker", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, env=environment)

    def send(self, request: Table) -> None:
        """Send a request."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self.lost() from None

    def receive(self, patience_s: float) -> Table:
        """The answer to the last request."""
        assert self.process.stdout is not None
        pipe, end = self.process.stdout.fileno(), time.monotonic() + patience_s
        while b"\n" not in self.buffer:
            ready = select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]
            if not ready:
                raise AgentError("late", "gave no answer within %.0f s" % patience_s, self.name)
            part = os.read(pipe, 1 << 16)
            if not part:
                raise self.lost()
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: Table = json.loads(line.decode())
        if answer.get("event") == "error":
            raise AgentError(answer["kind"], answer["message"], self.name)
        return answer

    def ask(self, request: Table, patience_s: float) -> Table:
        """Send and receive."""
        self.send(request)
        return self.receive(patience_s)

    def lost(self) -> AgentError:
        """Why the process ended."""
        return died(self.process, self.errors, self.name)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            try:
                file.close()
            except OSError:
                pass


def died(process: Any, errors: Any, name: Optional[str]) -> AgentError:
    """Why a process ended. errors: the file that its stderr went to; name: of the model that it held."""
    code = process.wait()
    errors.seek(0)
    said = errors.read().decode("utf-8", "replace").strip().splitlines()
    if code == -signal.SIGKILL:
        return AgentError("killed", "was killed by signal 9, as a system does that runs out of memory", name)
    how = "crashed by signal %d (%s)" % (-code, signal_name(-code)) if code < 0 else "ended with code %d" % code
    return AgentError("lost", how + (": " + said[-1] if said else ""), name)


def signal_name(number: int) -> str:
    """A signal's name, as SIGSEGV."""
    try:
        return str(signal.Signals(number).name)
    except ValueError:
        return "unknown"


def environment_of(job: Table) -> Dict[str, str]:
    """Environment of a worker: the thread counts of numerical libraries set to the job's."""
    threads = str(job["options"]["threads"])
    return dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, MKL_NUM_THREADS=threads)


Plan = Tuple[int, int, Dict[str, int]]
"""Rounds; untimed inferences at the start of a block; timed ones of each model."""


def plan_blocks(job: Table, medians: Dict[str, int], spent_s: float) -> Plan:
    """Rounds, dropped and timed inferences a block, so that the session keeps to max_seconds.

    medians: ns of one inference of each model; spent_s: seconds that one process took to start and warm up. Blocks grow
    until they take block_min_ns. Where the cap is near, blocks shrink first, then the rounds, down to 3. A network that
    alone takes block_min_ns finds its caches within its own time, and goes without untimed inferences rather than
    without rounds. In a paced session an inference takes the whole periods that it needs, and every block may wait one
    tick for its first.
    """
    repeats, rounds, dropped = job["processes"], job["rounds"], job["dropped"]
    period = int(job.get("period_ns") or 0)
    costs = {n: period * -(-ns // period) if period else max(1, ns) for n, ns in medians.items()}
    timed = {n: min(MAX_TIMED, max(job["timed"], -(-int(job["block_min_ns"]) // ns))) for n, ns in costs.items()}
    turn_s, idle_s = sum(costs.values()) * 1e-9, len(costs) * period * 1e-9
    left_s = job["max_seconds"] - repeats * spent_s
    room_s = left_s / (repeats * rounds) - idle_s
    work_s = sum(timed[n] * costs[n] for n in costs) * 1e-9
    if dropped * turn_s + work_s <= room_s:
        return rounds, dropped, timed
    if dropped * turn_s >= 0.5 * room_s:
        dropped = min(dropped, 1)
    if (dropped + 1) * turn_s > room_s and not period and min(costs.values()) >= job["block_min_ns"]:
        dropped = 0
    share = max(0.0, (room_s - dropped * turn_s) / work_s)
    timed = {n: max(1, int(timed[n] * share)) for n in timed}
    least_s = sum((dropped + timed[n]) * costs[n] for n in costs) * 1e-9 + idle_s
    if least_s > room_s + idle_s:
        rounds = int(left_s / (repeats * least_s))
    if rounds < 3:
        needed = repeats * (spent_s + 3 * least_s)
        raise AgentError(
            "long", "the shortest session takes about %.1f s, the cap is %.1f s" % (needed, job["max_seconds"])
        )
    return rounds, dropped, timed


def plan_sustained(job: Table, medians: Dict[str, int], timed: Dict[str, int]) -> Tuple[Dict[str, int], Dict[str, int]]:
    """Timed inferences of a block of the sustained process and the untimed ones added to it, by model.

    Blocks are longer than in the other processes, since there are many; where more than SUSTAINED_SAMPLES of a model
    would be kept, part of a block is untimed, so that the device is loaded all the same.
    """
    period = int(job.get("period_ns") or 0)
    costs = {n: period * -(-ns // period) if period else max(1, ns) for n, ns in medians.items()}
    whole = {n: min(MAX_TIMED, max(timed[n], -(-SUSTAINED_BLOCK_NS // costs[n]))) for n in timed}
    rounds = max(1.0, job["sustained_s"] / (sum(whole[n] * costs[n] for n in whole) * 1e-9))
    kept = {n: max(1, min(count, int(SUSTAINED_SAMPLES / rounds))) for n, count in whole.items()}
    return kept, {n: whole[n] - kept[n] for n in whole}


def drive(job: Table) -> Table:
    """Measure the job's models in turn, in fresh processes for every repeat; raw results as a plain table.

    With sustained_s the first repeat's processes go on for that long: they begin cold, the others find the device hot.
    """
    rng = random.Random(job["seed"])
    names = [model["name"] for model in job["models"]]
    refuse_changed(job)
    begin, before, warm = CLOCK(), processor_ticks(), temperatures()
    repeats: List[Table] = []
    plan: Optional[Plan] = None
    medians: Dict[str, int] = {}
    for repeat in range(job["processes"]):
        workers: Dict[str, Worker] = {}
        try:
            woken = CLOCK()
            warmups = start_workers(job, workers, rng, repeat)
            if plan is None:
                medians = {name: int(warmups[name]["windows_ns"][-1]) for name in names}
                plan = plan_blocks(job, medians, (CLOCK() - woken) * 1e-9)
            turns = Turns(job, plan, repeat, begin)
            if job.get("sustained_s") and not repeat:
                turns.sustain(job["sustained_s"], *plan_sustained(job, medians, plan[2]))
            repeats.append(turns.run(workers, warmups, rng))
        finally:
            for worker in workers.values():
                worker.close()
    assert plan is not None
    flag(repeats, names)
    return {
        "repeats": repeats,
        "rounds": plan[0],
        "dropped": plan[1],
        "timed": plan[2],
        "telemetry": telemetry(begin, before, warm),
    }


def refuse_changed(job: Table) -> None:
    """Raise AgentError where a model's file is not the one that the job means."""
    for model in job["models"]:
        if sha256(model["path"]) != model["sha256"]:
            raise AgentError("model", "is not the file that was sent: its SHA-256 differs", model["name"])


def telemetry(begin: int, before: Tuple[int, int, int], warm: Dict[str, float]) -> Dict[str, float]:
    """What was seen of the machine over a session that began at `begin` ns with these ticks and temperatures."""
    after, hot = processor_ticks(), temperatures()
    ticks = max(1, after[0] - before[0])
    seen = {
        "seconds": (CLOCK() - begin) * 1e-9,
        "steal_percent": 100.0 * (after[1] - before[1]) / ticks,
        "load_end": os.getloadavg()[0],
    }
    if warm and hot:
        seen.update(hottest_start_c=max(warm.values()), hottest_end_c=max(hot.values()))
    return seen


def start_workers(job: Table, workers: Dict[str, Worker], rng: random.Random, repeat: int) -> Dict[str, Table]:
    """Start one process a model, open the models and warm them up one after the other, in random order."""
    patience, environment = job["patience_s"], environment_of(job)
    order = list(job["models"])
    rng.shuffle(order)
    for model in order:
        workers[model["name"]] = Worker(model["name"], environment)
        request = {"do": "open", "name": model["name"], "path": model["path"], "options": job["options"]}
        workers[model["name"]].send(request)
    for model in order:
        workers[model["name"]].receive(patience)
    warmups = {}
    for position, model in enumerate(order):
        name = model["name"]
        warmups[name] = workers[name].ask({"do": "warm", "name": name, "rule": job["warmup"]}, patience)
        tell({"event": "progress", "done": share(job, repeat, 0.4 * (position + 1) / len(order))})
    return warmups


def share(job: Table, repeat: int, done: float) -> float:
    """Done share of a job when `done` of a repeat is; the sustained one weighs by its time."""
    each, longer = job["max_seconds"] / job["processes"], job.get("sustained_s", 0.0)
    before = repeat * each + (longer if repeat else 0.0)
    return float((before + done * (each + (0.0 if repeat else longer))) / (job["max_seconds"] + longer))


class Turns(object):
    """One repeat: every round gives each model one block, in random order.

    begin: when the session began, ns; a block's `started` counts from there.
    """

    def __init__(self, job: Table, plan: Plan, repeat: int, begin: int) -> None:
        self.rounds, self.dropped, self.timed = plan
        self.names = [model["name"] for model in job["models"]]
        self.untimed = dict.fromkeys(self.names, 0)
        self.period_ns, self.patience_s = int(job.get("period_ns") or 0), job["patience_s"]
        self.job, self.repeat, self.begin = job, repeat, begin
        self.least_ns = 0

    def sustain(self, seconds: float, timed: Dict[str, int], untimed: Dict[str, int]) -> None:
        """Go on for so many seconds in blocks of their own size, whatever the rounds."""
        self.least_ns, self.rounds, self.timed, self.untimed = int(seconds * 1e9), 1, timed, untimed

    def run(self, workers: Dict[str, Worker], warmups: Dict[str, Table], rng: random.Random) -> Table:
        """Do the rounds and give back their order and blocks."""
        position = {name: index for index, name in enumerate(self.names)}
        blocks: Dict[str, List[Table]] = {name: [] for name in self.names}
        order: List[List[int]] = []
        first = told = CLOCK()
        while len(order) < self.rounds or CLOCK() - first < self.least_ns:
            ranked = list(self.names)
            rng.shuffle(ranked)
            order.append([position[name] for name in ranked])
            for name in ranked:
                started = CLOCK() - self.begin
                blocks[name].append(dict(self.block(workers[name]), started=started))
            if CLOCK() - told > 1e9:
                told = CLOCK()
                done = min(1.0, (told - first) / self.least_ns) if self.least_ns else len(order) / self.rounds
                tell({"event": "progress", "done": share(self.job, self.repeat, 0.4 + 0.6 * done)})
        return {"order": order, "warmups": warmups, "blocks": blocks, "timed": self.timed, "untimed": self.untimed}

    def block(self, worker: Worker) -> Table:
        """One block of a worker's model."""
        dropped, timed = self.dropped + self.untimed[worker.name], self.timed[worker.name]
        request = {"do": "block", "name": worker.name, "dropped": dropped, "timed": timed, "period_ns": self.period_ns}
        return worker.ask(request, self.patience_s + 2e-9 * self.period_ns * (dropped + timed))


def flag(repeats: List[Table], names: Sequence[str]) -> None:
    """Mark the blocks that something else disturbed.

    A block is flagged when its involuntary switches exceed the model's median by more than 5 (by more than four times
    the square root of the median where that is larger: the natural scatter of the count in long blocks), when a
    hardware throttle counter moved, or when a locked clock differs by more than 1 % from the session's median of the
    same core: cores of one processor may be locked at different clocks.
    """
    usual = usual_clocks([side for r in repeats for n in names for block in r["blocks"][n] for side in block["khz"]])
    for name in names:
        middle = median([block["switches"] for repeat in repeats for block in repeat["blocks"][name]])
        limit = middle + max(FLAG_SWITCHES, 4.0 * middle**0.5)
        for repeat in repeats:
            for block in repeat["blocks"][name]:
                pairs = [pair for side in block["khz"] for pair in zip(side, usual)]
                off = any(abs(khz - own) > CLOCK_CHANGE * own for khz, own in pairs)
                block["flagged"] = bool(block["switches"] > limit or block["throttle"] != 0 or off)


def usual_clocks(readings: Sequence[Sequence[int]]) -> List[int]:
    """Median clock of every core in kHz; readings: one clock a core, in the order of `clock_folders`."""
    cores = max([len(reading) for reading in readings] or [0])
    return [median([reading[core] for reading in readings if core < len(reading)]) for core in range(cores)]


# --- rows: many small models in one process ------------------------------------------------------------------------


def rows(job: Table) -> Table:
    """Block medians in ns of every model in every round, with several sessions of the reference among them."""
    models: List[Model] = []
    for path in list(job["models"]) + [job["reference"]] * job["sessions"]:
        models.append(Model(path, job["options"]))
    quiet_collector()
    counts = []
    for model in models:
        once = min(model.block(1, 3))
        counts.append(max(job["timed"], min(job["timed_max"], int(job["block_ns"] // max(1, once)))))
    rng = random.Random(job["seed"])
    order = list(range(len(models)))
    times: List[List[int]] = [[] for _ in models]
    for turn in range(job["rounds"] + 1):
        rng.shuffle(order)
        for index in order:
            middle = median(models[index].block(job["dropped"], counts[index]))
            if turn:
                times[index].append(middle)
    rows_end = len(job["models"])
    return {"rows": times[:rows_end], "reference": times[rows_end:]}


# --- layers: what the runtime's profiler says ----------------------------------------------------------------------


def layers(job: Table, folder: str) -> Table:
    """Milliseconds of every layer of every model per inference, as the runtime's profiler counts them.

    In each turn every model, in random order, gets a fresh session that is profiled over `runs` inferences; a layer's
    number is the median over turns of its mean in a turn, so that one disturbed turn moves none. The profiler slows the
    run by a third to a half and counts whole microseconds: the numbers tell layers apart and are no latency.
    """
    refuse_changed(job)
    rng = random.Random(job["seed"])
    models = list(job["models"])
    seen: Dict[str, List[Dict[Tuple[str, str], float]]] = {model["name"]: [] for model in models}
    for turn in range(job["turns"]):
        rng.shuffle(models)
        for model in models:
            seen[model["name"]].append(profiled(model, job, os.path.join(folder, "profile")))
        tell({"event": "progress", "done": (turn + 1) / job["turns"]})
    return {"layers": {name: typical(turns) for name, turns in seen.items()}}


def profiled(model: Table, job: Table, prefix: str) -> Dict[Tuple[str, str], float]:
    """One profiled session of a model: (name, operator) of a layer -> its ms per inference, in order of execution."""
    opened = Model(model["path"], dict(job["options"], profile=prefix))
    opened.block(job["dropped"], job["runs"])
    path = opened.session.end_profiling()
    try:
        with open(path, "rb") as file:
            events = json.loads(file.read().decode("utf-8", "replace"))
    except (OSError, ValueError):
        raise AgentError("disk", "the runtime's profile '%s' is cut off, as on a full disk" % path) from None
    finally:
        if os.path.exists(path):
            os.remove(path)
    return layer_times(events, job["runs"])


def layer_times(events: Sequence[Table], runs: int) -> Dict[Tuple[str, str], float]:
    """(name, operator) of a layer -> its ms per inference over the last `runs` inferences of a profile."""
    begins = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    end = "_kernel_time"
    found: Dict[Tuple[str, str], float] = {}
    for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: int(e["ts"])):
        if event["name"].endswith(end) and event["ts"] >= begins[-runs]:
            key = (event["name"][: -len(end)], event["args"]["op_name"])
            found[key] = found.get(key, 0.0) + event["dur"] * 1e-3 / runs
    return found


def typical(turns: Sequence[Dict[Tuple[str, str], float]]) -> List[Table]:
    """Layers of the first turn with their median over turns."""
    found = []
    for key in turns[0]:
        middle = median([int(round(turn.get(key, 0.0) * 1e6)) for turn in turns])
        found.append({"name": key[0], "op": key[1], "ms": middle * 1e-6})
    return found


# --- the lease of the device -----------------------------------------------------------------------------------------

OWNER_LETTERS = 128
LATEST_S = 253402300799.0
"""End of the year 9999 in seconds since the epoch, the last day that has a name."""
SOUND: Dict[str, Callable[[Any], bool]] = {
    "owner": lambda value: isinstance(value, str) and 0 < len(value) <= OWNER_LETTERS and value.isprintable(),
    "pid": lambda value: type(value) is int and 0 < value < 2**31,
    "since": lambda value: type(value) in (int, float) and 0 <= value <= LATEST_S,
    "expires": lambda value: type(value) in (int, float) and 0 <= value <= LATEST_S,
    "agent": lambda value: type(value) is int and 0 < value < 2**31,
    "agent_start": lambda value: type(value) is int and value > 0,
}
"""What an entry of a lease file must look like. Everybody may write the file, so nothing in it is trusted."""


def lease_folder() -> str:
    """Where lock files stand."""
    return "/run/lock" if os.access("/run/lock", os.W_OK | os.X_OK) else tempfile.gettempdir()


def open_lease(path: str) -> int:
    """Descriptor of a lock file, never through a link that somebody else may have put there."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    if os.path.isfile(path):  # another user's file may be open for reading only; it can be locked all the same
        return os.open(path, (os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) | flags)
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
        os.fchmod(file, 0o666)
    except PermissionError:
        pass
    return file


def lock(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file without waiting; whether that went."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def read_holder(file: int) -> Table:
    """What a lease file says of its holder: the entries that make sense."""
    try:
        table = json.loads(os.pread(file, 4096, 0).decode() or "{}")
    except (ValueError, RecursionError):
        return {}
    known = table if isinstance(table, dict) else {}
    return {name: known[name] for name, sound in SOUND.items() if name in known and sound(known[name])}


def write_holder(file: int, table: Table) -> None:
    """Write down who holds a lease, where the file may be written; the lock holds all the same."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(table).encode(), 0)
    except OSError:
        pass


def describe_holder(holder: Table) -> str:
    """Who holds a lease and until when, in words."""
    known = ["process %d" % holder["pid"]] if "pid" in holder else []
    if "expires" in holder:
        moment = datetime.datetime.fromtimestamp(holder["expires"], datetime.timezone.utc)
        known.append("expected until %s UTC" % moment.strftime("%H:%M:%S"))
    return str(holder.get("owner", "another process")) + (" (%s)" % ", ".join(known) if known else "")


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 where it is gone."""
    text = read_text("/proc/%d/stat" % pid)
    return int(text.rpartition(")")[2].split()[19]) if text else 0


class Lease(object):
    """The device, held by one at a time, until this process ends at the latest."""

    def __init__(self, device: str) -> None:
        path = os.path.join(lease_folder(), "edge-deploy-%s.lock" % device)
        try:
            self.file = open_lease(path)
        except OSError as error:
            raise AgentError("job", "cannot open the lease file '%s': %s" % (path, error.strerror)) from None

    def take(self, owner: str, holds_s: float, wait_s: float, waiting: Callable[[str], None]) -> None:
        """Wait for it. waiting: called about every two seconds with who holds it."""
        begin = time.monotonic()
        told = begin
        while not lock(self.file):
            now = time.monotonic()
            if now - begin >= wait_s:
                raise AgentError("busy", describe_holder(read_holder(self.file)), waited_s=now - begin)
            if now - told >= 2.0:
                told = now
                waiting(describe_holder(read_holder(self.file)))
            time.sleep(0.2)
        now = datetime.datetime.now(datetime.timezone.utc).timestamp()  # for people: nothing waits by it
        write_holder(self.file, {"owner": owner, "pid": os.getpid(), "since": now, "expires": now + holds_s})

    def give_back(self) -> None:
        """Let the next one have it."""
        write_holder(self.file, {})
        os.close(self.file)


def holder_of(device: str) -> Optional[str]:
    """Who holds a device's lease, in words, or None while it is free."""
    try:
        file = os.open(os.path.join(lease_folder(), "edge-deploy-%s.lock" % device), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if lock(file, fcntl.LOCK_SH) else describe_holder(read_holder(file))
    finally:
        os.close(file)


# --- a link: JSON lines and raw bytes ------------------------------------------------------------------------------


class Lost(Exception):
    """The other end of a link is gone, or silent for too long."""


class Peer(object):
    """The other end of a pair of pipes: JSON lines, each followed by as many raw bytes as it says.

    stall_s: how long the other end may neither take nor give a byte in the middle of something.
    """

    def __init__(self, source: int, sink: int, stall_s: float) -> None:
        self.source, self.sink, self.stall_s, self.buffer = source, sink, stall_s, b""
        os.set_blocking(source, False)
        os.set_blocking(sink, False)

    def ready(self, seconds: float) -> bool:
        """Whether there is something to read within so many seconds."""
        return b"\n" in self.buffer or bool(select.select([self.source], [], [], seconds)[0])

    def line(self, patience_s: float) -> bytes:
        """The next line, without its end."""
        end = time.monotonic() + patience_s
        while b"\n" not in self.buffer:
            self.fill(max(0.0, end - time.monotonic()))
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def receive(self, patience_s: float) -> Table:
        """The next line, read as JSON."""
        line = self.line(patience_s)
        try:
            table: Table = json.loads(line.decode("utf-8"))
        except ValueError:
            raise Lost("said '%s'" % line[:80].decode("utf-8", "replace")) from None
        return table

    def fill(self, patience_s: float) -> None:
        """Read what there is."""
        if not select.select([self.source], [], [], patience_s)[0]:
            raise Lost("was silent")
        try:
            part = os.read(self.source, 1 << 16)
        except OSError as error:
            raise Lost("was cut: %s" % error.strerror) from None
        if not part:
            raise Lost("was closed")
        self.buffer += part

    def chunks(self, count: int) -> Iterator[bytes]:
        """The next `count` raw bytes, in pieces."""
        while count:
            if not self.buffer:
                self.fill(self.stall_s)
            part, self.buffer = self.buffer[:count], self.buffer[count:]
            count -= len(part)
            yield part

    def send(self, table: Table, data: bytes = b"") -> None:
        """A line, and the raw bytes that belong to it."""
        self.write(json.dumps(table, separators=(",", ":")).encode() + b"\n" + data)

    def write(self, data: bytes) -> None:
        """Raw bytes."""
        view = memoryview(data)
        while view:
            if not select.select([], [self.sink], [], self.stall_s)[1]:
                raise Lost("took nothing")
            try:
                view = view[os.write(self.sink, view[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Lost("was cut: %s" % error.strerror) from None


# --- a job that outlives its link ------------------------------------------------------------------------------------


def boot_id() -> str:
    """Changes whenever the device starts."""
    return read_text("/proc/sys/kernel/random/boot_id")


def locked(path: str) -> bool:
    """Whether a process holds this lock file. A job holds its own for as long as it lives, whatever ends it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def run_detached(folder: str) -> int:
    """Do the job of a folder: lease, run, spool. Its outcome is a file; it never depends on who is listening."""
    signal.signal(signal.SIGTERM, stop)
    with open(os.path.join(folder, "job.json"), "rb") as file:
        job = json.loads(file.read().decode())
    with open(os.path.join(folder, "events"), "ab", 0) as events:

        def note(table: Table) -> None:
            try:
                events.write(json.dumps(table).encode() + b"\n")
            except OSError:
                pass  # on a full disk the outcome says what there is to say

        try:
            outcome = leased(job, folder, note)
        except AgentError as error:
            outcome = error.to_table()
        except OSError as error:
            outcome = AgentError("disk", "cannot write results to %s: %s" % (folder, error.strerror)).to_table()
        except SystemExit:
            outcome = {"event": "stopped"}
    os.remove(os.path.join(folder, "reserve"))
    write_result(os.path.join(folder, "outcome.json"), outcome)
    return 0


def leased(job: Table, folder: str, note: Callable[[Table], None]) -> Table:
    """The outcome of a job, which holds the device meanwhile."""
    lease = Lease(job["device"])
    absence = Absence(folder, job["absent_s"])

    def waiting(holder: str) -> None:
        absence.check()
        note({"event": "waiting", "holder": holder})

    try:
        require_runtime()
        lease.take(job["owner"], job["limit_s"], job["wait_s"], waiting)
        seen: Table = {"event": "leased"}
        if job["verb"] == "drive":
            seen.update(facts=facts("onnxruntime"), state=state(folder))
        note(seen)
        return attend(job, folder, note, absence)
    finally:
        lease.give_back()


class Absence(object):
    """Ends a job that nobody has followed for so long: who asked for it is gone for good."""

    def __init__(self, folder: str, limit_s: float) -> None:
        self.path, self.limit_s = os.path.join(folder, "followed"), limit_s
        self.last, self.since = self.touched(), time.monotonic()

    def touched(self) -> float:
        """When it was followed last; compared with itself only, so that the clock may jump."""
        try:
            return os.stat(self.path).st_mtime
        except OSError:
            return 0.0

    def check(self) -> None:
        """Raise AgentError when it was too long."""
        last = self.touched()
        if last != self.last:
            self.last, self.since = last, time.monotonic()
        elif time.monotonic() - self.since > self.limit_s:
            raise AgentError("absent", "nobody has followed the job for %.0f s" % self.limit_s)


def attend(job: Table, folder: str, note: Callable[[Table], None], absence: Absence) -> Table:
    """Run the verb in a process of its own, pass on what it tells, and spool what it found."""
    work, out, said = (os.path.join(folder, name) for name in ("work.json", "out.json", "errors"))
    command = [sys.executable, os.path.abspath(__file__), job["verb"], work, out]
    last: Table = {}
    end = time.monotonic() + job["limit_s"]
    with open(said, "wb") as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdout is not None
        pipe, buffer = child.stdout.fileno(), b""
        try:
            while True:
                if time.monotonic() > end:
                    raise AgentError("astray", "the job did not end within %.0f s" % job["limit_s"])
                absence.check()
                if not select.select([pipe], [], [], 1.0)[0]:
                    continue
                part = os.read(pipe, 1 << 16)
                if not part:
                    break
                lines = (buffer + part).split(b"\n")
                buffer = lines.pop()
                for line in lines:
                    event = json.loads(line.decode())
                    if event["event"] == "progress":
                        note(event)
                    else:
                        last = event
        finally:
            if child.poll() is None and last.get("event") != "done":
                child.kill()
            child.wait()
            child.stdout.close()
    if last.get("event") != "done":
        return last or {"event": "died", "code": child.returncode, "said": read_text(said)[-2000:]}
    return spool(folder, out)


def spool(folder: str, out: str) -> Table:
    """Keep a result, packed, until it is fetched; its outcome."""
    with open(out, "rb") as file:
        data = zlib.compress(file.read(), 6)
    path = os.path.join(folder, "result")
    write_file(path, data)
    os.remove(out)
    return {"event": "done", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# --- the far end of a link -------------------------------------------------------------------------------------------


class Server(object):
    """Answers a client's requests until it goes or falls silent. Everything it knows stands in its folder.

    objects/<sha256>: files; <sha256>.part: half-sent ones; jobs/<id>/: a job, its events, outcome and result.
    """

    def __init__(self, folder: str, peer: Peer) -> None:
        self.folder, self.peer = folder, peer
        self.objects, self.jobs = os.path.join(folder, "objects"), os.path.join(folder, "jobs")
        self.inferring: Optional[Inferring] = None
        self.started: List[Any] = []

    def run(self) -> None:
        """Serve."""
        for place in (self.objects, self.jobs):
            os.makedirs(place, mode=0o700, exist_ok=True)
        self.sweep()
        told = {"event": "hello", "python": "%d.%d" % sys.version_info[:2], "boot": boot_id(), "folder": self.folder}
        self.peer.write(MARK.encode())
        self.peer.send(told)
        try:
            while True:
                request = self.peer.receive(IDLE_S)
                try:
                    answer, data = self.answer(request)
                    self.peer.send(answer, data)
                except AgentError as error:
                    self.peer.send(error.to_table())
                except OSError as error:
                    text = "%s: %s" % (error.filename or self.folder, error.strerror)
                    kind = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "job"
                    self.peer.send(AgentError(kind, text, needed=0, free=self.free_bytes()).to_table())
        except Lost:
            pass
        finally:
            self.rest()

    def answer(self, request: Table) -> Tuple[Table, bytes]:
        """Do one request."""
        verb = str(request["do"])
        if verb == "infer":
            return self.infer(request)
        if verb == "fetch":
            return self.fetch(request)
        verbs: Dict[str, Callable[[Table], Table]] = {
            "facts": lambda _: self.facts(),
            "providers": lambda _: self.providers(),
            "state": lambda _: dict(state(self.folder), event="state", holder=holder_of(request["device"])),
            "have": self.have, "put": self.put, "start": self.start, "follow": self.follow,
            "stop": self.stop, "drop": self.drop, "ping": lambda _: {"event": "alive"},
        }  # fmt: skip
        if verb not in verbs:
            raise AgentError("job", "unknown request '%s'" % verb)
        return verbs[verb](request), b""

    def facts(self) -> Table:
        """Who the device is."""
        require_runtime()
        return dict(facts("onnxruntime"), event="facts")

    def providers(self) -> Table:
        """Where the runtime can run; asked of a process of its own, since it would stay loaded in this one."""
        require_runtime()
        code = "import onnxruntime as o, sys; sys.stderr.write(' '.join(o.get_available_providers()))"
        process = subprocess.Popen([sys.executable, "-c", code], cwd="/", stderr=subprocess.PIPE)
        said = process.communicate()[1].decode("utf-8", "replace").strip().splitlines() or [""]
        if process.returncode:
            raise AgentError("broken", said[-1])
        return {"event": "providers", "there": said[-1].split()}

    def sweep(self) -> None:
        """Remove what nobody has asked for in a long time."""
        swept = os.path.join(self.folder, "swept")
        try:
            touch(swept)
        except OSError:
            return  # a full disk is told to who wants to write
        oldest = os.stat(swept).st_mtime - KEEP_S
        own = os.path.dirname(os.path.abspath(__file__))
        os.utime(own)
        for path in glob.glob(os.path.join(self.folder, "agent", "*")):
            if os.stat(path).st_mtime < oldest and path != own:
                shutil.rmtree(path, ignore_errors=True)
        for path in glob.glob(os.path.join(self.objects, "*")):
            if os.stat(path).st_mtime < oldest:
                os.remove(path)
        for path in glob.glob(os.path.join(self.jobs, "*")):
            if os.stat(path).st_mtime < oldest and not locked(os.path.join(path, "lock")):
                shutil.rmtree(path, ignore_errors=True)

    def rest(self) -> None:
        """End the process that infers, so that nothing runs beside a measurement."""
        if self.inferring is not None:
            self.inferring.close()
            self.inferring = None

    # files

    def free_bytes(self) -> int:
        """Bytes that may still be written."""
        disk = os.statvfs(self.folder)
        return int(disk.f_bavail * disk.f_frsize)

    def object_path(self, digest: str) -> str:
        """Where a file stands."""
        if not re.match("^[0-9a-f]{64}$", digest):
            raise AgentError("job", "'%s' is no SHA-256" % digest)
        return os.path.join(self.objects, digest)

    def have(self, request: Table) -> Table:
        """Of each file, how many bytes are there already, or None where it is whole; refuses where the rest cannot fit.

        A whole file is hashed again: a device that lost its power may have kept its name and not its content.
        """
        offsets: List[Optional[int]] = []
        needed = 0
        for digest, size in request["files"]:
            path = self.object_path(digest)
            if os.path.isfile(path):
                if sha256(path) == digest:
                    os.utime(path)
                    offsets.append(None)
                    continue
                os.remove(path)
            part = path + ".part"
            there = os.path.getsize(part) if os.path.isfile(part) else 0
            offsets.append(min(there, size))
            needed += size - min(there, size)
        free = max(0, self.free_bytes() - SPARE_BYTES)
        if needed > free:
            raise AgentError("full", self.folder, needed=needed, free=free)
        return {"event": "offsets", "offsets": offsets}

    def put(self, request: Table) -> Table:
        """Take files from an offset on. What is written is fixed by the hash, so two links may write the same file."""
        failure: Optional[AgentError] = None
        for digest, size, offset in request["files"]:
            path = self.object_path(digest)
            file = os.open(path + ".part", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for chunk in self.peer.chunks(size - offset):
                    try:
                        offset += 0 if failure else os.pwrite(file, chunk, offset)
                    except OSError as error:  # what is still under way must be read all the same
                        failure = AgentError("full", self.folder, needed=size - offset, free=self.free_bytes())
                        failure.message += ": %s" % error.strerror
            finally:
                os.close(file)
            if failure is None and not self.finish(digest, path):
                failure = AgentError("damaged", "the file that was sent has another SHA-256", digest)
        if failure is not None:
            raise failure
        return {"event": "put"}

    def finish(self, digest: str, path: str) -> bool:
        """Give a sent file its name, if it is what it should be."""
        part = path + ".part"
        if os.path.isfile(part):
            if sha256(part) != digest:
                os.remove(part)
                return False
            os.replace(part, path)
        return os.path.isfile(path)

    # jobs

    def job_folder(self, name: str) -> str:
        """Where a job stands."""
        if not re.match("^[0-9a-f]{8,64}$", name):
            raise AgentError("job", "'%s' is no id" % name)
        return os.path.join(self.jobs, name)

    def start(self, request: Table) -> Table:
        """Start a job, or find it started: it runs in a session of its own and outlives this process."""
        self.rest()
        folder = self.job_folder(request["id"])
        os.makedirs(folder, mode=0o700, exist_ok=True)
        file = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if lock(file) and not os.path.exists(os.path.join(folder, "job.json")):
                settings = {key: value for key, value in request.items() if key not in ("do", "work")}
                write_file(os.path.join(folder, "reserve"), bytes(RESERVE_BYTES))
                write_file(os.path.join(folder, "work.json"), json.dumps(self.work(request["work"])).encode())
                write_file(os.path.join(folder, "job.json"), json.dumps(settings).encode())
                command = [sys.executable, os.path.abspath(__file__), "job", folder]
                with open(os.path.join(folder, "trace"), "wb") as trace, open(os.devnull, "r+b") as nothing:
                    process = subprocess.Popen(
                        command, stdin=nothing, stdout=nothing, stderr=trace, start_new_session=True, pass_fds=(file,)
                    )
                self.started.append(process)
                write_file(os.path.join(folder, "pid"), str(process.pid).encode())
        finally:
            os.close(file)
        return {"event": "started", "boot": boot_id()}

    def work(self, job: Table) -> Table:
        """The job with the paths of its files."""

        def path(model: Any) -> Any:
            if isinstance(model, dict):
                return dict(model, path=self.object_path(model["path"]))
            return self.object_path(model)

        placed = dict(job, models=[path(model) for model in job["models"]])
        if "reference" in job:
            placed["reference"] = path(job["reference"])
        return placed

    def follow(self, request: Table) -> Table:
        """Tell a job's events from an offset on until it ends; the last one is its outcome, or that it is gone.

        The client answers with pings; without them the link is given up, and the job goes on.
        """
        folder = self.job_folder(request["id"])
        at, told, heard = int(request["offset"]), time.monotonic(), time.monotonic()
        while True:
            for process in self.started:
                process.poll()
            alive = locked(os.path.join(folder, "lock"))
            for line in new_lines(os.path.join(folder, "events"), at):
                at += len(line)
                told = time.monotonic()
                self.peer.send(dict(json.loads(line.decode()), at=at))
            outcome = read_text(os.path.join(folder, "outcome.json"))
            if outcome:
                return {"event": "finished", "outcome": json.loads(outcome)}
            if not alive:
                return {"event": "gone", "boot": boot_id(), "said": read_text(os.path.join(folder, "trace"))[-2000:]}
            now = time.monotonic()
            if now - told >= ALIVE_S:
                told = now
                self.peer.send({"event": "alive"})
            if self.peer.ready(LOOK_S):
                heard = now
                if self.peer.receive(self.peer.stall_s)["do"] == "stop":
                    return self.stop(request)
                touch(os.path.join(folder, "followed"))
            elif now - heard > FOLLOWED_S:
                raise Lost("was silent")

    def stop(self, request: Table) -> Table:
        """End a job and everything that it started."""
        folder = self.job_folder(request["id"])
        held, pid = os.path.join(folder, "lock"), read_number(os.path.join(folder, "pid"))
        for number in (signal.SIGTERM, signal.SIGKILL):
            if pid is None or not locked(held):
                break
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                break
            end = time.monotonic() + 5.0
            while locked(held) and time.monotonic() < end:
                time.sleep(0.05)
        for process in self.started:
            process.poll()
        return {"event": "stopped"}

    def fetch(self, request: Table) -> Tuple[Table, bytes]:
        """A part of a job's result."""
        with open(os.path.join(self.job_folder(request["id"]), "result"), "rb") as file:
            file.seek(request["offset"])
            data = file.read(1 << 18)
        return {"event": "part", "bytes": len(data)}, data

    def drop(self, request: Table) -> Table:
        """Forget a job that has ended."""
        folder = self.job_folder(request["id"])
        end = time.monotonic() + 5.0
        while locked(os.path.join(folder, "lock")) and time.monotonic() < end:
            time.sleep(0.02)
        for process in self.started:
            process.poll()
        shutil.rmtree(folder, ignore_errors=True)
        return {"event": "dropped"}

    # inference

    def infer(self, request: Table) -> Tuple[Table, bytes]:
        """Outputs of a file for arrays, computed in a process of its own while the device is held."""
        data = b"".join(self.peer.chunks(request["bytes"]))
        request["path"] = self.object_path(request["sha256"])
        if not os.path.isfile(request["path"]):
            raise AgentError("missing", "the file is not there", request["sha256"])
        require_runtime()
        lease = Lease(request["device"])
        try:
            lease.take(request["owner"], 60.0, request["wait_s"], lambda holder: self.peer.send(
                {"event": "waiting", "holder": holder}))  # fmt: skip
            if self.inferring is None:
                self.inferring = Inferring()
            try:
                return self.inferring.ask(request, data, lambda: self.peer.send({"event": "alive"}))
            except AgentError as error:
                if error.kind in ("killed", "lost"):
                    self.rest()
                raise
        finally:
            lease.give_back()


class Inferring(object):
    """The server's end of the process that infers."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, os.path.abspath(__file__), "infer"], subprocess.PIPE
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.peer = Peer(self.process.stdout.fileno(), self.process.stdin.fileno(), 600.0)

    def ask(self, request: Table, data: bytes, alive: Callable[[], None]) -> Tuple[Table, bytes]:
        """Its answer. alive: called now and then while it computes."""
        try:
            self.peer.send(request, data)
            while not self.peer.ready(ALIVE_S):
                alive()
            answer = self.peer.receive(600.0)
            return answer, b"".join(self.peer.chunks(answer.get("bytes", 0)))
        except Lost:
            raise died(self.process, self.errors, None) from None

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        try:
            self.process.stdin.close()
        except OSError:
            pass


def touch(path: str) -> None:
    """Set a file's time to now; it is made where it is missing."""
    with open(path, "ab"):
        pass
    os.utime(path)


def new_lines(path: str, offset: int) -> List[bytes]:
    """Whole lines of a growing file from an offset on."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return [line for line in file.readlines() if line.endswith(b"\n")]
    except OSError:
        return []


def inferrer() -> int:
    """Answer requests for inference until stdin ends: open sessions by path, run arrays of any batch over them."""
    die_with_parent()
    peer = Peer(os.dup(0), os.dup(1), 3600.0)
    os.dup2(2, 1)
    sessions: Dict[str, Any] = {}
    try:
        while True:
            request = peer.receive(86400.0)
            data = b"".join(peer.chunks(request["bytes"]))
            try:
                peer.send(*infer_once(request, data, sessions))
            except AgentError as error:
                peer.send(error.to_table())
    except Lost:
        return 0


def infer_once(request: Table, data: bytes, sessions: Dict[str, Any]) -> Tuple[Table, bytes]:
    """Outputs for the arrays of a request, or the inputs and outputs of its file where it has none."""
    path = request["path"]
    step = "open"
    try:
        if path not in sessions:
            while len(sessions) >= OPEN_SESSIONS:
                del sessions[next(iter(sessions))]
            sessions[path] = open_session(path, request["options"])
        session = sessions[path]
        if request["arrays"] is None:
            ports = (session.get_inputs(), session.get_outputs())
            return {"event": "ports", "inputs": port_tables(ports[0]), "outputs": port_tables(ports[1])}, b""
        step = "run"
        return pack_arrays(run_batch(session, unpack_arrays(request["arrays"], data)))
    except runtime_errors() as error:
        scarce = isinstance(error, MemoryError) or "Failed to allocate" in str(error)
        raise AgentError("memory" if scarce else "model", error_text(error), step=step) from None


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


def pack_arrays(arrays: Sequence[Any]) -> Tuple[Table, bytes]:
    """Arrays as a line and raw bytes, little-endian and in C order."""
    strange = [array.dtype.name for array in arrays if array.dtype.kind not in "biuf"]
    if strange:
        raise ValueError("arrays of %s are not sent" % strange[0])
    data = b"".join(array.tobytes() for array in arrays)
    tables = [{"dtype": array.dtype.name, "shape": list(array.shape)} for array in arrays]
    return {"event": "arrays", "arrays": tables, "bytes": len(data)}, data


def unpack_arrays(tables: Sequence[Table], data: bytes) -> List[Any]:
    """Inverse of `pack_arrays`; only plain numbers are understood."""
    import numpy as np

    arrays, start = [], 0
    for table in tables:
        kind, count = np.dtype(table["dtype"]), 1
        if kind.kind not in "biuf":
            raise ValueError("arrays of %s are not sent" % table["dtype"])
        for size in table["shape"]:
            count *= size
        arrays.append(np.frombuffer(data, kind, count, start).reshape(table["shape"]))
        start += count * kind.itemsize
    return arrays


def serve(folder: str) -> int:
    """The far end of a link."""
    answers = os.dup(1)
    os.dup2(2, 1)
    Server(os.path.abspath(folder), Peer(0, answers, 30.0)).run()
    return 0


# --- command line --------------------------------------------------------------------------------------------------


def stop(number: int, frame: Any) -> None:
    """Turn a request to end into an exit that closes the workers on its way."""
    raise SystemExit(128 + number)


def run_job(verb: str, job_path: str, out_path: str) -> int:
    """Do a job file; the result goes to a file, progress and the outcome go to stdout."""
    signal.signal(signal.SIGTERM, stop)
    with open(job_path, "rb") as file:
        job = json.loads(file.read().decode())
    if job.get("tied"):
        die_with_parent()
    try:
        if verb == "layers":
            table = layers(job, os.path.dirname(os.path.abspath(out_path)))
        else:
            table = drive(job) if verb == "drive" else rows(job)
        digest = write_result(out_path, table)
    except AgentError as error:
        tell(error.to_table())
        return 1
    except MemoryError:
        tell(AgentError("memory", "out of memory").to_table())
        return 1
    tell({"event": "done", "sha256": digest})
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run one verb; exit code 2 for a wrong command line."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") != here]
    if len(arguments) == 2 and arguments[0] == "worker":
        return worker()
    if list(arguments) == ["facts"]:
        tell(facts("onnxruntime"))
        return 0
    if len(arguments) == 2 and arguments[0] == "state":
        tell(state(arguments[1]))
        return 0
    if len(arguments) == 3 and arguments[0] in ("drive", "rows", "layers"):
        return run_job(*arguments)
    if len(arguments) == 2 and arguments[0] == "serve":
        return serve(arguments[1])
    if len(arguments) == 2 and arguments[0] == "job":
        return run_detached(arguments[1])
    if list(arguments) == ["infer"]:
        return inferrer()
    sys.stderr.write(str(__doc__) + "\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
