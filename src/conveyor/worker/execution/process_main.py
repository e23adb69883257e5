"""
The main module of a process for single jobs: it loads the app, then runs one job after the other, each alone.

``main()`` is called with the app's reference and the descriptor of a socket to the worker; standard input is a pipe
that only says, by its end, that the worker is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context as Variables
from contextvars import copy_context
from time import monotonic
from typing import Any

from conveyor.errors import UnknownTask
from conveyor.jobs.batch_task import ItemEnd, item_ends
from conveyor.jobs.context import CURRENT, Context, charges_of, end_spawning, spawned_entries
from conveyor.jobs.core import core_of
from conveyor.jobs.dependencies import WorkerScope
from conveyor.jobs.job_log import JobLog
from conveyor.jobs.live import LiveRecord
from conveyor.jobs.task import UNRUN, TaskDefinition, not_run
from conveyor.store.fork_safety import on_fork
from conveyor.units import instant
from conveyor.worker.app_loading import load
from conveyor.worker.execution.forked_copies import ForkGuard
from conveyor.worker.execution.process_protocol import (
    HEAD,
    BatchReply,
    DoneReply,
    EmitRequest,
    ExtendRequest,
    FailedReply,
    LiveReply,
    ReadyReply,
    Reply,
    Request,
    RunRequest,
    StartRequest,
    capture,
    pack,
    read_request,
)
from conveyor.worker.leasing.live_reports import PERIOD
from conveyor.worker.log_capture import keep_logs
from conveyor.worker.logs import configure_log
from conveyor.worker.recycling import RecycleLimits


def main() -> None:
    """Run jobs until the worker closes its end. The death of the worker ends this process group at once."""
    _end_with_worker()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Sent to all processes of a service at its stop; the worker decides how long this job may go on. A handler and
        # not SIG_IGN, which the programs that a job starts would inherit.
        signal.signal(number, lambda *_: None)
    connection = _ParentConnection(int(sys.argv[2]))
    start = connection.receive()
    if not isinstance(start, StartRequest):
        return
    sys.path[:] = start.path
    configure_log(verbose=start.verbose)
    keep_logs()
    runner = _Runner(connection)
    try:
        runner.open(start)
    except BaseException as error:
        connection.send(capture(error))
        return
    recycle_limits, jobs = RecycleLimits(start.max_jobs, start.max_memory), 0
    recycle_limits.begin()
    connection.send(ReadyReply())
    while isinstance(job := connection.receive(), RunRequest):
        reply = runner.run(job)
        runner.live_sender.finish()
        _flush()
        jobs += 1
        reply.worn = recycle_limits.used_up(jobs) or ""
        connection.send(reply)
    runner.close()


class _ParentConnection:
    """The connection to the worker: requests come in, replies go out. A copy that a job forks has none."""

    def __init__(self, descriptor: int) -> None:
        self._sending = threading.Lock()  # a timer and threads of the job tell what is new beside it
        self._socket: socket.socket | None = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._blocks = 0  # those of `whole` that the main thread is in
        self._postponed: BaseException | None = None
        on_fork(self)

    def forked(self) -> None:
        """Close the copy's end: what it sent would be taken for replies of this process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, message: Reply) -> None:
        if self._socket is None:
            return
        data = pack(message)
        with self._sending, self.whole():
            self._socket.sendall(data)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Enter a block of the main thread that no time limit cuts: behind half a message nothing can be read."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            self._blocks += 1
            yield
        finally:
            self._blocks -= 1
            if self._blocks == 0 and self._postponed is not None:
                error, self._postponed = self._postponed, None
                raise error

    def postpone(self, error: BaseException) -> bool:
        """Raise *error* behind the block of `whole` that the main thread is in; return False when it is in none."""
        if self._blocks:
            self._postponed = error
        return self._blocks > 0

    def receive(self) -> Request | None:
        head = self._exactly(HEAD.size)
        return read_request(self._exactly(HEAD.unpack(head)[0])) if head else None

    def _exactly(self, count: int) -> bytes:
        assert self._socket is not None, "a copy ends with its job"
        parts = []
        while count and (part := self._socket.recv(min(count, 1 << 20))):
            parts.append(part)
            count -= len(part)
        return b"" if count else b"".join(parts)


class _LiveSender:
    """Sends what a job of this process says of itself: at once, then at most every `PERIOD`, and the last before its end."""

    def __init__(self, connection: _ParentConnection) -> None:
        self._connection = connection
        self._told: dict[str, tuple[int, LiveRecord]] = {}  # the attempts that have said something, by their ids
        self._logs: dict[str, tuple[int, JobLog]] = {}  # likewise those that have logged something
        self._timer: threading.Timer | None = None
        self._sent_at = 0.0
        self._lock = threading.Lock()

    def record(self, job: RunRequest) -> LiveRecord:
        """Return what takes the news of a job."""
        live = LiveRecord(self._on_change, lambda: job.notes)
        self._told[job.id] = (job.attempt, live)
        return live

    def log(self, job: RunRequest) -> JobLog:
        """Return what takes the lines of a job, and sends them while it runs: its process may end without a word."""
        log = JobLog(self._on_change)
        log.follow(math.inf)
        self._logs[job.id] = (job.attempt, log)
        return log

    def _on_change(self) -> None:
        wait = self._sent_at + PERIOD - monotonic()
        if wait <= 0:
            self.send()
        elif self._timer is None:
            self._timer = threading.Timer(wait, self.send)
            self._timer.daemon = True
            self._timer.start()

    def send(self) -> None:
        """Send what is new."""
        # A limit that passes in between must not lose what is taken here to be sent: it is not new any more.
        with self._lock, self._connection.whole():
            self._timer, self._sent_at = None, monotonic()
            for id_, (attempt, live) in list(self._told.items()):
                if live.is_changed:
                    live.is_changed = False
                    progress = live.last_progress()
                    numbers = None if progress is None else (progress.done, progress.total, progress.text)
                    self._connection.send(LiveReply(id_, attempt, numbers, live.notes_json))
            for id_, (attempt, log) in list(self._logs.items()):
                if lines := log.take():
                    self._connection.send(LiveReply(id_, attempt, lines=lines))

    def finish(self) -> None:
        """Send the last news of the jobs that have ended."""
        if self._told or self._logs:
            for _, live in self._told.values():
                live.finish()
            self.send()
            self._told.clear()
            self._logs.clear()


class _TimeLimit:
    """
    The time limit of one job that raises in it, where another one kills its process.

    In a `def` a signal raises it, while the event loop runs the loop does: a signal would interrupt the loop itself. The
    clock decides and not the signal, which anything in the process may send.
    """

    def __init__(
        self, connection: _ParentConnection, loop: asyncio.AbstractEventLoop, ms: int | None, *, by_signal: bool
    ) -> None:
        """
        Args:
            connection: the one that its job sends through.
            loop: the one that runs its coroutines.
            ms: how long the job may run; None: no limit.
            by_signal: whether the job is a `def`.
        """
        self._connection, self._loop, self._by_signal = connection, loop, by_signal
        self._seconds = math.inf if ms is None else ms / 1000
        self._ends_at = math.inf  # monotonic
        self._timeout: asyncio.Timeout | None = None
        self._is_on = False
        self._arming = threading.Lock()  # any thread of the job may extend it, also beside its end

    def __enter__(self) -> None:
        if self._seconds < math.inf:
            self._is_on, self._ends_at = True, monotonic() + self._seconds
            if self._by_signal:
                signal.signal(signal.SIGALRM, self._on_signal)
                self.resume()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: no thread that the job has left can set it again, and so limit another job."""
        self._is_on = False
        if self._by_signal:
            with self._arming:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def resume(self) -> None:
        """Set the signal to what is left: while the event loop ran, none was heeded."""
        if self._is_on and self._by_signal:
            left = self._ends_at - monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0 if left == math.inf else max(left, 0.0001))

    async def await_call(self, call: Awaitable[Any]) -> Any:
        """Await a call while the event loop keeps the limit."""
        if self._ends_at == math.inf:
            return await call
        try:
            async with asyncio.timeout_at(self._loop.time() + self._ends_at - monotonic()) as self._timeout:
                return await call
        except TimeoutError:
            if self._timeout is not None and self._timeout.expired():
                raise self._expire() from None
            raise
        finally:
            self._timeout = None

    def extend(self, ms: int) -> None:
        """Move the limit *ms* ahead; the one that kills stays. From any thread of the job."""
        with self._arming:
            if not self._is_on:
                return  # its job has ended
            self._seconds = ms / 1000
            self._ends_at = monotonic() + self._seconds
            self.resume()
        self._loop.call_soon_threadsafe(self._reschedule)

    def _reschedule(self) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(self._loop.time() + self._ends_at - monotonic())

    def _on_signal(self, *_: object) -> None:
        if not self._is_on or self._loop.is_running():
            return
        if monotonic() < self._ends_at:
            self.resume()
            return
        error = self._expire()
        if not self._connection.postpone(error):
            raise error

    def _expire(self) -> TimeoutError:
        """Return the error of the limit, which is over: the job may go on, as one does that keeps the error to itself."""
        self._ends_at = math.inf
        return TimeoutError(f"the attempt ran longer than its time limit of {self._seconds:g} s")


class _Runner:
    """
    The app with its lifespans, and the jobs.

    A `def` runs in the main thread without an event loop. An `async def` runs on one loop that stays for the life of the
    process, so that it can use what the lifespans opened; between jobs the loop does not run.
    """

    def __init__(self, connection: _ParentConnection) -> None:
        self._connection = connection
        self.live_sender = _LiveSender(connection)
        self._loop = asyncio.Runner()
        self._fork_guard = ForkGuard(self._loop.get_loop())
        self._closing = asyncio.Event()
        self._worker_scope = WorkerScope(offload=False)
        self._lifespan: asyncio.Task[None]
        self._state: Mapping[str, Any] = {}
        self._limit = self._new_limit(None, by_signal=False)
        self._app: Any

    def open(self, start: StartRequest) -> None:
        """Load the app and open its lifespans; raises what these raise."""
        self._app = load(start.app, start.modules)
        self._loop.run(self._open_lifespan())

    async def _open_lifespan(self) -> None:
        opened = asyncio.get_running_loop().create_future()

        async def hold() -> None:
            # One task from the opening to the closing: cancel scopes require it.
            async with core_of(self._app).lifespan_context() as state:
                opened.set_result(state)
                await self._closing.wait()

        self._lifespan = asyncio.create_task(hold())
        await asyncio.wait({opened, self._lifespan}, return_when=asyncio.FIRST_COMPLETED)
        if self._lifespan.done():
            await self._lifespan
        self._state = await opened

    def close(self) -> None:
        """Close the lifespans and the app."""

        async def end() -> None:
            await self._worker_scope.close()
            self._closing.set()
            await self._lifespan
            await self._app.aclose()

        self._loop.run(end())
        self._loop.close()
        self._app.close()

    def run(self, job: RunRequest) -> DoneReply | FailedReply | BatchReply:
        """Run one job, or one batch; return its result, or what it raised."""
        context: Context | None = None
        self._limit = self._new_limit(None, by_signal=False)
        try:
            task = core_of(self._app).definitions.get(job.task)
            if task is None:
                return _reply(
                    job, UnknownTask(f"The app that the process loaded has no task {job.task!r}."), unable=True
                )
            if job.items:
                return self._run_batch(job, task)
            args, kwargs = task.signature.decode(job.body)
            self._limit = self._new_limit(job.timeout_ms, by_signal=not task.is_async)
            context = self._context(job, emit_hook=self._emit_hook(job))
            if task.settings.ack == "early":
                end_spawning(context)
            variables = copy_context()
            variables.run(CURRENT.set, context)
            with self._limit:
                result = self._call(task, args, kwargs, variables, context)
            if type(result) in UNRUN:
                raise not_run(result)
            keep_ms = task.settings.keep_ms if job.keep_ms is None else job.keep_ms
            stored = None if task.returns_none or not keep_ms else task.results.encode(result)
            return DoneReply(job.id, job.attempt, stored, spawned_entries(context), charges=charges_of(context))
        except BaseException as error:
            reply = _reply(job, error)
            reply.charges = {} if context is None else charges_of(context)
            return reply
        finally:
            self._limit.close()  # its error may have been raised as it was left
            if context is not None:
                end_spawning(context)  # a thread of the job that goes on gets an error if it spawns or emits

    def _run_batch(self, job: RunRequest, task: TaskDefinition) -> BatchReply | FailedReply:
        """Run the function with the items that can be read; return how each item of the request ended."""
        values: dict[int, Any] = {}
        ends: dict[int, ItemEnd] = {}
        for at, item in enumerate(job.items):
            try:
                values[at] = task.signature.decode(item.body)[0][0]
            except Exception as error:
                ends[at] = (None, error)
        contexts = {at: self._context(job.items[at], emit_hook=self._emit_hook(job, at)) for at in values}
        if task.settings.ack == "early":
            for one in contexts.values():
                end_spawning(one)
        context = self._context(job, items=contexts.values())
        variables = copy_context()
        variables.run(CURRENT.set, context)
        value: Any = None
        raised: BaseException | None = None
        try:
            if values:
                value = self._call(task, [list(values.values())], {}, variables, context)
        except BaseException as error:
            raised = error
        ends |= zip(values, item_ends(value, raised, len(values)), strict=True)
        alike = ends[0][1]
        if (
            alike is not None
            and not any(charges_of(one) for one in contexts.values())
            and all(error is alike for _, error in ends.values())
        ):
            return _reply(job, alike)
        spawned = {at: spawned_entries(one) for at, one in contexts.items()}
        for one in contexts.values():
            end_spawning(one)
        reply = _batch_reply(job, task, ends, spawned)
        reply.charges = {at: charges for at, one in contexts.items() if (charges := charges_of(one))}
        return reply

    def _call(
        self, task: TaskDefinition, args: list[Any], kwargs: dict[str, Any], variables: Variables, context: Context
    ) -> Any:
        function = task.function
        if (injection := task.injection) is not None:
            block = None if task.is_async else self._block
            function = injection.around(function, lambda: context, self._worker_scope, block)
        if not task.is_async:
            with self._fork_guard:
                return variables.run(function, *args, **kwargs)

        async def call() -> Any:
            with self._fork_guard:
                return await self._limit.await_call(function(*args, **kwargs))

        return self._loop.run(call(), context=variables)

    def _block(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the event loop until a coroutine has ended, for a `def` that waits for it."""
        try:
            return self._loop.run(self._limit.await_call(coroutine), context=copy_context())
        finally:
            self._limit.resume()

    def _new_limit(self, ms: int | None, *, by_signal: bool) -> _TimeLimit:
        return _TimeLimit(self._connection, self._loop.get_loop(), ms, by_signal=by_signal)

    def _emit_hook(self, job: RunRequest, item: int | None = None) -> Callable[[Any], Awaitable[None]]:
        def emit(value: Any) -> Awaitable[None]:
            data = core_of(self._app).part_codec.encode(value)
            self._connection.send(EmitRequest(data, job.id, job.attempt, item))
            return _SENT

        return emit

    def _context(
        self, job: RunRequest, *, items: Iterable[Context] | None = None,
        emit_hook: Callable[[Any], Awaitable[None]] | None = None,
    ) -> Context:  # fmt: skip
        def extend(ms: int) -> None:
            self._connection.send(ExtendRequest(ms, job.id, job.attempt))

        return Context(
            job_id=job.id,
            task=job.task,
            queue=job.queue,
            attempt=job.attempt,
            headers=job.headers,
            tags=job.tags,
            state=self._state,
            deadline_hook=self._limit.extend if job.timeout_ms is not None else extend,
            enqueued_at=None if job.enqueued_ms is None else instant(job.enqueued_ms),
            scheduled_for=None if job.due_ms is None else instant(job.due_ms),
            items=None if items is None else lambda: items,
            costs=job.costs,
            emit_hook=emit_hook,
            live=lambda: self.live_sender.record(job),
            log=(lambda: self.live_sender.log(job)) if job.keeps_logs else None,
        )


class _Sent:
    """The way of a part that the worker has got."""

    def __await__(self) -> Generator[object, None, None]:
        yield from ()


_SENT = _Sent()


def _reply(job: RunRequest, error: BaseException, *, unable: bool = False) -> FailedReply:
    reply = capture(error)
    reply.id, reply.attempt, reply.unable = job.id, job.attempt, unable
    return reply


def _batch_reply(
    job: RunRequest, task: TaskDefinition, ends: dict[int, ItemEnd], spawned: dict[int, list[bytes]]
) -> BatchReply:
    reply = BatchReply(job.id, job.attempt, [None] * len(job.items), {}, {})
    for at, (value, failure) in ends.items():
        keep_ms = task.settings.keep_ms if job.items[at].keep_ms is None else job.items[at].keep_ms
        try:
            if failure is None and not (value is None or task.returns_none or not keep_ms):
                reply.results[at] = task.results.encode(value)
        except Exception as error:
            reply.errors[at] = capture(error)
        else:
            if failure is not None:
                reply.errors[at] = capture(failure)
            elif spawned[at]:
                reply.spawned[at] = spawned[at]
    return reply


def _end_with_worker() -> None:
    """Have the whole process group killed when the worker's end of standard input closes; jobs get /dev/null."""
    alive_fd = os.dup(0)  # not inherited by the programs that a job starts
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if sys.platform == "linux":
        # The kernel does it, so a job that never releases the interpreter's lock ends too.
        fcntl.fcntl(alive_fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(alive_fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(alive_fd, fcntl.F_SETFL, fcntl.fcntl(alive_fd, fcntl.F_GETFL) | os.O_ASYNC)
        poll = select.poll()
        poll.register(alive_fd, 0)
        if poll.poll(0):  # it closed before the kernel was asked
            os.killpg(0, signal.SIGKILL)
    else:

        def watch() -> None:
            os.read(alive_fd, 1)
            os.killpg(0, signal.SIGKILL)

        threading.Thread(target=watch, name="conveyor-orphan", daemon=True).start()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a job may have closed it, or put anything in its place
            stream.flush()
