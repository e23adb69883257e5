"""Timers of a worker, for the time limits of running jobs and for the next scheduled job of a queue; and runs in the background."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from heapq import heappop, heappush
from time import monotonic, perf_counter

from conveyor.worker.attempt import Attempt


class BackgroundRun:
    """Work that is begun when it is asked for, one run at a time. While nobody asks, nothing runs."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """True while a run is under way."""
        return self._task is not None

    def _begin(self) -> None:
        """Begin a run, unless one is under way, which then sees what is asked for."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def finish(self, seconds: float) -> None:
        """Wait up to *seconds* for what is under way. Any worker of the queue does what is left."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            await self._work()
        finally:
            self._task = None

    async def _work(self) -> None:
        raise NotImplementedError


class Deadlines:
    """
    The deadlines of all running attempts, in one heap.

    Calls `on_expired` with each attempt whose deadline has passed. Entries of finished attempts fall out by themselves.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[Attempt], None]) -> None:
        # One timer for all: a timer per job costs 16 µs, an entry in the heap less than one.
        self._loop = loop
        self._on_expired = on_expired
        self._heap: list[tuple[float, int, Attempt]] = []
        self._order = 0
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0

    def add(self, attempt: Attempt) -> None:
        """Watch *attempt* until its `deadline`."""
        assert attempt.deadline is not None
        self._order += 1
        heappush(self._heap, (attempt.deadline, self._order, attempt))
        if self._timer is None or attempt.deadline < self._next:
            self._arm(attempt.deadline)

    def move(self, attempt: Attempt, seconds: float) -> None:
        """Set the deadline of *attempt* that many seconds ahead; from any thread."""
        attempt.deadline = perf_counter() + seconds
        self._loop.call_soon_threadsafe(self.add, attempt)

    def close(self) -> None:
        """Drop all deadlines."""
        if self._timer is not None:
            self._timer.cancel()
        self._heap.clear()

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = at
        self._timer = self._loop.call_later(max(0.0, at - perf_counter()), self._on_due)

    def _on_due(self) -> None:
        self._timer = None
        now = perf_counter()
        while self._heap and self._heap[0][0] <= now:
            _, _, attempt = heappop(self._heap)
            if attempt.ended == 0.0 and attempt.deadline is not None and attempt.deadline <= now:
                self._on_expired(attempt)
        while self._heap and self._heap[0][2].ended != 0.0:
            heappop(self._heap)
        if self._heap:
            self._arm(self._heap[0][0])


class DueTimer:
    """A timer for the next due job of a queue. All workers set it, and one of them gets the job."""

    def __init__(self, on_due: Callable[[], None]) -> None:
        self._on_due = on_due
        self._timer: asyncio.TimerHandle | None = None
        self._due_ms: int | None = None
        self._has_fired = False
        self._yields_until = 0.0

    @property
    def is_set(self) -> bool:
        """True when a job is scheduled, as far as this worker knows."""
        return self._due_ms is not None

    def watch(self, next_due: int | None, now: int, *, missed: bool = False) -> None:
        """
        Set the timer to when the first job is due.

        Args:
            next_due: in ms by the server's clock; None when nothing is scheduled.
            now: the server's time in ms.
            missed: whether the turn that told it had room for work and got none.
        """
        was_late, self._has_fired = missed and self._has_fired, False
        if next_due is None:
            self._due_ms = None
            return
        if self._timer is not None:
            self._timer.cancel()
        late = 0.0
        if self._due_ms is not None and next_due > self._due_ms and was_late:
            # Another worker was quicker: look a little later, until this one gets a job. One that was called is on time, since it
            # may be called in the place of a worker that has died.
            late = random.uniform(0.02, 0.08)  # noqa: S311  no secret
        if monotonic() < self._yields_until:
            late = random.uniform(0.1, 0.2)  # noqa: S311
        self._due_ms = next_due
        pause = max(0.001, (next_due - now) / 1000 + 0.001 + late)
        self._timer = asyncio.get_running_loop().call_later(min(pause, 3600.0), self._fire)

    def give_way(self, seconds: float) -> None:
        """Let other workers be first for so many seconds: what comes due then are jobs that this one cannot run."""
        self._yields_until = max(self._yields_until, monotonic() + seconds)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer, self._has_fired = None, True
        self._on_due()
