"""One job in a process of its own, told in JSON lines: build engines, or say which library is here.

    agent engine build JOB.json OUT.json    engines; progress, errors and the end go to stdout, what was done to
                                            OUT.json
    agent engine facts NAME                 the library of a runtime and the GPU, as JSON

A builder takes gigabytes and crashes where it runs out of them: a process of its own takes nothing else with it.
"""

import json
import os
import sys
from typing import Any, Callable, List, Sequence

from ..base import die_with_parent
from . import cuda, engine, library, trtexec
from .errors import BoardError, Table
from .opening import has_trtexec
from .progress import Tell


def gpu_facts() -> Table:
    """The GPU here, or why there is none."""
    try:
        runtime = cuda.Cuda()
        runtime.call("cudaSetDevice", 0)
        return runtime.facts()
    except BoardError as error:
        return {"none": error.message}


def facts(name: str) -> Table:
    """The library of a runtime, trtexec where it stands in for it, the GPU, and for which others it builds."""
    offered: List[str] = []
    try:
        loaded = library.load(name)
        here, offered = loaded.facts(), loaded.capabilities()
    except BoardError:
        if name != "tensorrt" or not has_trtexec():
            raise
        here = trtexec.facts(trtexec.Trtexec(trtexec.find()))
    return {"library": here, "gpu": gpu_facts(), "capabilities": offered}


def build(job: Table, tell: Tell) -> List[Table]:
    """Build every model of a job, one after the other, and say what was done for each.

    models: each with `onnx` and `out`; the rest of the job is the same for all of them, and so is the library, which
    is loaded once. It is trtexec where only that is there. Raises the library's error otherwise.
    """
    make = builder(job["library"])
    made: List[Table] = []
    for model in job["models"]:
        made.append(make(dict(job, **model), partly(tell, len(made), len(job["models"]))))
    return made


def builder(name: str) -> Callable[[Table, Tell], Table]:
    """What builds one engine here."""
    try:
        loaded = library.load(name)
    except BoardError:
        if name != "tensorrt" or not has_trtexec():
            raise
        binary = trtexec.Trtexec(trtexec.find())
        return lambda job, tell: trtexec.build(binary, job, tell)
    return lambda job, tell: engine.build(job, tell, loaded)


def partly(tell: Tell, done: int, total: int) -> Tell:
    """Tells of the progress of one of several, of which so many are done, as that of all."""
    return lambda event: tell(dict(event, done=(done + event["done"]) / total))


def main(arguments: Sequence[str]) -> int:
    """Do one job; exit code 1 where it failed, 2 for a wrong command line. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(table: Any) -> None:
        answers.write(json.dumps(table) + "\n")
        answers.flush()

    try:
        if len(arguments) == 2 and arguments[0] == "facts" and arguments[1] in library.MODULES:
            tell(dict(facts(arguments[1]), event="done"))
            return 0
        if len(arguments) == 3 and arguments[0] == "build":
            die_with_parent()
            with open(arguments[1], "rb") as file:
                job = json.loads(file.read().decode())
            engine.write(arguments[2], json.dumps(build(job, tell)).encode())
            tell({"event": "done"})
            return 0
    except BoardError as error:
        tell(error.to_table())
        return 1
    except MemoryError:
        tell(BoardError("memory", "out of memory").to_table())
        return 1
    sys.stderr.write(str(__doc__) + "\n")
    return 2
