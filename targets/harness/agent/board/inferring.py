"""Inference for a client, in a process of its own."""

import os
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, List, Sequence, Tuple

from .base import AgentError, Table, die_with_parent, program
from .driver import died
from .model import error_text, open_session, port_tables, run_batch, runtime_errors
from .peer import ALIVE_S, Lost, Peer

OPEN_SESSIONS = 4


class Inferring(object):
    """The server's end of the process that infers."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, program(), "infer"], subprocess.PIPE
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.peer = Peer(self.process.stdout.fileno(), self.process.stdin.fileno(), 600.0)

    def ask(self, request: Table, data: bytes, alive: Callable[[], None]) -> Tuple[Table, bytes]:
        """Its answer. alive: called now and then while it computes; what it raises goes through as it is."""
        try:
            self.peer.send(request, data)
        except Lost:
            raise died(self.process, self.errors, None) from None
        while not self.peer.ready(ALIVE_S):
            alive()
        try:
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
                closed = sessions.pop(next(iter(sessions)))
                getattr(closed, "close", lambda: None)()
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
