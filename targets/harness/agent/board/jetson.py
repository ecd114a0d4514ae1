"""What a Jetson says of itself: module, L4T release, power mode, clocks of its GPU, power and over-current.

Everything is read from the board and nothing is inferred from a table, so that a newer L4T is no error. Files and
commands are NVIDIA's: /etc/nv_tegra_release and the device tree for who it is, `nvpmodel` for the power mode, devfreq
for the GPU's clock, `tegrastats` for power and memory (Jetson Linux Developer Guide, "Platform Power and Performance";
recordings of each JetPack with their sources lie beside the tests).
"""

import glob
import os
import re
import subprocess
import tempfile
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .base import AgentError, Table, die_with_parent, read_number, read_text
from .system import command, run

TREES = ("/proc/device-tree", "/sys/firmware/devicetree/base")
RELEASE = "/etc/nv_tegra_release"
MODES = "/etc/nvpmodel.conf"
STATUS = "/var/lib/nvpmodel/status"
DEVFREQ = "/sys/class/devfreq"
GPU_NAMES = ("gpu-gpc-0", "*.gpu", "*.gpusysfs", "*.gp10b", "*.gv11b", "*.ga10b")
"""devfreq's names of a Jetson's GPU: Thor's, Orin's and Nano's, then the chips' by name on older kernels."""


def tree(name: str) -> str:
    """An entry of the device tree, its strings parted by newlines, or ""."""
    for root in TREES:
        text = read_text(os.path.join(root, name))
        if text:
            return "\n".join(part for part in text.split("\x00") if part)
    return ""


def there() -> bool:
    """Whether this is a Jetson."""
    return os.path.exists(RELEASE) or "nvidia,tegra" in tree("compatible")


def release() -> str:
    """Release of Jetson Linux, as 36.4.3, or ""."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", read_text(RELEASE))
    return "%s.%s" % found.groups() if found else ""


def module() -> str:
    """Number of the module, as p3767-0005, or "". The carrier board's comes first in the tree and is no module."""
    numbers: List[str] = []
    for name in tree("compatible").splitlines():
        numbers += re.findall(r"p\d{4}-\d{4}", name)
    return numbers[-1] if numbers else ""


def chip() -> str:
    """Name of the chip, as tegra234, or ""."""
    found = re.findall(r"nvidia,(tegra\d+)$", tree("compatible"), re.M)
    return str(found[-1]) if found else ""


def may_be_root() -> bool:
    """Whether nvpmodel and jetson_clocks may be run as root without a password."""
    if os.geteuid() == 0:
        return True
    clocks_command = command("jetson_clocks")
    if command("sudo") is None or clocks_command is None or run(["nvpmodel", "-q"], as_root=True)[0]:
        return False
    return run(["sudo", "-n", "-l", clocks_command])[0] == 0


# power mode


def parse_modes(text: str) -> Dict[str, int]:
    """Name -> id of the power modes in an nvpmodel.conf."""
    found = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", text, re.MULTILINE)
    return {name: int(number) for number, name in found}


def modes() -> Dict[str, int]:
    """Name -> id of the power modes that this board has. Ids differ by board and firmware, names do not."""
    return parse_modes(read_text(MODES))


def parse_mode(text: str) -> Tuple[str, Optional[int]]:
    """Name and id of the mode in the output of `nvpmodel -q`: its line may follow warnings, the id is the last line."""
    name = re.search(r"NV (?:Fan|Power) ?Mode: *(?!quiet|cool)(\S+)", text)
    numbers = re.findall(r"^\s*(\d+)\s*$", text, re.MULTILINE)
    return (name.group(1) if name else ""), (int(numbers[-1]) if numbers else None)


def power_mode() -> Tuple[str, Optional[int]]:
    """Name and id of the power mode now; without a readable nvpmodel, what it wrote down when it was set."""
    code, said = run(["nvpmodel", "-q"])
    name, number = parse_mode(said) if code == 0 else ("", None)
    if number is None:
        stored = re.search(r"pmode:(\d+)", read_text(STATUS))
        number = int(stored.group(1)) if stored else None
    if not name and number is not None:
        name = next((known for known, own in modes().items() if own == number), "")
    return name, number


# clocks


def gpu_folder() -> str:
    """Folder of the GPU's frequency control, or ""."""
    for pattern in GPU_NAMES:
        for path in sorted(glob.glob(os.path.join(DEVFREQ, pattern))):
            if read_number(path + "/max_freq") is not None:
                return path
    return ""


def gpu_clocks() -> Table:
    """The GPU's lowest allowed, highest allowed and present clock in kHz; None where it is not shown."""
    folder = gpu_folder()
    found = {name: read_number("%s/%s_freq" % (folder, name)) if folder else None for name in ("min", "max", "cur")}
    return {name: None if hertz is None else hertz // 1000 for name, hertz in found.items()}


def gpu_locked() -> Optional[bool]:
    """Whether the GPU's clock is held at one frequency, or None where it is not shown."""
    clocks = gpu_clocks()
    return None if clocks["max"] is None else clocks["min"] == clocks["max"]


def clocks(cpu: str) -> str:
    """ "locked" when the processor's and the GPU's clock are held, as jetson_clocks does; else "floating" or "hidden".

    cpu: the same of the processor alone.
    """
    gpu = gpu_locked()
    if gpu is None:
        return cpu
    return "locked" if gpu and cpu != "floating" else "floating"


def dla_cores() -> Optional[int]:
    """Deep-learning accelerators of the board that are not switched off, or None where the device tree is hidden."""
    if not tree("compatible"):
        return None
    found = [glob.glob(root + "/**/nvdla[0-9]*@*", recursive=True) for root in TREES]
    return max(sum(read_text(node + "/status") != "disabled" for node in nodes) for nodes in found)


def facts() -> Table:
    """What a fingerprint holds of a Jetson beside what every board has."""
    name, number = power_mode()
    parts = [module() or chip(), "L4T " + release() if release() else ""]
    return {
        "board": " ".join(part for part in parts if part),
        "power_mode": name or ("mode %d" % number if number is not None else ""),
        "power_modes": sorted(modes()),
        "dla_cores": dla_cores(),
    }


def state() -> Table:
    """What moves on a Jetson: its mode and those that there are, the GPU's clock."""
    name, number = power_mode()
    return {
        "power_mode": name or ("mode %d" % number if number is not None else ""),
        "power_modes": sorted(modes()),
        "gpu_khz": gpu_clocks(),
    }


# power and memory while a job runs


def parse_tegrastats(line: str) -> Dict[str, float]:
    """Numbers of one line of tegrastats: ram_mib, each rail's power in mW now, and each sensor's temperature in C.

    Rails are "VDD_IN 5079mW/5079mW", without the unit on older JetPacks, with a third number since 7.2 (now, mean,
    largest); a rail "NC" is not connected, a sensor that is off says -256C, and PMIC is a constant.
    """
    found: Dict[str, float] = {}
    memory = re.search(r"\bRAM (\d+)/\d+MB", line)
    if memory:
        found["ram_mib"] = float(memory.group(1))
    for rail, power in re.findall(r"\b([A-Z]\w*) (\d+)(?:mW)?(?:/\d+(?:mW)?)+(?=\s|$)", line):
        if rail != "NC":
            found["power_mw %s" % rail] = float(power)
    for sensor, degrees in re.findall(r"\b([A-Za-z][\w.]*)@(-?\d+(?:\.\d+)?)C\b", line):
        if float(degrees) > -200.0 and sensor != "PMIC":
            found["temperature_c %s" % sensor] = float(degrees)
    return found


class Telemetry(object):
    """tegrastats at a low rate beside a measurement. period_ms: 0 for none. It costs about one wake-up each time."""

    def __init__(self, period_ms: int) -> None:
        self.process: Any = None
        path = command("tegrastats") if period_ms and there() else None
        if path is not None:
            self.said = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                [path, "--interval", str(period_ms)], stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said,
                preexec_fn=die_with_parent,
            )  # fmt: skip

    def end(self) -> Dict[str, float]:
        """Stop; mean and largest value of everything that was read."""
        if self.process is None:
            return {}
        self.process.terminate()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", "replace").splitlines()
        self.said.close()
        self.process = None
        return summary([parse_tegrastats(line) for line in lines])


def summary(readings: Sequence[Dict[str, float]]) -> Dict[str, float]:
    """Mean of powers and memory, largest of everything."""
    seen: Dict[str, List[float]] = {}
    for reading in readings:
        for name, value in reading.items():
            seen.setdefault(name, []).append(value)
    found = {"%s max" % name: max(values) for name, values in seen.items()}
    found.update({n + " mean": sum(v) / len(v) for n, v in seen.items() if not n.startswith("temperature")})
    return found


# asked for by a profile


def find_mode(name: str) -> int:
    """Id of a power mode by its name. Raises AgentError with the names that there are."""
    known = modes()
    if name not in known:
        offered = ", ".join(sorted(known)) or "none that can be read from %s" % MODES
        raise AgentError("mode", "no power mode '%s', there are: %s" % (name, offered), modes=sorted(known))
    return known[name]


def set_mode(number: int, name: str) -> None:
    """Switch to a power mode. Raises AgentError where that needs a restart, or root."""
    code, said = run(["nvpmodel", "-m", str(number)], as_root=True)
    if power_mode()[1] == number:
        return
    if "reboot" in said.lower():
        raise AgentError("mode", "power mode '%s' takes a restart of the board" % name, reboot=number)
    raise refused("nvpmodel -m %d" % number, code, said)


def refused(what: str, code: int, said: str) -> AgentError:
    """The error for a command that did not do what it was asked."""
    last = said.splitlines()[-1] if said else "it said nothing"
    no_root = any(t in said for t in ("password is required", "needs root", "as a root user", "not in the sudoers"))
    return AgentError("root" if no_root else "mode", "'%s' ended with %d: %s" % (what, code, last), command=what)
