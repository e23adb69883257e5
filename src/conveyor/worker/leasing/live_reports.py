"""When what running jobs say of themselves is written: at once, and then at most four times a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from conveyor.worker.attempt import Attempt

PERIOD = 0.25
"""Seconds between two reports of a queue, at least. Each report has all jobs of the queue that said something new."""


class LiveReports:
    """Gathers the attempts of one queue that said something new, and hands them on."""

    def __init__(self, on_due: Callable[[list[Attempt]], None]) -> None:
        """*on_due*, called on the event loop, gets the attempts whose news are to be written now."""
        self._on_due = on_due
        self._loop = asyncio.get_running_loop()
        self._changed: dict[Attempt, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0

    def note(self, attempt: Attempt) -> None:
        """Note that an attempt said something new; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: a thread of a job outlives its worker
            self._loop.call_soon_threadsafe(self._gather, attempt)

    def _gather(self, attempt: Attempt) -> None:
        self._changed[attempt] = None
        if self._timer is None:
            self._timer = self._loop.call_later(max(0.0, self._sent_at + PERIOD - monotonic()), self._send)

    def _send(self) -> None:
        self._timer, self._sent_at = None, monotonic()
        changed, self._changed = self._changed, {}
        self._on_due(list(changed))

    def close(self) -> None:
        """Report nothing more."""
        if self._timer is not None:
            self._timer.cancel()
