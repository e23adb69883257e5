"""Runs tasks of `run_in="process"`, each alone in a process that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
from asyncio.subprocess import Process, create_subprocess_exec
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec

from conveyor import ids
from conveyor.errors import BatchFailed, ConfigurationError
from conveyor.payload.live_records import Progress
from conveyor.worker.execution.batches import BatchAttempt
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
    pack,
    read_reply,
    rebuild,
)
from conveyor.worker.logs import LOG, describe_end

if TYPE_CHECKING:
    from conveyor.jobs.dependencies import Injection
    from conveyor.jobs.task import TaskDefinition
    from conveyor.worker.attempt import Attempt

# Not `-m`: that would run a second copy of a module which `conveyor.worker` may have loaded already.
_ENTRY = "from conveyor.worker.execution.process_main import main; main()"
DEFAULT_MAX_JOBS = 1_000
"""Jobs after which a process is replaced, where no limit is given."""
_EXIT_PATIENCE = 1.0
"""Seconds between the end of a process's connection and its own, at most."""
_GRACE = 5.0
"""Seconds that an idle process has to close its lifespans."""


class ProcessCrashed(RuntimeError):
    """The process that ran the job ended before the job did."""


class ProcessUnavailable(ConfigurationError):
    """No process can run the job here. It has not started, uses no attempt, and waits for a worker that can run it."""

    code = "E08"


class ProcessPool:
    """
    Up to `limit` processes, started when they are needed and kept for the next job.

    Each is a fresh interpreter that runs one job at a time, in a process group of its own that is killed with it. A
    process ends when it was idle for `idle_seconds`, or has reached a limit (`RecycleLimits`).
    """

    idle_seconds = 60.0

    def __init__(
        self, app_reference: str | None, limit: int, *, modules: Mapping[str, str] | None = None, max_jobs: int | None = None,
        max_memory: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            app_reference: the app as ``module:object``; None when no other process can import it.
            limit: how many processes.
            modules: the modules of tasks that the app may not import itself.
            max_jobs: after how many jobs a process is replaced; None: 1,000.
            max_memory: above how many bytes of memory it is replaced; None: no limit.
        """
        self.limit = limit
        self._recycle_limits = (max_jobs or DEFAULT_MAX_JOBS, max_memory)
        self._reference, self._modules = app_reference, dict(modules or {})
        self._slots = asyncio.Semaphore(limit)
        self._idle: list[tuple[_PoolProcess, asyncio.TimerHandle]] = []
        self._alive: set[_PoolProcess] = set()
        self._ending: dict[_PoolProcess, asyncio.Task[None]] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"<Processes of {self._reference}: {len(self._alive)} of {self.limit}, {len(self._idle)} idle>"

    @property
    def pids(self) -> list[int]:
        """The pids of its processes."""
        return [child.pid for child in self._alive]

    async def run(self, attempt: Attempt, on_started: Callable[[Attempt], None] = lambda _: None) -> Any:
        """
        Run the job when a process is free, and return its decoded result (None if none is stored).

        *on_started* is called when a process has loaded the app and takes the job: a time limit counts from there, since else
        a job whose limit is shorter than the start of a process would never run.
        A cancellation kills the process and all it has started before this returns. Raises what the job raised, as a
        class with the same name below those that are loaded here; ProcessCrashed if the process died;
        ProcessUnavailable if it cannot load the app, or the app that it loaded does not have the task.
        """
        task = attempt.handler.task
        if (refusal := self.refusal(task)) is not None:
            raise refusal
        if task.core.overrides and task.injection is not None:
            _refuse_overrides(task, task.injection)
        async with self._slots:
            fresh = task.settings.fresh
            child = await self._take(fresh=fresh)
            if attempt.expire():
                self._give_back(child, "")
                raise asyncio.CancelledError
            on_started(attempt)
            try:
                reply = await child.work(_run_request(attempt), attempt)
            except BaseException:
                await child.kill()
                raise
            self._give_back(child, reply.worn, keep=not fresh)
        if not isinstance(reply, BatchReply) and reply.charges:
            attempt.set_charges(reply.charges)
        if isinstance(reply, FailedReply):
            if reply.unable:
                raise ProcessUnavailable(reply.message)
            raise rebuild(reply, task.settings.retry)
        if isinstance(reply, BatchReply):
            return _batch_result(reply, cast("BatchAttempt", attempt))
        if reply.spawned:
            attempt.set_spawned(reply.spawned)
        return None if reply.result is None else task.results.decode(reply.result)

    def refusal(self, task: TaskDefinition) -> ProcessUnavailable | None:
        """Return why no process can run *task*, whatever it does; None when one may."""
        if self._reference is None:
            what = "this program's app, since it is not in a module that this program has imported"
        elif module_of(task) == "__main__":
            what = "the main program, which defines the task"
        else:
            return None
        return ProcessUnavailable(
            f"No process can run {task.name}: a fresh one cannot import {what}. Define app and task in a module that this "
            "program imports, or run the jobs with:  conveyor worker module:app"
        )

    async def close(self) -> None:
        """End idle processes in order and kill the others. Every `run` under way raises ProcessCrashed."""
        self._closed = True
        for child, timer in self._idle:
            timer.cancel()
            self._end(child)
        self._idle.clear()
        ending = dict(self._ending)
        await asyncio.gather(*ending.values(), *(child.kill() for child in self._alive if child not in ending))

    async def _take(self, *, fresh: bool) -> _PoolProcess:
        while self._idle and not fresh:
            child, timer = self._idle.pop()  # the last used, so that those that are not needed become idle
            timer.cancel()
            if child.is_alive:
                return child
            self._end(child)
        assert self._reference is not None
        child = await _PoolProcess.start(self._reference)
        self._alive.add(child)
        if self._closed:
            await child.kill()
            raise ProcessCrashed("The worker's processes are closed; this job has not started.")
        child.exit.add_done_callback(lambda _: self._alive.discard(child))
        try:
            verbose = LOG.isEnabledFor(logging.DEBUG)
            await child.ready(StartRequest(self._reference, self._modules, sys.path, verbose, *self._recycle_limits))
        except BaseException:
            await child.kill()
            raise
        return child

    def _give_back(self, child: _PoolProcess, worn: str, *, keep: bool = True) -> None:
        if worn:
            LOG.info('Process %d of run_in="process" %s: a fresh one takes its place', child.pid, worn)
        if self._closed or worn or not keep:
            self._end(child)
            return
        timer = asyncio.get_running_loop().call_later(self.idle_seconds, lambda: self._retire(child))
        self._idle.append((child, timer))

    def _retire(self, child: _PoolProcess) -> None:
        self._idle = [entry for entry in self._idle if entry[0] is not child]
        self._end(child)

    def _end(self, child: _PoolProcess) -> None:
        self._ending[child] = ending = asyncio.create_task(child.end(), name=f"end-process-{child.pid}")
        ending.add_done_callback(lambda _: self._ending.pop(child))


class _PoolProcess:
    """One process of the pool, on the side of the worker."""

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, alive_fd: int
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        self.exit = asyncio.create_task(self._wait_for_exit(alive_fd), name=f"process-{self.pid}")
        """Done when the process has ended, with its exit code, or the negative number of a signal."""

    @classmethod
    async def start(cls, reference: str) -> Self:
        """Start a fresh interpreter; it has not loaded the app yet."""
        ours, theirs = socket.socketpair()
        alive_read_fd, alive_fd = os.pipe()
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await create_subprocess_exec(
                    sys.executable, "-c", _ENTRY, reference, str(theirs.fileno()),
                    stdin=alive_read_fd, pass_fds=(theirs.fileno(),), start_new_session=True,
                )  # fmt: skip
            except BaseException:
                writer.close()
                raise
        except BaseException:
            os.close(alive_fd)
            raise
        finally:
            theirs.close()
            os.close(alive_read_fd)
        return cls(process, reader, writer, alive_fd)

    @property
    def is_alive(self) -> bool:
        # The kernel is asked too: its connection ends before the loop sees that or the exit, and a job sent there would
        # be charged with a crash.
        return not (self.exit.done() or self._reader.at_eof() or _has_ended(self._writer))

    async def ready(self, start: StartRequest) -> None:
        """Wait until the app is loaded; raises ProcessUnavailable with the error if it cannot be."""
        subject = f"The process for jobs, which loads {start.app},"
        reply = await self._ask(start, subject)
        if isinstance(reply, FailedReply):
            raise ProcessUnavailable(
                f"{subject} cannot start: {reply.kinds[0].partition(':')[2]}: {reply.message}\n{reply.traceback}"
            )
        if not isinstance(reply, ReadyReply):
            raise await self._crash(subject)

    async def work(self, job: RunRequest, attempt: Attempt) -> DoneReply | FailedReply | BatchReply:
        """
        Run *attempt* as *job*; raises ProcessCrashed, also for the end of another attempt.

        Reports on an attempt that has ended are left out: a thread of it may go on, which is no fault of this job.
        """
        subject = f"The process of {job.task} ({job.id}, attempt {job.attempt})"
        reply = await self._ask(job, subject)
        while not isinstance(reply, ReadyReply):
            is_own = (reply.id, reply.attempt) == (job.id, job.attempt)
            if isinstance(reply, LiveReply):
                _adopt_live(attempt, reply)
            elif isinstance(reply, ExtendRequest):
                if is_own:
                    attempt.move_deadline(reply.ms)
            elif isinstance(reply, EmitRequest):
                if is_own:
                    await _emit(attempt, reply)
            elif not is_own:
                break
            else:
                return reply
            reply = await self._read_reply(subject)
        raise ProcessCrashed(f"{subject} reported on something else, and is killed. Its pid was {self.pid}.")

    async def end(self) -> None:
        """Let an idle process close its lifespans and exit; kill it if it does not."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()
        await asyncio.wait({self.exit}, timeout=_GRACE)
        await self.kill()

    async def kill(self) -> None:
        """Kill the process and its group at once, then wait for its end."""
        if self._process.returncode is None:
            _kill_group(self.pid)
        self._writer.close()
        await asyncio.wait({self.exit})
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _wait_for_exit(self, alive_fd: int) -> int:
        try:
            return await self._process.wait()
        finally:
            # Programs that the job has started may hold the connection open, and must not outlive the process.
            _kill_group(self.pid)
            os.close(alive_fd)

    async def _ask(self, request: Request, subject: str) -> Reply:
        with contextlib.suppress(OSError):  # it died; reading its reply says how
            self._writer.write(pack(request))
            await self._writer.drain()
        return await self._read_reply(subject)

    async def _read_reply(self, subject: str) -> Reply:
        reading = asyncio.create_task(self._read_frame())
        try:
            await asyncio.wait({reading, self.exit}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({reading}, timeout=_EXIT_PATIENCE)  # a reply that was sent before the end still counts
            reply = reading.result() if reading.done() else None
        finally:
            reading.cancel()
        if reply is None:
            raise await self._crash(subject)
        return reply

    async def _read_frame(self) -> Reply | None:
        try:
            head = await self._reader.readexactly(HEAD.size)
            return read_reply(await self._reader.readexactly(HEAD.unpack(head)[0]))
        except (OSError, asyncio.IncompleteReadError, msgspec.MsgspecError):
            return None

    async def _crash(self, subject: str) -> ProcessCrashed:
        await asyncio.wait({self.exit}, timeout=_EXIT_PATIENCE)
        how = describe_end(self.exit.result()) if self.exit.done() else "broke its connection to the worker"
        return ProcessCrashed(f"{subject} {how} before it was done. Its pid was {self.pid}.")


def module_of(task: TaskDefinition) -> str:
    """Return the name of the module that defines *task*."""
    return getattr(task.function, "__module__", None) or ""


def _refuse_overrides(task: TaskDefinition, injection: Injection) -> None:
    """Raise ConfigurationError when a dependency is overridden here: its process would call the original."""
    replaced = injection.functions & set(task.core.overrides.values())
    if replaced:
        name = getattr(next(iter(replaced)), "__qualname__", "a function")
        raise ConfigurationError(
            f"{task.name} runs in a process of its own, in which app.override() with {name} is not in force. The job has not run. "
            'Where dependencies are overridden, as in a test, declare the task without run_in="process".'
        )


def _adopt_live(attempt: Attempt, reply: LiveReply) -> None:
    """Pass on what a job said of itself, if it is one of those that run there."""
    jobs = [attempt, *attempt.live] if isinstance(attempt, BatchAttempt) else [attempt]
    for one in jobs:
        if (one.public_id, one.number) != (reply.id, reply.attempt):
            continue
        if reply.lines:
            one.adopt_lines(reply.lines)
            return
        if not isinstance(one, BatchAttempt):  # whose id is that of its first item
            one.adopt_live(None if reply.progress is None else Progress(*reply.progress), reply.notes)
            return


def _batch_result(reply: BatchReply, batch: BatchAttempt) -> list[Any] | None:
    """Return the results of a batch, as its function would have returned them; raises BatchFailed where some items failed."""
    task = batch.handler.task
    for at, entries in reply.spawned.items():
        batch.live[at].set_spawned(entries)
    for at, charges in reply.charges.items():
        batch.live[at].set_charges(charges)
    results = [None if one is None else task.results.decode(one) for one in reply.results]
    if reply.errors:
        errors = {at: rebuild(failed, task.settings.retry) for at, failed in reply.errors.items()}
        raise BatchFailed(errors, results=results)
    return results


async def _emit(attempt: Attempt, part: EmitRequest) -> None:
    """Write a partial result. While many are on the way, nothing is read of the process, which then waits too."""
    if isinstance(attempt, BatchAttempt) and part.item is not None:
        attempt = attempt.live[part.item]
    if attempt.ended == 0.0:
        await attempt.emit_encoded(part.data)


def _run_request(attempt: Attempt) -> RunRequest:
    envelope = attempt.envelope
    bare_id, settings = ids.split(attempt.public_id)[1], attempt.handler.task.settings
    return RunRequest(
        task=attempt.handler.name,
        body=b"" if isinstance(attempt, BatchAttempt) else attempt.body,
        id=attempt.public_id,
        queue=attempt.consumer.queue,
        attempt=attempt.number,
        headers=envelope.extra.headers,
        tags=envelope.tags,
        keep_ms=envelope.extra.keep_ms,
        enqueued_ms=ids.made_at_ms(bare_id),
        due_ms=attempt.envelope.due_ms,
        items=[_run_request(item) for item in attempt.live] if isinstance(attempt, BatchAttempt) else [],
        costs=attempt.costs,
        notes={} if isinstance(attempt, BatchAttempt) else attempt.stored_notes(),
        keeps_logs=attempt.handler.keeps_logs,
        timeout_ms=None if settings.timeout_hard_ms is None else envelope.extra.timeout_ms or settings.timeout_ms,
    )


def _has_ended(writer: asyncio.StreamWriter) -> bool:
    """Return whether the connection of an idle process has ended; an idle process sends nothing."""
    descriptor = writer.get_extra_info("socket").fileno()
    if descriptor < 0:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
