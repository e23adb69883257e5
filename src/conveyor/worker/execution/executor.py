"""What runs jobs inside one child: slots for coroutines, threads for functions, processes for the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Any

from conveyor.jobs.context import CURRENT, Context
from conveyor.payload import failures
from conveyor.worker.attempt import Attempt
from conveyor.worker.crash_attribution import BESIDE, LOOP, RunningTable, named
from conveyor.worker.execution.coroutines import CoroutinePool
from conveyor.worker.execution.processes import ProcessPool
from conveyor.worker.execution.threads import ThreadPool
from conveyor.worker.job_loader import JobLoader
from conveyor.worker.leasing.timers import Deadlines

Chain = Callable[[Context, Callable[[], Awaitable[Any]]], Coroutine[Any, Any, Any]]

log = logging.getLogger("conveyor.worker")
AFTER_TIMEOUT = 5.0
"""Seconds a coroutine may take to end after its time limit, or a thread before the child is recycled."""

UNSTARTED = float("inf")
"""The time limit of a job that waits for a thread: it counts from its start there."""

Ended = Callable[[Attempt, Any, BaseException | None], None]


class Executor:
    """Runs attempts and reports each end exactly once to *ended*."""

    def __init__(
        self, *, concurrency: int, threads: int, processes: ProcessPool, ended: Ended, stuck: Callable[[Attempt], None],
        kinds: set[str], unusual: JobLoader, chain: Chain | None = None, seats: RunningTable | None = None,
    ) -> None:  # fmt: skip
        """
        Take the limits, what to do with an end, what to do with a thread that outlives its limit,
        how the app's tasks run (loop, thread, process), who opens what is wrapped, its middlewares, and where a
        supervisor sees what runs.
        """
        self.concurrency = concurrency
        self._kinds = kinds
        self._unusual = unusual
        self._ended, self._stuck, self._chain = ended, stuck, chain
        self._base = copy_context()
        self._loop = asyncio.get_running_loop()
        self.slots = CoroutinePool(concurrency, self._begin, self._suspended, self._finish, seats)
        self._seats = seats
        self._beside: dict[Attempt, int] = {}
        self.threads = ThreadPool(threads, self._thread_ended, self._watch, seats)
        self._waiters = 0  # attempts on a thread whose slot waits for them inside the middlewares
        self.processes = processes
        self.deadlines = Deadlines(self._loop, self._expire)
        self._direct = 0  # attempts that run beside the slots: threads through middlewares, processes

    # -- room -----------------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """How many attempts have begun and not ended, and those that wait for a thread."""
        return self.slots.running + self.threads.running + self._direct - self._waiters

    @property
    def free(self) -> int:
        """
        How many more could begin right now, of the kind that has the least room.

        What a job is shows only when it is leased; one that cannot begin would be held back from other workers.
        """
        free = self.concurrency - self.running - len(self.slots.backlog) - self._unusual.fetching
        if "thread" in self._kinds:
            free = min(free, self.threads.limit - self.threads.running)
        if "process" in self._kinds:
            free = min(free, self.processes.limit - self._direct)
        return free

    def submit(self, attempts: list[Attempt]) -> None:
        """Run them, in their order."""
        backlog = self.slots.backlog
        before, cells = len(backlog), None if self._seats is None else self._seats.cells
        for attempt in attempts:
            if attempt.closed:
                self._unusual.begin(attempt, lambda opened: self.submit([opened]), self._finish)
                continue
            kind = attempt.handler.kind
            if kind == "loop" or self._chain is not None:
                backlog.append(attempt)
            elif kind == "thread":
                self._thread(attempt)
            else:
                self._process(attempt)
        if cells is not None:
            cells[LOOP] = 0
        if len(backlog) > before:
            self.slots.wake()

    def take_back(self, attempt: Attempt) -> None:
        """Forget an attempt that has not begun; a thread that reaches it passes it over."""
        if attempt in self.slots.backlog:
            self.slots.backlog.remove(attempt)
            attempt.consumer.left()

    # -- beginning ------------------------------------------------------------------------------------------------

    def _begin(self, attempt: Attempt) -> tuple[Variables, Coroutine[Any, Any, Any]]:
        attempt.consumer.begun(attempt)
        variables = self._base.copy()
        handler = attempt.handler
        attempt.runner = asyncio.current_task()
        variables.run(CURRENT.set, attempt)
        if self._chain is not None:
            return variables, self._chain(attempt.open(), partial(self._call, attempt))
        args, kwargs = handler.decode(attempt.body)
        if handler.injected:
            self._inject(attempt, kwargs)
        return variables, variables.run(handler.function, *args, **kwargs)

    async def _call(self, attempt: Attempt) -> Any:
        """Run the function itself, at the inner end of the middlewares."""
        handler = attempt.handler
        if handler.kind == "process":
            return await self._run_beside(attempt)
        args, kwargs = handler.decode(attempt.body)
        if handler.injected:
            self._inject(attempt, kwargs)
        if handler.kind == "loop":
            return await handler.function(*args, **kwargs)
        attempt.waiter = self._loop.create_future()
        self._waiters += 1
        called = 0 if self._seats is None else named(attempt.id)
        self.threads.submit(attempt, copy_context(), partial(handler.function, *args, **kwargs), called)
        try:
            return await attempt.waiter
        finally:
            self._waiters -= 1
            attempt.waiter = None

    def _thread_ended(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        """Take what came back from a thread: to the middlewares that wait for it, or as the end of the attempt."""
        waiter = attempt.waiter
        error = None if error is None else failures.safe_exception(error)
        if waiter is None:
            self._finish(attempt, value, error)
        elif waiter.done():
            return
        elif error is None:
            waiter.set_result(value)
        elif isinstance(error, asyncio.CancelledError):
            waiter.cancel()
        else:
            waiter.set_exception(error if not isinstance(error, StopIteration) else RuntimeError(repr(error)))

    def _inject(self, attempt: Attempt, kwargs: dict[str, Any]) -> None:
        for name in attempt.handler.injected:
            kwargs[name] = attempt.open()

    def _thread(self, attempt: Attempt) -> None:
        attempt.consumer.begun(attempt)
        called = 0
        if self._seats is not None:
            self._seats.cells[LOOP] = called = named(attempt.id)  # validators are code of the job's, too
        try:
            args, kwargs = attempt.handler.decode(attempt.body)
        except Exception as error:
            attempt.started = perf_counter()
            self._loop.call_soon(self._finish, attempt, None, error)
            return
        if attempt.handler.injected:
            self._inject(attempt, kwargs)
        variables = self._base.copy()
        variables.run(CURRENT.set, attempt)
        if attempt.timeout is not None:
            attempt.until = UNSTARTED
        self.threads.submit(attempt, variables, partial(attempt.handler.function, *args, **kwargs), called)

    def _process(self, attempt: Attempt) -> None:
        attempt.consumer.begun(attempt)
        attempt.started = perf_counter()
        self._direct += 1
        attempt.runner = self._loop.create_task(self._in_process(attempt))

    async def _in_process(self, attempt: Attempt) -> None:
        value: Any = None
        error: BaseException | None = None
        self._watch(attempt)
        try:
            value = await self._run_beside(attempt)
        except BaseException as raised:
            error = raised
        attempt.runner = None
        self._direct -= 1
        self._finish(attempt, value, error)

    async def _run_beside(self, attempt: Attempt) -> Any:
        """Run it in a process, and show it for as long as it is held: a crash counts also when we die before it is settled."""
        if self._seats is not None:
            for one in [one for one in self._beside if not one.consumer.holds(one)]:
                self._seats.leave(self._beside.pop(one))
            self._beside[attempt] = seat = self._seats.take()
            self._seats.cells[seat] = named(attempt.id) | BESIDE
        return await self.processes.run(attempt)

    # -- time limits ----------------------------------------------------------------------------------------------

    def _suspended(self, attempt: Attempt) -> None:
        """A job that never suspends needs no watch: nothing could stop it anyway."""
        self._watch(attempt)

    def _watch(self, attempt: Attempt) -> None:
        limit = attempt.timeout
        moved = attempt.until is not None and attempt.until != UNSTARTED  # the job has set its own already
        if limit is not None and attempt.ended == 0.0 and not moved:
            attempt.until = attempt.started + limit
            self.deadlines.add(attempt)

    def _expire(self, attempt: Attempt) -> None:
        if attempt.stopped is None:
            self.stop(attempt, "timeout")
        elif attempt.runner is None or attempt.waiter is not None:
            self._stuck(attempt)
            return
        else:
            # It swallowed its cancellation: ask again, for as long as it takes.
            attempt.runner.cancel()
        attempt.until = perf_counter() + AFTER_TIMEOUT
        self.deadlines.add(attempt)

    def stop(self, attempt: Attempt, why: str) -> None:
        """Stop an attempt: one that has not begun is settled at once, a coroutine or process is cancelled, a thread is told."""
        if attempt.ended != 0.0 or attempt.stopped is not None:
            return
        attempt.stopped = why
        if attempt.started == 0.0:
            self.take_back(attempt)
            self._finish(attempt, None, None)
        elif attempt.runner is not None and attempt.waiter is None:
            attempt.runner.cancel()
        if attempt.context is not None:
            attempt.flag()

    # -- ends -----------------------------------------------------------------------------------------------------

    def _finish(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        if attempt.ended == 0.0:
            attempt.ended = perf_counter()
            self._ended(attempt, value, None if error is None else failures.safe_exception(error))

    async def close(self) -> None:
        """End slots, threads and processes."""
        self.deadlines.close()
        await self.slots.close()
        self.threads.close()
        await self.processes.close()
