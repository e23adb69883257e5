"""What programs write down outside the queue: one line, one write, however many processes share the file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

LONGEST = 4000
"""Bytes of a line at most: an append of less than a page is never mixed with another's."""


class Record:
    """Appends lines of JSON to a file of the run's directory. `at` is the machine's monotonic clock, one for all processes."""

    def __init__(self, path: Path | str) -> None:
        """Open *path* for appending."""
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, **fields: Any) -> None:
        """Append one line."""
        line = json.dumps({**fields, "at": round(time.monotonic(), 6)}, separators=(",", ":")).encode() + b"\n"
        assert len(line) < LONGEST, len(line)
        os.write(self._fd, line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, in their order; none when it was never opened. A torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]
