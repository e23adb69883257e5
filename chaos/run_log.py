"""The log that programs keep outside the queue: one write a line, so that any number of processes can share the file."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LONGEST = 4000
"""Bytes of a line at most: an append of less than a page is never mixed with another's."""


class RunLog:
    """Appends lines of JSON to a file of the run's directory. `at` is the machine's monotonic clock, one for all processes."""

    def __init__(self, path: Path | str) -> None:
        """Open *path* for appending."""
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, **fields: Any) -> None:
        """Append one line. It begins a line of its own: whoever wrote before may have been killed amid a line."""
        facts = {**fields, "at": round(time.monotonic(), 6)}
        line = b"\n" + json.dumps(facts, separators=(",", ":")).encode() + b"\n"
        assert len(line) < LONGEST, len(line)
        os.write(self._fd, line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read(path: Path) -> list[dict[str, Any]]:
    """
    Return the lines of a file, in their order; none when it was never opened.

    A line whose writer was killed amid it is left out, wherever it stands: it lacks its last brace, so it is no JSON.
    """
    return read_on(path, 0)[0]


def read_on(path: Path, at: int) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a file behind the byte *at*, as `read` does, and the byte behind the last whole line."""
    if not path.exists():
        return [], at
    with path.open("rb") as file:
        file.seek(at)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    found = []
    for line in whole.split(b"\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return found, at + len(whole)
