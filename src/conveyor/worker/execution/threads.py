"""
Runs plain functions on threads that take from one queue and report in batches.

That makes a million hand-overs a second, against 15,000 through `run_in_executor`. Threads are daemons, so one that is
stuck cannot delay a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context as Variables
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from conveyor.worker.attempt import Attempt, OnFinished
from conveyor.worker.crash_attribution import EXECUTING, LOOP_CELL, OVERFLOW_CELL, RunningTable
from conveyor.worker.execution.forked_copies import ForkGuard

Work = tuple[Attempt, Variables, int]


class ThreadPool:
    """Up to *limit* functions at once. All methods belong to the event loop's thread."""

    def __init__(
        self, limit: int, on_finished: OnFinished, on_started: Callable[[Attempt], None], fork_guard: ForkGuard,
        running_table: RunningTable | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            limit: how many threads.
            on_finished: called on the loop when a function ends.
            on_started: called on the loop when one starts that has a time limit.
            fork_guard: ends the copies of the process that a job makes.
            running_table: where a supervisor reads which jobs run; None without one.
        """
        self.limit = limit
        self.running = 0
        self._on_finished, self._on_started = on_finished, on_started
        self._fork_guard, self._running_table = fork_guard, running_table
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self.ended: deque[tuple[Attempt, Any, BaseException | None, int]] = deque()
        """Functions that have ended, with value, error and checksum of the id, and whose ends are reported next."""
        self._signalled = False
        self._alive = 0
        self._abandoned: set[Attempt] = set()
        self._loop = asyncio.get_running_loop()

    def submit(self, attempt: Attempt, variables: Variables, call: Callable[[], Any], checksum: int) -> None:
        """Run *call* on a thread, in *variables*; *checksum* stands for its job in the running table."""
        self.running += 1
        attempt.unclaimed = [call]
        self._queue.put((attempt, variables, checksum))
        if self._alive < min(self.limit, self.running):
            self._spawn()

    def take_back(self, attempt: Attempt) -> bool:
        """Keep an attempt that was submitted from starting; False when a thread has claimed it."""
        assert attempt.unclaimed is not None
        try:
            attempt.unclaimed.pop()
        except IndexError:
            return False
        return True

    def replace(self, attempt: Attempt) -> None:
        """Start another thread in place of one whose attempt does not end."""
        self._abandoned.add(attempt)
        self.running -= 1
        self._alive -= 1
        if self.running > self._alive:
            self._spawn()

    def close(self) -> None:
        """End idle threads now, and busy ones after their job."""
        for _ in range(self._alive):
            self._queue.put(None)

    def _spawn(self) -> None:
        self._alive += 1
        cell = 0 if self._running_table is None else self._running_table.take_cell()
        threading.Thread(target=self._serve, args=(cell,), name=f"conveyor-thread-{self._alive}", daemon=True).start()

    def _serve(self, cell: int) -> None:
        guard, cells = self._fork_guard, None if self._running_table is None else self._running_table.cells
        while (work := self._queue.get()) is not None:
            attempt, variables, checksum = work
            assert attempt.unclaimed is not None
            try:
                call = attempt.unclaimed.pop()  # one step for all threads: the loop cannot take it back as well
            except IndexError:
                self._report(attempt, None, asyncio.CancelledError(), checksum)
                continue
            if attempt.expire():
                self._report(attempt, None, asyncio.CancelledError(), checksum)
                continue
            attempt.started = perf_counter()
            if attempt.deadline is not None:
                self._loop.call_soon_threadsafe(self._on_started, attempt)
            value: Any = None
            error: BaseException | None = None
            if cells is not None:
                cells[cell] = checksum | EXECUTING
            try:
                value = variables.run(call)
            except BaseException as raised:
                error = raised
            if guard.is_copy:
                guard.end(error)
            self._report(attempt, value, error, checksum)
            if cells is not None and cell != OVERFLOW_CELL:
                cells[cell] = 0

    def _report(self, attempt: Attempt, value: Any, error: BaseException | None, checksum: int) -> None:
        self.ended.append((attempt, value, error, checksum))
        if not self._signalled:
            self._signalled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
                self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._signalled = False  # before taking: what is appended from now on signals again
        ended, cells = self.ended, None if self._running_table is None else self._running_table.cells
        while ended:
            attempt, value, error, checksum = ended.popleft()
            if cells is not None:
                cells[LOOP_CELL] = checksum  # what it returned is encoded in there
            if attempt in self._abandoned:
                self._abandoned.discard(attempt)
            else:
                self.running -= 1
            self._on_finished(attempt, value, error)
        if cells is not None:
            cells[LOOP_CELL] = 0
