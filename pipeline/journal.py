"""The journal of a run: what was measured or decided, one JSON object a line, each on the disk before the next begins.

A kill can tear only the last line. It is cut off when the journal is opened again, so a resumed run repeats at most the
one piece of work that was not yet written down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cache import disk_full
from pipeline.stage import Json, canonical, digest
from profiles.errors import DeployError


class Journal:
    """Recorded values by name and key, in the order in which they were appended."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises DeployError when a line other than the last is damaged."""
        self.path = path
        self._values: dict[tuple[str, str], Json] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                self._values[str(entry["name"]), str(entry["key"])] = entry["value"]
            except (ValueError, KeyError, TypeError):
                message = f"line {number} of the journal '{path}' is damaged."
                raise DeployError(message, "start a new run: deploy build without --resume.") from None

    def __len__(self) -> int:
        return len(self._values)

    def entries(self, name: str) -> list[Json]:
        """Every value recorded under a name, oldest first."""
        return [value for (recorded, _), value in self._values.items() if recorded == name]

    def append(self, name: str, key: Json, value: Json) -> Json:
        """Write one entry down and give it back as a replay would read it. Raises DeployError when the disk is full."""
        line = canonical({"name": name, "key": digest(key), "value": value})
        try:
            with self.path.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            full = disk_full(error, self.path)
            if full is not None:
                raise full from error
            raise
        stored = json.loads(line)["value"]
        self._values[name, digest(key)] = stored
        return stored

    def recorded(self, name: str, key: Json) -> tuple[bool, Json]:
        """Whether there is an entry, and its value."""
        place = (name, digest(key))
        return place in self._values, self._values.get(place)

    def once(self, name: str, key: Json, work: Callable[[], Any]) -> Json:
        """The recorded value of (name, key); where there is none, do the work and record what it gives.

        The value always has gone through JSON, so a replay sees the same types. Two different pieces of work under one
        name need different keys.
        """
        found, value = self.recorded(name, key)
        return value if found else self.append(name, key, work())
