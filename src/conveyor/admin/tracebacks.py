"""Tracebacks as frames: which lines are of the user's own code, and which of libraries."""

from __future__ import annotations

import re

import msgspec

from conveyor.payload.failures import is_own

_FRAME = re.compile(r'^  File "(?P<file>[^"\n]*)", line (?P<line>\d+), in (?P<function>.*)$')


class Frame(msgspec.Struct, frozen=True):
    """One frame of a traceback, the outermost first. `own`: its file is not of a library; `code`: its line of source."""

    file: str
    line: int
    function: str
    code: str
    own: bool


def frames_of(traceback: str) -> list[Frame]:
    """Return the frames of a traceback, those of chained exceptions too, in the order of the text."""
    found: list[Frame] = []
    lines = traceback.split("\n")
    for at, text in enumerate(lines):
        match = _FRAME.match(text)
        if match is None:
            continue
        after = lines[at + 1] if at + 1 < len(lines) else ""
        code = after.strip() if after.startswith("    ") else ""
        own = is_own(match["file"])
        found.append(Frame(match["file"], int(match["line"]), match["function"], code, own))
    return found
