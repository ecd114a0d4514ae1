"""The measuring agent, which runs on the device with nothing but Python 3.6 or later, numpy and ONNX Runtime.

    agent facts [RUNTIME [NAME ...]] who the device is, as JSON; NAME: providers of ONNX Runtime
    agent providers NAME ...         whether ONNX Runtime runs a small network on them, and where it could
    agent state FOLDER               how busy, hot and full it is, as JSON
    agent worker NAME                one process that holds models (NAME is for people): JSON requests on stdin,
                                        JSON answers on stdout
    agent drive JOB.json OUT.json    spawns workers and measures several models in turn (measurement.md, section 3)
    agent rows JOB.json OUT.json     many small models in turn in one process, for the latency table
    agent layers JOB.json OUT.json   several models in turn under the runtime's profiler: what each layer takes
    agent build JOB.json OUT.json    engines of models
    agent serve FOLDER               the far end of a link: requests on stdin, answers on stdout, files in FOLDER
    agent job FOLDER                 one job that outlives its link: takes the lease, runs drive, rows or layers, and
                                        spools the result into its FOLDER until it is fetched
    agent guard FOLDER               gives back power mode and clocks when the job that started it is gone
    agent engine VERB ...            builds an engine of TensorRT, or says which library is here: `tensorrt/job.py`
    agent infer                      one process that infers for `serve`

The clock is read around a complete synchronous inference with pre-bound buffers, in the process that infers; no timing
crosses a pipe. A block is a few untimed inferences, then the timed ones, back to back or one at every tick of a
control period. In every round the models follow each other in a random order that the seed fixes. Results are written
with fsync under their SHA-256. Every wait and every duration is counted on the monotonic clock: a clock of the day that
jumps changes nothing.

A link carries JSON lines, each followed by as many raw bytes as it says, and nothing else: no pickle, no timing. Files
are named by their SHA-256, so a half-sent one goes on where it stopped; jobs are named by an id that the client chose,
so a request that is sent twice does nothing twice.
"""

import json
import os
import signal
import sys
from typing import Sequence

from .arrange import guard
from .base import AgentError, Table, die_with_parent, program, tell
from .driver import drive
from .files import sha256, write_result
from .inferring import inferrer
from .job import run_detached, stop
from .layers import layers
from .machine import facts, state
from .providers import there
from .rows import rows
from .server import serve
from .worker import worker


def run_job(verb: str, job_path: str, out_path: str) -> int:
    """Do a job file; the result goes to a file, progress and the outcome go to stdout."""
    signal.signal(signal.SIGTERM, stop)
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no event
    with open(job_path, "rb") as file:
        job = json.loads(file.read().decode())
    if job.get("tied"):
        die_with_parent()
    try:
        if verb == "layers":
            table = layers(job, os.path.dirname(os.path.abspath(out_path)))
        elif verb == "build":
            table = build(job, os.path.dirname(os.path.abspath(out_path)))
        elif verb == "rows":
            table = rows(job, os.path.dirname(os.path.abspath(out_path)))
        else:
            table = drive(job)
        digest = write_result(out_path, table)
    except AgentError as error:
        tell(error.to_table())
        return 1
    except MemoryError:
        tell(AgentError("memory", "out of memory").to_table())
        return 1
    tell({"event": "done", "sha256": digest})
    return 0


def build(job: Table, folder: str) -> Table:
    """Build engine-0.plan and so on of the job's models in its folder; what was done, SHA-256 and size of each."""
    from .tensorrt import job as engines

    plans = [os.path.join(folder, "engine-%d.plan" % number) for number in range(len(job["models"]))]
    models = [{"onnx": onnx, "out": plan} for onnx, plan in zip(job["models"], plans)]
    records = engines.build(dict(job, models=models), tell)
    made = [{"record": record, "sha256": sha256(p), "size": os.path.getsize(p)} for record, p in zip(records, plans)]
    return {"built": made}


def tell_of(verb: str, arguments: Sequence[str]) -> int:
    """Tell facts, or of providers, or the error in their place."""
    try:
        if verb == "facts":
            tell(facts((list(arguments) or ["onnxruntime"])[0], arguments[1:]))
        else:
            tell({"event": "providers", "there": there(arguments)})
    except AgentError as error:
        tell(error.to_table())
        return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run one verb; exit code 2 for a wrong command line."""
    own = program()
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") != own]
    if len(arguments) == 2 and arguments[0] == "worker":
        return worker()
    if arguments[:1] == ["facts"] or (arguments[:1] == ["providers"] and len(arguments) > 1):
        return tell_of(arguments[0], list(arguments[1:]))
    if len(arguments) == 2 and arguments[0] == "state":
        tell(state(arguments[1]))
        return 0
    if len(arguments) == 3 and arguments[0] in ("drive", "rows", "layers", "build"):
        return run_job(*arguments)
    if len(arguments) == 2 and arguments[0] == "serve":
        return serve(arguments[1])
    if len(arguments) == 2 and arguments[0] == "job":
        return run_detached(arguments[1])
    if len(arguments) == 2 and arguments[0] == "guard":
        return guard(arguments[1])
    if arguments[:1] == ["engine"]:
        from .tensorrt import job

        return job.main(arguments[1:])
    if list(arguments) == ["infer"]:
        return inferrer()
    sys.stderr.write(str(__doc__) + "\n")
    return 2
