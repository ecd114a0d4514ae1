"""Text from outside (names, reasons, device facts) as text: no reader takes it for markup, a command or a colour."""

from __future__ import annotations

import re
import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""The text on one line, with every character that is not shown (control, direction, surrogate) as `\x1b`."""
    return "".join(_escaped(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def markdown(text: str) -> str:
    """The text in GitHub's Markdown, table cells included: no markup, link, mention or line break comes of it."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", text)
    text = text.replace("@", "&#64;").replace("$", "<span>$</span>").replace("://", ":&#47;&#47;")
    return re.sub(r"(?i)\bwww\.", lambda found: f"{found.group()[:3]}&#46;", text)
