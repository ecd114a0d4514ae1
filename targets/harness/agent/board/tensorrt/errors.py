"""What ends a job that has to do with TensorRT or CUDA."""

from typing import Any

from ..base import AgentError, Table

__all__ = ["BoardError", "Table"]


class BoardError(AgentError):
    """One sentence that says what failed, with its numbers.

    kind: model (this network), memory, option (what was asked for), library (TensorRT or CUDA is not there), device
    (no driver or no such part), disk or time. hint: the next step, "" where only the host knows it; more: numbers.
    """

    def __init__(self, kind: str, message: str, hint: str = "", **more: Any) -> None:
        super().__init__(kind, message, None, **more)
        self.hint = hint

    def to_table(self) -> Table:
        """Plain table for JSON."""
        return dict(super().to_table(), hint=self.hint)
