"""Results that are kept one JSON object a line, so that a stopped benchmark goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """What there is so far. A last line that a kill has torn is cut off."""
    text = path.read_text() if path.is_file() else ""
    if not text.endswith("\n") and text:
        path.write_text(text := text[: text.rfind("\n") + 1])
    return [json.loads(line) for line in text.splitlines()]


def append(path: Path, row: Row) -> None:
    """Keep one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
