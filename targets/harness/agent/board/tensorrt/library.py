"""TensorRT, or TensorRT for RTX, as it is loaded here: what it is called, its version, its log.

What a version can do is asked of the library itself (`hasattr`, members of its enumerations), never read from a table
of versions: the same code meets 8.2 on a Nano and 11 on a Thor, and whatever comes next.
"""

import ctypes
import importlib
import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..files import sha256
from . import dla
from .errors import BoardError, Table

MODULES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""Name of a runtime -> the modules that offer it, best first."""
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
FILES = {"tensorrt": "libnvinfer.so", "tensorrt-rtx": "libtensorrt_rtx.so", "cudnn": "libcudnn.so"}
"""cuDNN is what ONNX Runtime's CUDA provider runs on."""
NO_DRIVER_HINT = "run it on a machine with an NVIDIA GPU and its driver; what was built here stays as it is."
SCARCE = ("out of memory", "outofmemory", "insufficient memory", "failed to allocate", "unable to allocate")
"""In a line that says that there was too little memory."""
SCARCE_HINT = "close what else holds memory there, or measure fewer networks at once."
LINES = 200
"""Warnings and errors of the library that are kept, the first ones."""
Importer = Callable[[str], Any]


class Library(object):
    """A loaded module. name: of the runtime, tensorrt or tensorrt-rtx; api: the module.

    errors, warnings: what it says; placed: its lines on what runs on a DLA and what on the GPU.
    """

    def __init__(self, name: str, api: Any) -> None:
        self.name, self.api = name, api
        self.warnings: List[str] = []
        self.errors: List[str] = []
        self.placed: List[str] = []
        self.logger = make_logger(api, self._said)

    def _said(self, level: int, text: str) -> None:
        severities = self.api.ILogger
        if level > int(severities.WARNING):
            if dla.PLACED.search(text):
                self.placed.append(text)
            return
        kept = self.errors if level <= int(severities.ERROR) else self.warnings
        if len(kept) < LINES:
            kept.append(text.strip())

    @property
    def version(self) -> str:
        """Version of the library that is loaded, else of its Python module."""
        return loaded_version(self.name) or str(self.api.__version__)

    @property
    def title(self) -> str:
        """Name and version in words."""
        return "%s %s" % (TITLES[self.name], self.version)

    def has(self, kind: str, member: str) -> bool:
        """Whether an enumeration of the library has a member."""
        return hasattr(getattr(self.api, kind, None), member)

    def make(self, kind: str) -> Any:
        """A Builder or a Runtime. Raises BoardError where the library gives none, as without a driver."""
        try:
            return getattr(self.api, kind)(self.logger)
        except TypeError as error:  # pybind11: the factory gave a null pointer
            if self.errors and lacks_driver(self.errors[0]):
                raise no_driver(self.title, self.errors[0]) from None
            reason = self.last_error(str(error).split("\n")[0])
            raise BoardError("library", "%s gives no %s: %s" % (self.title, kind, reason)) from None

    def last_error(self, otherwise: str) -> str:
        """The first error that was logged, without codes and source places, or another text."""
        return clean(self.errors[0]) if self.errors else otherwise

    def capabilities(self) -> List[str]:
        """Compute capabilities of GPUs that need not be here for an engine to be built for them, as 8.6."""
        members = getattr(getattr(self.api, "ComputeCapability", None), "__members__", ())
        numbers = sorted((name[2:] for name in members if name.startswith("SM")), key=int)
        return ["%s.%s" % (number[:-1], number[-1]) for number in numbers]

    def facts(self) -> Table:
        """Who the library is: name, version and the SHA-256 of its file, "" where that is not found."""
        return dict(loaded_facts(self.name), version=self.version)


def load(name: str, importer: Optional[Importer] = None) -> Library:
    """The library of a runtime. Raises BoardError with every reason where it cannot be loaded."""
    reasons = []
    for module in MODULES[name]:
        try:
            return Library(name, (importer or importlib.import_module)(module))
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(str(error).split("\n")[0] or type(error).__name__)
    raise BoardError("library", "%s is not installed here: %s" % (TITLES[name], "; ".join(dict.fromkeys(reasons))))


def make_logger(api: Any, said: Callable[[int, str], None]) -> Any:
    """An ILogger of the library that hands on every line with its severity and prints nothing."""

    class Log(api.ILogger):  # type: ignore[misc]
        """Told of every line."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            """One line of the library."""
            said(int(severity), msg)

    return Log()


def clean(text: str) -> str:
    """A line of the library without its error codes and the places in its source, without a full stop."""
    line = text.strip().split("\n")[0]
    while True:
        head, colon, rest = line.partition(": ")
        words = re.sub(r"^\[[\w.]*::[^\]]*\] ?", "", head)
        placed = " " not in words and ("::" in words or re.match(r"\S+\.(?:cpp|h)(?::\d+)?$", words))
        if not colon or not rest or not (placed or words.strip("[]").isdigit() or re.match(r"Error Code \d+$", words)):
            break
        line = rest
    line = re.sub(r"\s*\bIn \S+ at /?[\w./]+:\d+", "", line)
    kind = re.match(r"^[A-Z][\w ]+ \(\s*(.+)\)$", line)
    line = kind.group(1) if kind else line
    return (line[1:-1] if line.startswith("(") and line.endswith(")") else line).strip().rstrip(".")


def lacks_driver(text: str) -> bool:
    """Whether a line of the library says that there is no GPU or no driver that fits."""
    return bool(
        re.search(r"driver version is insufficient|no CUDA-capable device|(?:cudaError|error:) (?:35|100)\b", text)
    )


def tells_scarce(lines: Sequence[str]) -> bool:
    """Whether lines of the library say that there was too little memory."""
    said = " ".join(lines).lower().replace("_", "")
    return any(word in said for word in SCARCE)


def no_driver(title: str, line: str) -> BoardError:
    """The error for a machine without a GPU or driver. title: name and version of the library; line: what it says."""
    text = "no engine can run here, since %s finds no GPU with a driver that fits (%s)" % (title, clean(line))
    return BoardError("device", text, NO_DRIVER_HINT)


# --- the file behind it ------------------------------------------------------------------------------------------


def loaded_file(name: str) -> str:
    """Path of the library that this process has loaded, or ""."""
    try:
        with open("/proc/self/maps") as file:
            paths = {line.split(None, 5)[5].strip() for line in file if FILES[name] in line}
    except OSError:
        return ""
    return min(paths) if paths else ""


def loaded_facts(name: str) -> Table:
    """Name, version and the SHA-256 of the file of a library that this process has loaded, each "" where it has not."""
    path = loaded_file(name)
    return {"name": name, "version": loaded_version(name), "build": sha256(path) if path else ""}


def loaded_version(name: str) -> str:
    """Version that the loaded library tells of itself, or "".

    getInferLibVersion gives 1000 major + 100 minor + patch before version 10, 10000 major + 100 minor + patch after;
    TensorRT for RTX counts the second way (NvInferVersion.h). So does cudnnGetVersion, from version 9 on
    (cudnn_version.h).
    """
    path = loaded_file(name)
    if not path:
        return ""
    try:
        loaded = ctypes.CDLL(path)
        number = int(loaded.cudnnGetVersion() if name == "cudnn" else loaded.getInferLibVersion())
    except (OSError, AttributeError):
        return ""
    major, rest = divmod(number, 10000) if number >= 10000 else divmod(number, 1000)
    return "%d.%d.%d" % (major, rest // 100, rest % 100)


# --- memory ------------------------------------------------------------------------------------------------------


def free_mib() -> Tuple[Optional[int], Dict[str, int]]:
    """Free memory in MiB that an engine may use, and what was seen; None where nothing is shown.

    On a board that shares its memory between processor and GPU it is what the system can give without swapping; the
    CUDA runtime counts there only what nobody has touched. On other machines it is what the GPU has free.
    """
    seen: Dict[str, int] = {}
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    seen["system"] = int(line.split()[1]) // 1024
    except OSError:
        pass
    from . import cuda

    try:
        runtime = cuda.Cuda()
        seen["gpu"] = runtime.free_memory() >> 20
        if runtime.shares_memory():
            return seen.get("system", seen["gpu"]), seen
        return seen["gpu"], seen
    except BoardError:
        return None, seen
