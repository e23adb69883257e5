"""Runs the jobs of one worker: coroutines on the event loop, functions on threads, the rest in processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Any

from conveyor.jobs.context import CURRENT, Context
from conveyor.jobs.dependencies import WorkerScope
from conveyor.payload import failures
from conveyor.worker.attempt import PLAIN_ENVELOPE, Attempt, OnFinished
from conveyor.worker.crash_attribution import IN_PROCESS, LOOP_CELL, RunningTable, id_checksum
from conveyor.worker.execution.batches import BatchAttempt, BatchGatherer, End
from conveyor.worker.execution.coroutines import CoroutinePool
from conveyor.worker.execution.forked_copies import ForkGuard
from conveyor.worker.execution.processes import ProcessPool
from conveyor.worker.execution.threads import ThreadPool
from conveyor.worker.job_loader import JobLoader
from conveyor.worker.leasing.timers import Deadlines

Chain = Callable[[Context, Callable[[], Awaitable[Any]]], Coroutine[Any, Any, Any]]

log = logging.getLogger("conveyor.worker")
AFTER_TIMEOUT = 5.0
"""Seconds that a coroutine may take to end after its time limit, or a thread before the child is replaced."""

_ASK_EVERY = 0.1
"""Seconds after which middleware is asked again whether it skips jobs without headers."""

UNSTARTED = float("inf")
"""The time limit of a job that waits for a thread: it counts from its start there."""


class Executor:
    """Runs attempts and reports each end exactly once to *on_finished*."""

    def __init__(
        self, *, concurrency: int, threads: int, processes: ProcessPool, on_finished: OnFinished,
        on_stuck: Callable[[Attempt], None], on_batch: Callable[[list[End]], None], kinds: set[str], loader: JobLoader,
        chain: Chain | None = None, skips: Callable[[Mapping[str, str]], bool] | None = None,
        running_table: RunningTable | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            concurrency: how many attempts run at once.
            threads: how many of them on threads.
            processes: runs those of `run_in="process"`.
            on_finished: called at the end of each attempt.
            on_stuck: called with an attempt whose thread goes on beyond its time limit.
            on_batch: called with the ends of the jobs of a batch.
            kinds: how the app's tasks run ("loop", "thread", "process").
            loader: opens sealed bodies.
            chain: calls the middlewares around a job; None without any.
            skips: tells by the headers of a job whether none of them would do anything; None: one of them always may.
            running_table: where a supervisor reads which jobs run; None without one.
        """
        self.concurrency = concurrency
        self._kinds = kinds
        self._loader = loader
        self._on_finished, self._on_stuck, self._chain = on_finished, on_stuck, chain
        self._skips = skips
        self._is_plain_skipped = False  # what it said of a job without headers, until it is asked again
        self._ask_at = 0.0
        self._on_batch = on_batch
        self.gatherer: BatchGatherer | None = None
        """Gathers jobs of batch tasks; None until the first of them."""
        self._is_draining = False
        self._base = copy_context()
        self._loop = asyncio.get_running_loop()
        self.fork_guard = ForkGuard(self._loop)
        self.coroutines = CoroutinePool(
            concurrency, self._begin, self._watch_limit, self._finish, self.fork_guard, running_table
        )
        self._running_table = running_table
        self._in_processes: dict[Attempt, int] = {}  # the cells
        self.threads = ThreadPool(threads, self._thread_ended, self._watch_limit, self.fork_guard, running_table)
        self._waiters = 0  # attempts on a thread while their coroutine waits for them inside the middlewares
        self.processes = processes
        self.deadlines = Deadlines(self._loop, self._expire)
        self._worker_scope = WorkerScope(offload=True)
        self._direct = 0  # attempts that run beside the coroutine pool: in processes

    # -- room -----------------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """The number of attempts that have started and not ended, or wait for a thread."""
        return self.coroutines.running + self.threads.running + self._direct - self._waiters

    @property
    def free(self) -> int:
        """
        The number of jobs that could start now, of the kind that has the least room.

        The kind of a job is known only when it is leased. One that cannot start would be kept from other workers.
        """
        free = self.concurrency - self.running - len(self.coroutines.backlog) - len(self._loader.fetching)
        if "thread" in self._kinds:
            free = min(free, self.threads.limit - self.threads.running)
        if "process" in self._kinds:
            free = min(free, self.processes.limit - self._direct)
        return free

    @property
    def slots(self) -> int:
        """The number of jobs that could start if none ran, of the kind that has the least room."""
        slots = self.concurrency
        if "thread" in self._kinds:
            slots = min(slots, self.threads.limit)
        if "process" in self._kinds:
            slots = min(slots, self.processes.limit)
        return slots

    def submit(self, attempts: list[Attempt]) -> None:
        """Run *attempts* in their order."""
        backlog = self.coroutines.backlog
        before, cells = len(backlog), None if self._running_table is None else self._running_table.cells
        for attempt in attempts:
            if attempt.sealed:
                self._loader.begin(attempt, lambda opened: self.submit([opened]), self._finish)
                continue
            kind = attempt.handler.kind
            if kind == "loop":
                backlog.append(attempt)
            elif kind == "batch":
                self._gather(attempt)
            elif self._chain is not None and not self._is_skipped(attempt):
                backlog.append(attempt)
            elif kind == "thread":
                self._start_on_thread(attempt)
            else:
                self._start_in_process(attempt)
        if cells is not None:
            cells[LOOP_CELL] = 0
        if len(backlog) > before:
            self.coroutines.wake()

    def submit_next(self, attempt: Attempt) -> None:
        """Run *attempt* after one that has just ended: the task that ran a coroutine takes it without being woken."""
        kind, ending = attempt.handler.kind, self.coroutines.is_serving_here
        if ending and not attempt.sealed and (kind == "loop" or (kind != "batch" and self._chain is not None)):
            self.coroutines.backlog.append(attempt)
        else:
            self.submit([attempt])

    def _gather(self, attempt: Attempt) -> None:
        if self.gatherer is None:
            self.gatherer = BatchGatherer(self, self._on_batch, self._running_table, is_draining=self._is_draining)
            self._on_finished = self._batch_aware(self.gatherer, self._on_finished)
        self.gatherer.add(attempt)

    def drain(self) -> None:
        """Let no job wait for others that fill its batch, at a stop; an early ack may come back after it."""
        self._is_draining = True
        if self.gatherer is not None:
            self.gatherer.drain()

    @staticmethod
    def _batch_aware(gatherer: BatchGatherer, on_finished: OnFinished) -> OnFinished:
        """Return what is called at an end of an attempt where some are batches: a worker without any does not ask."""

        def finished(attempt: Attempt, value: Any, error: BaseException | None) -> None:
            if isinstance(attempt, BatchAttempt):
                gatherer.finish(attempt, value, error)
            else:
                on_finished(attempt, value, error)

        return finished

    def take_back(self, attempt: Attempt) -> bool:
        """Keep an attempt that waits from starting; False when a thread has claimed it, so that it starts."""
        if attempt.handler.kind == "batch":
            return self.gatherer is None or self.gatherer.take_back(attempt)
        if attempt.unclaimed is not None:
            return self.threads.take_back(attempt)
        if attempt in self.coroutines.backlog:
            self.coroutines.backlog.remove(attempt)
            attempt.consumer.on_abandoned()
        return True

    # -- beginning ------------------------------------------------------------------------------------------------

    def _begin(self, attempt: Attempt) -> tuple[Variables, Coroutine[Any, Any, Any]]:
        if attempt.envelope.expires_ms is not None and attempt.expire():
            attempt.consumer.on_abandoned()
            raise asyncio.CancelledError
        attempt.consumer.on_started(attempt)
        variables = self._base.copy()
        handler = attempt.handler
        variables.run(CURRENT.set, attempt)
        # Of others than coroutines `submit` has asked. A plain job costs no call: two for each would be a hundredth of what its
        # worker and the server spend on it.
        if self._chain is not None:
            is_told = attempt.envelope is PLAIN_ENVELOPE and attempt.started < self._ask_at
            if handler.kind != "loop" or not (self._is_plain_skipped if is_told else self._is_skipped(attempt)):
                return variables, self._chain(attempt.open(), partial(self._call, attempt))
        args, kwargs = handler.decode(attempt.body)
        function = self._filled(attempt) if handler.fills else handler.function
        return variables, variables.run(function, *args, **kwargs)

    def _is_skipped(self, attempt: Attempt) -> bool:
        """Tell whether no middleware would do anything around an attempt; of jobs without headers it is asked now and then."""
        if self._skips is None:
            return False
        if headers := attempt.envelope.extra.headers:
            return self._skips(headers)
        now = perf_counter()
        if now >= self._ask_at:
            self._ask_at, self._is_plain_skipped = now + _ASK_EVERY, self._skips(headers)
        return self._is_plain_skipped

    async def _call(self, attempt: Attempt) -> Any:
        """Run the function itself, inside all middlewares."""
        handler = attempt.handler
        if handler.kind == "process":
            return await self._run_in_process(attempt)
        args, kwargs = handler.decode(attempt.body)
        function = self._filled(attempt) if handler.fills else handler.function
        if handler.kind == "loop":
            return await function(*args, **kwargs)
        if attempt.stop_reason is not None:  # a middleware kept the cancellation to itself
            raise asyncio.CancelledError
        attempt.waiter = self._loop.create_future()
        self._waiters += 1
        checksum = 0 if self._running_table is None else id_checksum(attempt.id)
        self.threads.submit(attempt, copy_context(), partial(function, *args, **kwargs), checksum)
        try:
            return await attempt.waiter
        finally:
            self._waiters -= 1
            attempt.waiter = None

    def _thread_ended(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        """Pass the result of a thread to the middlewares that wait for it, or end the attempt with it."""
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

    def _filled(self, attempt: Attempt) -> Callable[..., Any]:
        """Return the function of an attempt as it is called with the stored arguments alone."""
        handler, injection = attempt.handler, attempt.handler.task.injection
        assert injection is not None
        block = None if handler.kind == "loop" else self._block
        return injection.around(handler.function, attempt.open, self._worker_scope, block)

    def _block(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the event loop while a thread waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _start_on_thread(self, attempt: Attempt) -> None:
        attempt.consumer.on_started(attempt)
        checksum = 0
        if self._running_table is not None:
            # From here on: validators are code of the job, too.
            self._running_table.cells[LOOP_CELL] = checksum = id_checksum(attempt.id)
        try:
            args, kwargs = attempt.handler.decode(attempt.body)
        except Exception as error:
            attempt.started = perf_counter()
            self._loop.call_soon(self._finish, attempt, None, error)
            return
        function = self._filled(attempt) if attempt.handler.fills else attempt.handler.function
        variables = self._base.copy()
        variables.run(CURRENT.set, attempt)
        if attempt.timeout is not None:
            attempt.deadline = UNSTARTED
        self.threads.submit(attempt, variables, partial(function, *args, **kwargs), checksum)

    def _start_in_process(self, attempt: Attempt) -> None:
        attempt.consumer.on_started(attempt)
        attempt.started = perf_counter()
        self._direct += 1
        attempt.runner = self._loop.create_task(self._await_process(attempt))

    async def _await_process(self, attempt: Attempt) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = await self._run_in_process(attempt)
        except BaseException as raised:
            error = raised
        attempt.runner = None
        self._direct -= 1
        self._finish(attempt, value, error)

    async def _run_in_process(self, attempt: Attempt) -> Any:
        """Run it in a process, and note it in the table while it is held: a crash counts also if this process dies first."""
        if self._running_table is not None:
            for one in [one for one in self._in_processes if not one.consumer.holds(one)]:
                self._running_table.release_cell(self._in_processes.pop(one))
                if isinstance(one, BatchAttempt) and self.gatherer is not None:
                    self.gatherer.release_cells(one)
            self._in_processes[attempt] = cell = self._running_table.take_cell()
            self._running_table.cells[cell] = id_checksum(attempt.id) | IN_PROCESS
        return await self.processes.run(attempt, self._on_process_ready)

    def _on_process_ready(self, attempt: Attempt) -> None:
        attempt.started = perf_counter()
        self._watch_limit(attempt)

    # -- time limits ----------------------------------------------------------------------------------------------

    def _watch_limit(self, attempt: Attempt) -> None:
        """Watch the time limit of a job that has started; of a coroutine when it suspends, since before it could not be stopped."""
        limit = attempt.timeout
        moved = attempt.deadline is not None and attempt.deadline != UNSTARTED  # the job has set its own already
        if limit is not None and attempt.ended == 0.0 and not moved:
            attempt.deadline = attempt.started + limit
            self.deadlines.add(attempt)

    def _expire(self, attempt: Attempt) -> None:
        if attempt.stop_reason is None:
            self.stop(attempt, "timeout")
            if isinstance(attempt, BatchAttempt):
                attempt.time_out()  # at once: its items may be settled before it ends
        elif attempt.runner is None or attempt.waiter is not None:
            self._on_stuck(attempt)
            return
        else:
            # It ignored its cancellation: cancel it again, for as long as it takes.
            attempt.runner.cancel()
        attempt.deadline = perf_counter() + AFTER_TIMEOUT
        self.deadlines.add(attempt)

    def stop(self, attempt: Attempt, why: str) -> None:
        """
        Stop an attempt.

        One that has not started is settled at once, a coroutine or process is cancelled, a thread learns it through its
        context. A thread may claim an attempt until the moment when this takes it back.
        """
        if attempt.ended != 0.0 or attempt.stop_reason is not None:
            return
        attempt.stop_reason = why
        if attempt.started == 0.0 and self.take_back(attempt):
            self._finish(attempt, None, None)
        elif attempt.waiter is not None:
            self.threads.take_back(attempt)  # the thread that reaches it tells the middlewares
        elif attempt.runner is not None:
            attempt.runner.cancel()
        elif attempt.handler.kind == "batch" and self.gatherer is not None:
            self.gatherer.on_stopped(attempt, why)
        if attempt.context is not None:
            attempt.flag_context()

    # -- ends -----------------------------------------------------------------------------------------------------

    def _finish(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        if attempt.ended == 0.0:
            attempt.ended = perf_counter()
            self._on_finished(attempt, value, None if error is None else failures.safe_exception(error))

    async def close(self) -> None:
        """End coroutines, threads and processes."""
        self.deadlines.close()
        await self.coroutines.close()
        self.threads.close()
        await self.processes.close()
        await self._worker_scope.close()
        self.fork_guard.close()
