"""What ends a job on a board, as a plain table that crosses the link."""

from typing import Any, Dict

Table = Dict[str, Any]


class BoardError(Exception):
    """One sentence that says what failed, with its numbers.

    kind: model (this network), memory, option (what was asked for), library (TensorRT or CUDA is not there), device
    (no driver or no such part), disk or time. hint: the next step, "" where only the host knows it; more: numbers.
    """

    def __init__(self, kind: str, message: str, hint: str = "", **more: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint
        self.more = more

    def to_table(self) -> Table:
        """Plain table for JSON."""
        table = dict(self.more, event="error", kind=self.kind, message=self.message, hint=self.hint)
        table.setdefault("model", None)
        return table
