"""The lines that a running job logs, gathered until its end says whether they are kept."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

from conveyor.payload.live_records import StoredLine

MOST_LINES, MOST_BYTES = 1000, 64 * 1024
"""Lines of an attempt that are kept, and their bytes: the newest."""
FOLLOWED_BYTES = 256 * 1024
"""Bytes of lines that an attempt sends while it runs; more are sent at its end, as far as they are kept."""


class JobLog:
    """
    The lines of one attempt, the newest within the bounds. Any thread may add some.

    `follow` has them sent while the job runs: the hook is then called for lines that nobody has taken.
    """

    __slots__ = ("_bytes", "_dropped", "_followed_until", "_lines", "_lock", "_on_lines", "_sent")

    def __init__(self, on_lines: Callable[[], None] | None = None) -> None:
        """*on_lines* is called when there are lines to be sent at once; None: they never are."""
        self._on_lines = on_lines
        self._lines: deque[StoredLine] = deque()
        self._lock = threading.Lock()
        self._bytes = self._dropped = self._sent = 0
        self._followed_until = 0.0

    def add(self, lines: Iterable[StoredLine]) -> None:
        """Add lines; the oldest are dropped beyond the bounds."""
        with self._lock:
            was_empty = not self._lines
            for line in lines:
                self._lines.append(line)
                self._bytes += len(line[3])
            while len(self._lines) > MOST_LINES or (self._bytes > MOST_BYTES and len(self._lines) > 1):
                self._bytes -= len(self._lines.popleft()[3])
                self._dropped += 1
        if was_empty and self.is_followed and self._on_lines is not None:
            self._on_lines()

    def follow(self, seconds: float) -> None:
        """Have the lines sent at once for so many seconds, those from before first."""
        self._followed_until = monotonic() + seconds
        if self._lines and self._on_lines is not None:
            self._on_lines()

    @property
    def is_followed(self) -> bool:
        """Whether lines are to be sent while the job runs."""
        return monotonic() < self._followed_until and self._sent < FOLLOWED_BYTES

    def take(self) -> list[StoredLine]:
        """Return the lines that were not taken yet; a first one tells how many were dropped."""
        with self._lock:
            lines, dropped = list(self._lines), self._dropped
            self._sent += self._bytes
            self._lines.clear()
            self._bytes = self._dropped = 0
        if dropped and lines:
            lines.insert(0, (lines[0][0], "INFO", "conveyor", f"{dropped:,} earlier lines were dropped"))
        return lines
