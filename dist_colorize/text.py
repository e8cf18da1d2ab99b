"""Names of files in lines that people read."""

from __future__ import annotations

import os


def printable(name: object) -> str:
    """A path or name for a report: one line, whatever bytes it holds."""
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
