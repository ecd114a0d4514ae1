"""Opens an engine through the library, or through trtexec where only that is there."""

from importlib import util
from typing import Any, Dict

from . import library, running, trtexec
from .errors import BoardError, Table

INSTALL = "install TensorRT's Python module there: apt-get install python3-libnvinfer."


def has_trtexec() -> bool:
    """Whether trtexec can stand in for the library."""
    try:
        return bool(trtexec.find())
    except BoardError:
        return False


def model(path: str, options: Table) -> Any:
    """An engine that can be timed. options: library, and those of running."""
    try:
        loaded = library.load(options["library"])
    except BoardError:
        if options["library"] != "tensorrt" or not has_trtexec():
            raise
        opened: Any = trtexec.TrtexecModel(path, options)
        opened.protocol = trtexec.protocol(options)
        return opened
    opened = running.EngineModel(path, options, loaded)
    opened.protocol = running.protocol(options)
    return opened


def session(path: str, options: Table) -> Any:
    """An engine that infers on arrays. Raises BoardError where only trtexec is there, which tells no outputs."""
    try:
        loaded = library.load(options["library"])
    except BoardError as error:
        if options["library"] == "tensorrt" and has_trtexec():
            raise BoardError("library", "trtexec gives no outputs, and %s" % error.message, INSTALL) from None
        raise
    return running.EngineSession(running.EngineModel(path, options, loaded))


def no_outputs(facts: Table) -> Table:
    """Why nothing can infer on arrays here (`why`), and what would `mend` it; {} where it can. facts: of the library.

    trtexec writes outputs as decimal text with six digits, of one inference a process: a metric over thousands of
    samples would take hours, so it is not asked.
    """
    if facts["library"]["name"] == "trtexec":
        return {"why": "trtexec gives none", "mend": INSTALL}
    if util.find_spec("numpy") is None:
        return {"why": "numpy is not installed there", "mend": "apt-get install python3-numpy."}
    return {}


def device(facts: Table) -> Dict[str, Any]:
    """What a fingerprint holds of `job.facts`: runtime, its version, the hash of its file, and the GPU."""
    return {
        "runtime": facts["library"]["name"],
        "runtime_version": facts["library"]["version"],
        "runtime_build": facts["library"]["build"],
        "gpu": described(facts["gpu"]),
    }


def described(gpu: Table) -> str:
    """A GPU in words, or none."""
    return "none" if "none" in gpu else "%(name)s %(capability)s, CUDA %(cuda)s, driver %(driver)s" % gpu
