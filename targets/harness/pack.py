"""The agent as one file: a zip that every Python from 3.6 on runs as it is."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path

FOLDER = Path(__file__).with_name("agent")
"""What runs on this machine."""
NAME = "agent.pyz"
"""Of the zip on a board."""


@functools.cache
def packed() -> bytes:
    """The zip. Not compressed and without dates: its bytes depend on the files alone."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as out:
        for path in sorted([FOLDER / "__main__.py", *FOLDER.glob("board/**/*.py")]):
            out.writestr(zipfile.ZipInfo(path.relative_to(FOLDER).as_posix()), path.read_bytes())
    return data.getvalue()


@functools.cache
def digest() -> str:
    """SHA-256 of the zip; of the agent that every session names."""
    return hashlib.sha256(packed()).hexdigest()
