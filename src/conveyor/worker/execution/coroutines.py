"""
Runs coroutines in a pool of long-lived tasks.

A task runs one job after the other, so `current_task()`, timeouts and cancellation work as usual, and no task is created
per job (6 µs). Each job runs in a context of its own. A job that never suspends costs no pass of the event loop; when
one suspends, the next task is woken if more jobs wait.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context as Variables
from functools import partial
from time import perf_counter
from typing import Any

from conveyor.worker.attempt import Attempt, OnFinished
from conveyor.worker.crash_attribution import LOOP_CELL, OVERFLOW_CELL, RunningTable, id_checksum
from conveyor.worker.execution.forked_copies import ForkGuard

SLICE = 0.005
"""
Seconds for which jobs that never suspend may run before the event loop gets a pass: what was finished leaves in one
batch.
"""

Begin = Callable[[Attempt], tuple[Variables, Coroutine[Any, Any, Any]]]
OnSuspended = Callable[[Attempt], None]


class CoroutinePool:
    """Up to *limit* coroutines at once, taken in order from `backlog`."""

    def __init__(
        self, limit: int, begin: Begin, on_suspended: OnSuspended, on_finished: OnFinished,
        fork_guard: ForkGuard, running_table: RunningTable | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            limit: how many coroutines at once.
            begin: returns the context and the coroutine of an attempt.
            on_suspended: called when an attempt suspends for the first time.
            on_finished: called at the end of an attempt.
            fork_guard: ends the copies of the process that a job makes.
            running_table: where a supervisor reads which jobs run; None without one.
        """
        self.backlog: deque[Attempt] = deque()
        self.running = 0
        self.current: Attempt | None = None
        """The attempt whose code the event loop runs now."""
        self._limit = limit
        self._begin, self._on_suspended, self._on_finished = begin, on_suspended, on_finished
        self._fork_guard, self._running_table = fork_guard, running_table
        self._idle: list[asyncio.Future[None]] = []
        self._tasks = fork_guard.checked
        self._loop = asyncio.get_running_loop()
        self._slice_end = 0.0
        self._is_closing = False

    @property
    def is_serving_here(self) -> bool:
        """True in a task of the pool, which looks into the backlog when its attempt has ended."""
        return asyncio.current_task() in self._tasks

    def wake(self) -> None:
        """Wake an idle task, or start one, to take from the backlog."""
        while self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                return
        if len(self._tasks) < self._limit:
            cell = 0 if self._running_table is None else self._running_table.take_cell()
            task = self._loop.create_task(self._serve(cell), name=f"conveyor-coroutine-{len(self._tasks)}")
            self._tasks.add(task)
            task.add_done_callback(partial(self._on_task_end, cell))

    def _on_task_end(self, cell: int, task: asyncio.Task[None]) -> None:
        """Let another task go on with the backlog when this one was cancelled by a job."""
        self._tasks.discard(task)
        if self._running_table is not None:
            self._running_table.release_cell(cell)
            self._running_table.cells[LOOP_CELL] = 0
        if self.backlog and not self._is_closing:
            self.wake()

    async def close(self) -> None:
        """End all tasks; what still runs is cancelled."""
        self._is_closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, cell: int) -> None:
        backlog, guard, me = self.backlog, self._fork_guard, asyncio.current_task()
        assert me is not None
        cells = None if self._running_table is None else self._running_table.cells
        checksum, is_shown = 0, False
        while True:
            if not backlog:
                if cells is not None:
                    cells[LOOP_CELL] = 0  # not after each job: the next one overwrites it
                await self._until_woken()
                continue
            now = perf_counter()
            if now > self._slice_end and self._slice_is_over(now):
                await asyncio.sleep(0)
                continue
            attempt = backlog.popleft()
            attempt.started, attempt.runner = now, me
            self.current = attempt
            self.running += 1
            if cells is not None:
                cells[LOOP_CELL] = checksum = id_checksum(attempt.id)
            value: Any = None
            error: BaseException | None = None
            try:
                variables, coroutine = self._begin(attempt)
                try:
                    waited_on = variables.run(coroutine.send, None)
                except StopIteration as stop:
                    value = stop.value
                else:
                    if guard.is_copy:
                        guard.end_on_loop()
                    self.current = None
                    if cells is not None:
                        cells[cell], is_shown = checksum, True
                        cells[LOOP_CELL] = 0
                    self._on_suspended(attempt)
                    if backlog:
                        self.wake()
                    value = await _resume(coroutine, variables, waited_on, guard, cells, checksum)
            except BaseException as raised:
                # By its type: what a job raises may lie about its class.
                if (
                    self._is_closing
                    and issubclass(type(raised), asyncio.CancelledError)
                    and attempt.stop_reason is None
                ):
                    self.running -= 1
                    raise
                error = raised
            if guard.is_copy:
                guard.end(error)
            if is_shown and cells is not None and cell != OVERFLOW_CELL:
                cells[cell], is_shown = 0, False
            self.current = attempt.runner = None
            self.running -= 1
            self._on_finished(attempt, value, error)
            if me.cancelling():
                return  # the request may still be under way, and would hit the next job

    def _until_woken(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._idle.append(future)
        return future

    def _slice_is_over(self, now: float) -> bool:
        """Tell whether the time slice is over and the event loop must get a pass; otherwise begin another slice."""
        if self._slice_end:
            self._slice_end = 0.0
            if self._running_table is not None:
                self._running_table.cells[LOOP_CELL] = 0
            return True
        self._slice_end = now + SLICE
        self._loop.call_soon(self._end_slice)
        return False

    def _end_slice(self) -> None:
        self._slice_end = 0.0


@types.coroutine
def _resume(
    coroutine: Coroutine[Any, Any, Any], variables: Variables, waited_on: Any, guard: ForkGuard, cells: memoryview | None,
    checksum: int,
) -> Generator[Any, Any, Any]:  # fmt: skip
    """Run a coroutine that has suspended to its end, each step in its own context, and note when its code is executed."""
    while True:
        try:
            sent = yield waited_on
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            step: Callable[..., Any] = coroutine.throw
            argument: Any = error
        else:
            step, argument = coroutine.send, sent
        if guard.is_copy:
            guard.end_on_loop()  # made by another job of this loop
        if cells is not None:
            cells[LOOP_CELL] = checksum
        try:
            waited_on = variables.run(step, argument)
        except StopIteration as stop:
            return stop.value
        if guard.is_copy:
            guard.end_on_loop()
        if cells is not None:
            cells[LOOP_CELL] = 0


RESUME_CODE = _resume.__code__
"""The code whose frames hold a job's coroutine that has suspended."""
