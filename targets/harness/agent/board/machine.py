"""What the device is, and how busy, hot and full it is."""

import glob
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from typing import Dict, List, Optional, Sequence, Tuple

from . import jetson
from .base import CLOCK, AgentError, Table, die_with_parent, program, read_number, read_text
from .files import sha256

BUSY_CORES = 0.2
WATCH_S = 0.3
FACTS_S = 100.0
OVERCURRENT = "/oc"
"""What tells a Jetson's over-current counters from other throttle counters, in their paths."""


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
    board = jetson.tree("model")
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
    """Files that count how often the hardware lowered its clock, all of a Jetson's over-current counters among them.

    Whether one of those lowers the clock (oc*_throt_en) is not asked: it is 1 on every board of which it is known, and
    a supply at its limit spoils a number either way.
    """
    found = glob.glob("/sys/class/hwmon/hwmon*/%s*_event_cnt" % OVERCURRENT[1:])
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


def require_runtime(name: str, arrays: bool = False) -> None:
    """Raise AgentError where what inference needs is not installed. name: onnxruntime, or a runtime of engines.

    arrays: whether it is to infer on arrays, which takes numpy; engines are timed without it.
    """
    from importlib import util

    # what a runtime of engines lacks itself is said when it is loaded
    for package in ("onnxruntime", "numpy") if name == "onnxruntime" else ("numpy",) if arrays else ():
        if util.find_spec(package) is None:
            raise AgentError("runtime", "%s is not installed" % package, package=package)


def runtime_facts(name: str, names: Sequence[str] = ()) -> Table:
    """Name, version and hash of a runtime; the GPU too of one of engines, and where ONNX Runtime is to run on one.

    names: of ONNX Runtime's providers, which are tried where they take a GPU. engines: what their key holds;
    no_outputs: why none can be read here, and what would mend it, or {}.
    """
    if name == "onnxruntime":
        from . import providers

        version, build = runtime_build(name)
        return dict(providers.facts(names), runtime=name, runtime_version=version, runtime_build=build)
    from .tensorrt import job, opening

    found = job.facts(name)
    return dict(opening.device(found), engines=found, no_outputs=opening.no_outputs(found))


def facts(runtime: str, names: Sequence[str] = ()) -> Table:
    """What does not change between two runs on this device: the fields of a fingerprint. names: of providers."""
    name, flags = processor()
    governors = sorted({read_text(folder + "/scaling_governor") for folder in clock_folders()})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: Table = {
        "machine": machine(),
        "serial": jetson.tree("serial-number"),
        "cpu": name,
        "cpu_flags": flags,
        "cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "kernel": platform.system() + " " + platform.release(),
        "memory_mib": int(round(pages / 2.0**20 / 256.0)) * 256,
        "power": " ".join(governors),
        "clocks": clocks(),
        "python": "%d.%d" % sys.version_info[:2],
    }
    found.update(runtime_facts(runtime, names))
    if jetson.there():
        found.update(jetson.facts(), clocks=jetson.clocks(clocks()))
    return found


def asked_facts(runtime: str, names: Sequence[str] = ()) -> Table:
    """`facts`; by a process of its own where that loads what would stay loaded in this one: engines, CUDA."""
    from . import providers

    if runtime != "onnxruntime":
        return apart(runtime, "facts", runtime)
    return apart(runtime, "facts", runtime, *names) if providers.on_gpu(names) else facts(runtime)


def apart(runtime: str, *arguments: str) -> Table:
    """What the agent tells in a process of its own. Raises AgentError for an error that it tells."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, program(), *arguments], stdout=pipe, stderr=pipe, preexec_fn=die_with_parent
    )
    try:
        said, errors = process.communicate(timeout=FACTS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AgentError("broken", "%s did not load within %.0f s" % (runtime, FACTS_S)) from None
    try:
        table: Table = json.loads(said.decode().splitlines()[-1])
    except (ValueError, IndexError):
        text = errors.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise AgentError("broken", text[-1]) from None
    if table.get("event") == "error":
        raise AgentError(table.pop("kind"), table.pop("message"), **table)
    return table


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
    """Degrees Celsius of each thermal zone; a Jetson's PMIC-Die is left out, which is a constant 100 or 50."""
    found = {}
    for zone in sorted(glob.glob("/sys/class/thermal/thermal_zone*")):
        value = read_number(zone + "/temp")
        if value is not None and not read_text(zone + "/type").startswith("PMIC"):
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


def throttle_counts(paths: Optional[Sequence[str]] = None) -> Dict[str, int]:
    """Path of each hardware throttle counter that can be read -> how often it has moved since the system started.

    paths: what `throttle_paths` has found before.
    """
    found = {path: read_number(path) for path in (throttle_paths() if paths is None else paths)}
    return {path: count for path, count in found.items() if count is not None}


def moved(before: Dict[str, int], after: Dict[str, int], kind: str = "") -> int:
    """How often the counters with `kind` in their path moved between two readings, of those that are in both."""
    return sum(max(0, count - before[path]) for path, count in after.items() if kind in path and path in before)


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
    found: Table = {
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
        "throttle_moved": moved(throttled, counts),
        "busy": busy,
        "memory_free_mib": free_memory_mib(),
        "disk_free_mib": int(disk.f_bavail * disk.f_frsize // 2**20),
        "folder": folder,
    }
    if jetson.there():
        found.update(jetson.state(), clocks=jetson.clocks(clocks()))
    return found
