"""Where the files of a job lie on the board, in the place of the SHA-256 by which a client names them."""

import hashlib
import json
import os
import re
import shutil
from typing import Any

from .base import AgentError, Table


def object_path(home: str, digest: str) -> str:
    """Where a file lies in the agent's folder. Raises AgentError for what is no SHA-256."""
    if not re.match("^[0-9a-f]{64}$", digest):
        raise AgentError("job", "'%s' is no SHA-256" % digest)
    return os.path.join(home, "objects", digest)


def placed(job: Table, home: str, folder: str) -> Table:
    """The job with the paths of its files. home: the agent's folder; folder: the job's."""

    def path(model: Any) -> Any:
        if isinstance(model, dict) and "beside" in model:
            return gathered(model, home, os.path.join(folder, "models"))
        if isinstance(model, dict):
            return dict(model, path=object_path(home, model["path"]))
        return object_path(home, model)

    table = dict(job, models=[path(model) for model in job["models"]])
    if "reference" in job:
        table["reference"] = path(job["reference"])
    if "options" in job:
        table["options"] = caching(job["options"], home)
    if "build" in job:
        table["build"] = ordered(job["build"], home)
    return ordered(table, home)


def gathered(model: Table, home: str, folder: str) -> str:
    """Path of an ONNX file in a folder of its own beside copies of the files of its weights, under their own names.

    name: its own; beside: name of each of those files -> SHA-256. Links will not do: a loader that is wary of files
    from elsewhere refuses them.
    """
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    own = os.path.join(folder, digest[:16])
    for name, held in dict(model["beside"], **{model["name"]: model["path"]}).items():
        place = os.path.normpath(os.path.join(own, name))
        if not place.startswith(own + os.sep):
            raise AgentError("job", "'%s' lies outside the model's folder" % name)
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        shutil.copyfile(object_path(home, held), place)
    return os.path.join(own, model["name"])


def caching(options: Table, home: str) -> Table:
    """Options of a session, with the folder where ONNX Runtime's TensorRT provider keeps its engines."""
    return dict(options, engine_cache=os.path.join(home, "engines")) if "engine_cache" in options else options


def ordered(table: Table, home: str) -> Table:
    """What a builder is asked for, with the path of its timing cache."""
    if not table.get("timing_cache"):
        return table
    os.makedirs(os.path.join(home, "timing"), mode=0o700, exist_ok=True)
    return dict(table, timing_cache=os.path.join(home, "timing", os.path.basename(table["timing_cache"])))
