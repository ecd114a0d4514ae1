"""A link: JSON lines and raw bytes between two processes."""

import json
import os
import select
import time
from typing import Iterator

from .base import Table

MARK = "edge-deploy "
"""Begins the first line of a link: whatever a login shell prints before it is no part of it."""
ALIVE_S = 5.0
"""How often who works for somebody says that it is alive."""


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
