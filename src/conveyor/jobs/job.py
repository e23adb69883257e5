"""Handles of jobs: their id, status and result."""

from __future__ import annotations

from asyncio import _get_running_loop, sleep
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from time import sleep as pause_blocking
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError, JobCancelled, JobFailed, JobNotFound, ResultExpired
from conveyor.jobs.stream import Part, PartReader, place_of
from conveyor.jobs.watching import Changes, WatchedJob, WatchHub, check_after, places
from conveyor.payload.records import RAN, Failure, Status, read_leniently, read_outcome
from conveyor.store import inspection, operations
from conveyor.store.operations import ExistingId
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from datetime import datetime

    from conveyor.events import JobUpdate
    from conveyor.jobs.changes import Again, JobChange
    from conveyor.jobs.details import JobDetails
    from conveyor.jobs.history import HistoryEntry
    from conveyor.jobs.results import ResultSubscriber, WaitReply
    from conveyor.jobs.why import Why
    from conveyor.payload.codec import ValueCodec
    from conveyor.payload.formats import FormatRegistry
    from conveyor.payload.live_records import LogLine, Progress
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.payload.sealed_records import RecordDecoder
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call

_POLL = 0.02
"""Seconds between two checks of the buffer of this program."""
BUFFERED = "It waits in the buffer of this program until Redis answers."
_CANCELLED = {"expired": "expired before it started", "purged": "was purged", "dropped": "was dropped for a newer one"}
"""Texts about a cancelled job, by the reason in its record."""
_ANSWER_PAUSES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1)
"""Seconds between the questions whether a worker has answered to a cancellation. A busy one listens after 0.1 s."""
CancelAnswer = Literal["removed", "will-not-start", "asked", ""]
ConflictAnswer = Literal["kept", "replaced", "rerun"]
R_co = TypeVar("R_co", covariant=True)
JobLookup = tuple[str, inspection.JobRow | None, bytes]


class ResultSpec(Protocol):
    """The part of a task that decodes results."""

    @property
    def name(self) -> str: ...
    @property
    def results(self) -> ValueCodec[Any]: ...
    @property
    def promises_result(self) -> bool: ...


class JobCore(Protocol):
    """The part of an app's inside that handles use."""

    @property
    def namespace(self) -> str: ...
    @property
    def client(self) -> Client: ...
    @property
    def result_subscriber(self) -> ResultSubscriber: ...
    @property
    def watch_hub(self) -> WatchHub: ...
    @property
    def definitions(self) -> Mapping[str, ResultSpec]: ...
    @property
    def sealing(self) -> PayloadPipeline | None: ...
    @property
    def formats(self) -> FormatRegistry: ...
    @property
    def part_codec(self) -> ValueCodec[Any]: ...
    @property
    def decoder(self) -> RecordDecoder: ...
    @property
    def worker_command(self) -> str: ...

    def keys(self, queue: str) -> QueueKeys: ...


class Job(Generic[R_co]):
    """
    A handle of one job. Making one sends nothing.

    `id` is the public id. `duplicate` is true when the enqueue met a job that existed; `conflict` says what it has done then:
    ``kept`` nothing, ``replaced`` its arguments, ``rerun`` have it run once more (the handle is of that run). `queue` and
    `task` are None for a handle made from an id that does not contain them, until the handle was used.
    """

    __slots__ = ("_bare_id", "_core", "_result_spec", "conflict", "duplicate", "queue", "task")

    def __init__(
        self,
        core: JobCore,
        bare_id: str,
        queue: str | None,
        result_spec: ResultSpec | None = None,
    ) -> None:
        """
        Make a handle; nothing is sent.

        Args:
            core: the inside of the app.
            bare_id: the id without the queue.
            queue: the queue or partition, None when it is to be looked for.
            result_spec: the task, None when it is not known yet.

        """
        self._core = core
        self._bare_id = bare_id
        self._result_spec = result_spec
        self.queue = queue
        self.task: str | None = None if result_spec is None else result_spec.name
        self.duplicate = False
        self.conflict: ConflictAnswer | None = None
        if isinstance(bare_id, ExistingId):
            self.duplicate, self.conflict = True, bare_id.conflict

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from conveyor.jobs.hints import JOB_MEMBERS, no_member

            raise no_member("Job", name, JOB_MEMBERS)

    @property
    def id(self) -> str:
        """The public id: ``queue:id`` for a generated id, the id itself when the caller gave it."""
        return self._bare_id if self.queue is None else ids.public(self.queue, self._bare_id)

    def __repr__(self) -> str:
        return f"<Job {self.id}{f' {self.task}' if self.task else ''}{' (duplicate)' if self.duplicate else ''}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id and other._core is self._core

    def __hash__(self) -> int:
        return hash(self.id)

    # -- status ---------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """
        Return scheduled, ready, leased, done, dead, cancelled or waiting.

        A job is waiting at a limit, behind a job of its group, while its task is paused, and while it is in the buffer of this
        program; a spawned job until its parent has ended, and one that is to run once more until the job before it has ended.
        `done` and `cancelled` are known for ten minutes, or for as long as the result is kept. Raises JobNotFound for a job
        that is not known, or not any more: purged and deleted ones are not.
        """
        refuse_in_loop(self._core.client, "job.status()", "await job.astatus()")
        if self._is_buffered():
            return "waiting"
        return self._status(self._look_up())

    async def astatus(self) -> Status:
        """Awaitable form of `status`."""
        if self._is_buffered():
            return "waiting"
        return self._status(await self._alook_up())

    def _status(self, lookup: JobLookup) -> Status:
        where, row, record = lookup
        if row is not None:
            return row.status
        if where == "result":
            return read_outcome(record).status
        if where == "ended":
            return "done"
        if where == "none" and not record and ids.may_arrive_later(self._bare_id):
            return "waiting"  # its parent is still running, or ended a moment ago
        raise self._not_found()

    def info(self) -> JobDetails:
        """
        Return the facts about the job: its arguments, headers, tags, attempts, worker and start.

        They are kept for as long as its result is; of a job without a kept result only that it has ended. Raises JobNotFound.
        """
        refuse_in_loop(self._core.client, "job.info()", "await job.ainfo()")
        return self._details(None if self._is_buffered() else self._look_up())

    async def ainfo(self) -> JobDetails:
        """Awaitable form of `info`."""
        return self._details(None if self._is_buffered() else await self._alook_up())

    def _details(self, lookup: JobLookup | None) -> JobDetails:
        from conveyor.jobs.details import JobDetails, ended_details, live_details

        status = "waiting" if lookup is None else self._status(lookup)
        where, row, record = ("none", None, b"") if lookup is None else lookup
        if row is None and status == "waiting":
            return JobDetails(self.id, str(self.queue), "waiting", self.task)
        decoder = self._core.decoder
        if row is not None:
            return live_details(str(self.queue), row, decoder)
        return ended_details(str(self.queue), self._bare_id, status, record if where == "result" else b"", decoder)

    def progress(self) -> Progress | None:
        """
        Return how far the job said that it is (`context.progress`): `done`, `total` and `text`; None where it said nothing.

        Of a job that ended it is the last, for as long as its result is kept. Raises JobNotFound.
        """
        refuse_in_loop(self._core.client, "job.progress()", "await job.aprogress()")
        return None if self._is_buffered() else self._read_progress(self._look_up())

    async def aprogress(self) -> Progress | None:
        """Awaitable form of `progress`."""
        return None if self._is_buffered() else self._read_progress(await self._alook_up())

    def _read_progress(self, lookup: JobLookup) -> Progress | None:
        from conveyor.payload.live_records import open_progress

        self._status(lookup)  # raises for a job that is not known
        where, row, record = lookup
        stored = row.state.progress if row else bytes(read_outcome(record).progress) if where == "result" else b""
        return open_progress(self._core.sealing, stored, str(self.queue), self._bare_id)

    def history(self) -> list[HistoryEntry]:
        """
        Return the states that the job came into, oldest first: when, on which worker, and why.

        It is read from what is kept of the job: of one that ended, from its result. Raises JobNotFound.
        """
        refuse_in_loop(self._core.client, "job.history()", "await job.ahistory()")
        return [] if self._is_buffered() else self._read_history(self._look_up())

    async def ahistory(self) -> list[HistoryEntry]:
        """Awaitable form of `history`."""
        return [] if self._is_buffered() else self._read_history(await self._alook_up())

    def _read_history(self, lookup: JobLookup) -> list[HistoryEntry]:
        from conveyor.jobs.history import ended_history, live_history

        self._status(lookup)  # raises for a job that is not known
        where, row, record = lookup
        if row is None:
            return ended_history(self._bare_id, where, record)
        return live_history(str(self.queue), row, self._core.decoder)

    def logs(self) -> list[LogLine]:
        """
        Return what the job has logged, as far as it is kept: of attempts that failed, or as the task says (``logs=``).

        Lines are kept for seven days, also when the job is not known any more. Raises JobNotFound for an id without its queue
        that is in no queue.
        """
        refuse_in_loop(self._core.client, "job.logs()", "await job.alogs()")
        if self.queue is None:
            self._look_up()
        return self._read_lines(self._core.client.run(inspection.read_logs(self._keys(), self._bare_id)))

    async def alogs(self) -> list[LogLine]:
        """Awaitable form of `logs`."""
        if self.queue is None:
            await self._alook_up()
        return self._read_lines(await self._core.client.arun(inspection.read_logs(self._keys(), self._bare_id)))

    def _read_lines(self, portions: list[bytes]) -> list[LogLine]:
        return self._core.decoder.lines(portions, str(self.queue), self._bare_id)

    def why(self) -> Why:
        """
        Return why the job waits, or that it does not; the text of the answer is a sentence.

        It is read from the keys from which workers lease. Raises JobNotFound for a job that is not known, or not any more.
        """
        refuse_in_loop(self._core.client, "job.why()", "await job.awhy()")
        if self._is_buffered():
            return self._explain(None)
        if self.queue is None:
            self._look_up()
        facts = self._core.client.run(inspection.why(self._keys(), self._bare_id))
        return self._explain(facts)

    async def awhy(self) -> Why:
        """Awaitable form of `why`."""
        if self._is_buffered():
            return self._explain(None)
        if self.queue is None:
            await self._alook_up()
        facts = await self._core.client.arun(inspection.why(self._keys(), self._bare_id))
        return self._explain(facts)

    def _explain(self, facts: inspection.WaitFacts | None) -> Why:
        from conveyor.jobs.why import Why, explain

        if facts is None:
            return Why("buffer", "waiting", str(self.queue), task=self.task or "")
        decoder = self._core.decoder
        return explain(self._status(facts.job), str(self.queue), facts, decoder)

    def _is_buffered(self) -> bool:
        buffer = self._core.client.buffer
        return buffer is not None and buffer.holds(self._bare_id)

    def _wait_for_buffer(self, seconds: float | None) -> float | None:
        """Wait until the buffer of this program has delivered the job; return the rest of *seconds* (None: no limit)."""
        buffer = self._core.client.buffer
        if buffer is None or not buffer.holds(self._bare_id):
            return seconds
        started = monotonic()
        if not buffer.wait_delivered(self._bare_id, seconds) and seconds is not None:
            raise self._timeout_error(seconds)
        return None if seconds is None else max(0.0, seconds - (monotonic() - started))

    async def _await_buffer(self, seconds: float | None) -> float | None:
        """Awaitable form of `_wait_for_buffer`."""
        started = monotonic()
        while self._is_buffered():
            if seconds is not None and monotonic() - started >= seconds:
                raise self._timeout_error(seconds)
            await sleep(_POLL)
        return None if seconds is None else max(0.0, seconds - (monotonic() - started))

    def _look_up(self, deadline: float | None = None) -> JobLookup:
        client = self._core.client
        if self.queue is not None:
            call = inspection.get_job(self._core.keys(self.queue), self._bare_id)
            return self._note_queue(self.queue, client.run(call, deadline=deadline))
        for queue in self._likely_queues(client.queues()):
            lookup = client.run(inspection.get_job(self._core.keys(queue), self._bare_id))
            if _is_known(lookup):
                return self._note_queue(queue, lookup)
        raise self._not_found()

    async def _alook_up(self, deadline: float | None = None) -> JobLookup:
        client = self._core.client
        if self.queue is not None:
            call = inspection.get_job(self._core.keys(self.queue), self._bare_id)
            return self._note_queue(self.queue, await client.arun(call, deadline=deadline))
        for queue in self._likely_queues(await client.aqueues()):
            lookup = await client.arun(inspection.get_job(self._core.keys(queue), self._bare_id))
            if _is_known(lookup):
                return self._note_queue(queue, lookup)
        raise self._not_found()

    def _likely_queues(self, queues: list[str]) -> list[str]:
        from conveyor.messaging.partitions import likely_first

        return likely_first(queues, self._bare_id)

    def _note_queue(self, queue: str, lookup: JobLookup) -> JobLookup:
        self.queue = queue
        if self.task is None and lookup[1] is not None:
            self.task = name = lookup[1].envelope.task
            self._result_spec = self._core.definitions.get(name)
        return lookup

    def _not_found(self) -> JobNotFound:
        where = f"Namespace {self._core.namespace!r}" if self.queue is None else f"Queue {self.queue!r}"
        return JobNotFound(
            f"{where} does not know a job {self.id!r}. It was never there, was purged or deleted, or ended longer ago "
            "than is remembered: ten minutes, or as long as its result is kept."
        )

    # -- result ---------------------------------------------------------------------------------------------------

    def result(self, timeout: Duration | None = None, *, bar: bool = False) -> R_co:
        """
        Wait until the job has ended and return its result; with *bar* draw its progress on a terminal (standard error).

        Raises TimeoutError after *timeout* (None: no limit), JobFailed, JobCancelled, ResultExpired when the job has
        finished and its value is no longer kept, and JobNotFound when it is not known, or not any more. Redis announces the
        end of the job; nothing is polled.
        """
        refuse_in_loop(self._core.client, "job.result()", "await job.aresult()")
        seconds = _timeout_seconds(timeout)
        end = self._core.client.deadline(seconds)
        remaining = self._wait_for_buffer(seconds)
        if self.queue is None or self.task is None:
            self._look_up()  # the task knows the type of the result, and only a live job names its task
        try:
            with self._bar(bar):
                reply = self._core.result_subscriber.outcome(self._keys(), self._bare_id, remaining)
        except KeyboardInterrupt as stop:
            raise stop.with_traceback(None) from None  # no need to show where it waited
        if reply is None:
            raise self._timeout_error(seconds, self._situation(end))
        return self._read_result(reply)

    async def aresult(self, timeout: Duration | None = None, *, bar: bool = False) -> R_co:  # noqa: ASYNC109  the twin of result
        """Awaitable form of `result`."""
        seconds = _timeout_seconds(timeout)
        end = self._core.client.deadline(seconds)
        remaining = seconds if self._core.client.buffer is None else await self._await_buffer(seconds)
        if self.queue is None or self.task is None:
            await self._alook_up()
        with self._bar(bar):
            reply = await self._core.result_subscriber.aoutcome(self._keys(), self._bare_id, remaining)
        if reply is None:
            raise self._timeout_error(seconds, await self._asituation(end))
        return self._read_result(reply)

    def _bar(self, wanted: bool) -> AbstractContextManager[None]:
        """Return the block in which the progress of the job is drawn, or an empty one."""
        if not wanted:
            return nullcontext()
        from conveyor.jobs.progress_bar import JobBar

        return JobBar(self._core.watch_hub, _changes(self._core, [self], None))

    def _situation(self, deadline: float | None) -> str:
        """Return why the job has not ended, as far as Redis knows; "" when it does not answer."""
        try:
            counts = self._core.client.run(inspection.counts(self._keys()), retry_for=0.0, deadline=deadline)
            return _situation(self._core, self._status(self._look_up(deadline)), str(self.queue), counts)
        except ConveyorError:
            return ""

    async def _asituation(self, deadline: float | None) -> str:
        """Awaitable form of `_situation`."""
        try:
            counts = await self._core.client.arun(inspection.counts(self._keys()), retry_for=0.0, deadline=deadline)
            return _situation(self._core, self._status(await self._alook_up(deadline)), str(self.queue), counts)
        except ConveyorError:
            return ""

    def _keys(self) -> QueueKeys:
        assert self.queue is not None
        return self._core.keys(self.queue)

    def _read_result(self, reply: WaitReply) -> R_co:
        kind, data = reply
        if kind == "dead":
            _, state, _ = read_leniently(b"\n\n", data)
            errors = state.failures_list()
            raise self._failure_error(
                errors[-1] if errors else None, f"its worker crashed {state.crashes} times while it ran"
            )
        if kind == "gone":
            raise self._not_found()
        if kind == "ended":
            return self._no_value(expired=data == b"+")
        outcome = read_outcome(data)
        if outcome.status == "dead":
            raise self._failure_error(outcome.failure, outcome.reason)
        value = bytes(outcome.value)
        if outcome.packed or (self._core.sealing is not None and data and outcome.status == "done"):
            from conveyor.payload.pipeline import MAX_LARGE
            from conveyor.payload.sealed_records import open_result

            limit = MAX_LARGE if self._result_spec is None else self._result_spec.results.max_payload
            value = open_result(self._core.sealing, outcome, str(self.queue), self._bare_id, limit)
        if outcome.status == "cancelled":
            ran = f": {outcome.reason}" if outcome.reason.startswith(RAN) else ""
            why = _CANCELLED.get(outcome.reason, f"was cancelled{ran}")
            raise JobCancelled(f"Job {self.id} {why}.")
        if self._result_spec is None:
            from conveyor.payload.formats import FormatCodec

            what = f"The result of {self.id}"
            untyped: FormatCodec[R_co] = FormatCodec(formats=self._core.formats, what=what, max_payload=1 << 30)
            return untyped.decode(value)
        return cast("R_co", self._result_spec.results.decode(value))

    def _timeout_error(self, seconds: float | None, situation: str = BUFFERED) -> TimeoutError:
        return TimeoutError(
            f"Job {self.id} has not ended after {seconds:g} s and was not cancelled: ask again later.{situation and ' '}{situation}"
        )

    def _no_value(self, *, expired: bool) -> R_co:
        if expired:
            raise ResultExpired(
                f"Job {self.id} has finished, and its result is not kept any more (or never was). "
                "Ask earlier, or keep it longer: @app.task(keep_result='1h')."
            )
        return cast("R_co", None)

    def _failure_error(self, failure: Failure | None, reason: str) -> JobFailed:
        if failure is None:
            return JobFailed(self.id, "Crashed", reason, "")
        if failure.packed:
            from conveyor.payload.sealed_records import open_failure

            failure = open_failure(self._core.sealing, failure, str(self.queue), self._bare_id)
        return JobFailed(self.id, failure.type, failure.message, failure.traceback)

    # -- partial results ------------------------------------------------------------------------------------------

    def stream(self, after: str | None = None) -> Generator[Part, None, None]:
        """
        Yield the partial results of the job (`context.emit`) in order, each once and as soon as it is there, until the job ends.

        *after*: the id of the last part that was seen; None: from the first one on. A job that is tried again emits anew, and
        each part says its `attempt`. The newest 16,384 parts are kept for a day while the job runs, and for as long as its
        result, at least ten minutes, when it has ended. Raises ResultExpired where parts are missing, JobNotFound for a job
        that is not known, and ConfigurationError for an *after* that is no id of a part.
        """
        refuse_in_loop(self._core.client, "job.stream()", "async for part in job.astream()")
        return self._stream(place_of(after))

    def _stream(self, place: tuple[int, int] | None) -> Generator[Part, None, None]:
        self._wait_for_buffer(None)
        if self.queue is None:
            self._look_up()
        yield from self._part_reader(place).read()

    def astream(self, after: str | None = None) -> AsyncGenerator[Part, None]:
        """Awaitable form of `stream`."""
        return self._astream(place_of(after))

    async def _astream(self, place: tuple[int, int] | None) -> AsyncGenerator[Part, None]:
        await self._await_buffer(None)
        if self.queue is None:
            await self._alook_up()
        parts = self._part_reader(place).aread()
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    # -- watching -------------------------------------------------------------------------------------------------

    def watch(self, after: str | None = None) -> Generator[JobUpdate, None, None]:
        """
        Yield what happens to the job, as `StateChanged` and at last `JobEnded` (`conveyor.events`), until it has ended.

        It begins with the first state, also of a job that has run for long. *after*: the `id` of the last update that was seen.
        Redis announces the changes, and starts and ends are also found that were missed while it was away. Raises JobNotFound,
        and ConfigurationError for an *after* that is no id of an update.
        """
        refuse_in_loop(self._core.client, "job.watch()", "async for update in job.awatch()")
        return watch_jobs(self._core, [self], after)

    def awatch(self, after: str | None = None) -> AsyncGenerator[JobUpdate, None]:
        """Awaitable form of `watch`."""
        return awatch_jobs(self._core, [self], after)

    def _watched(self) -> WatchedJob:
        return WatchedJob(self._keys(), self._bare_id, self._is_buffered)

    def _part_reader(self, place: tuple[int, int] | None) -> PartReader:
        core = self._core
        return PartReader(
            core.client, core.result_subscriber, self._keys(), self._bare_id, place, sealing=core.sealing,
            codec=core.part_codec, not_found=self._not_found,
        )  # fmt: skip

    # -- cancelling -----------------------------------------------------------------------------------------------

    def cancel(self) -> CancelAnswer:
        """
        Cancel the job: it does not start, does not start again, and a running one is asked to stop.

        Return "removed" when no worker held it; "will-not-start" when a worker did and had not started it; "asked" when
        it runs, or its worker has not answered within half a second; "" (which is false) when it had ended already. A
        running job may ignore the request: `result` tells how it ended. Raises TimeoutError while it waits in a buffer or
        for its parent, and JobNotFound when it is not known, or not any more.
        """
        refuse_in_loop(self._core.client, "job.cancel()", "await job.acancel()")
        if self.queue is None:
            self._look_up()
        client = self._core.client
        self._wait_for_buffer(client.retry_for)
        call, questions = operations.cancel(self._keys(), self._bare_id), _cancellation()
        pause = next(questions)
        try:
            while True:
                pause_blocking(pause)
                pause = questions.send(client.run(call))
        except StopIteration as end:
            answer: CancelAnswer | None = end.value
        if answer is None:
            self._refuse_waiting(self._status(self._look_up()))
        return answer or ""

    async def acancel(self) -> CancelAnswer:
        """Awaitable form of `cancel`."""
        if self.queue is None:
            await self._alook_up()
        client = self._core.client
        await self._await_buffer(client.retry_for)
        call, questions = operations.cancel(self._keys(), self._bare_id), _cancellation()
        pause = next(questions)
        try:
            while True:
                await sleep(pause)
                pause = questions.send(await client.arun(call))
        except StopIteration as end:
            answer: CancelAnswer | None = end.value
        if answer is None:
            self._refuse_waiting(self._status(await self._alook_up()))
        return answer or ""

    def _refuse_waiting(self, status: Status, done: str = "cancelled") -> None:
        if status == "waiting":
            raise TimeoutError(f"Job {self.id} waits until its parent has ended. It was not {done}: ask again later.")

    # -- changing, running again ----------------------------------------------------------------------------------

    def update(
        self, *, delay: Duration | None = None, at: datetime | None = None, priority: int | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> bool:  # fmt: skip
        """
        Change the job while it waits, in one step; return False when it has started, or ended.

        It is due after *delay*, 0 for now, or *at* an instant. *args* take the places of stored arguments of those names and are
        checked as those of a call. A job that waits for its next attempt can be changed too. Raises PayloadError for
        arguments that do not fit, ConfigurationError for what cannot be changed (a unique key), UnknownTask for arguments of a
        task that this program does not know, and what `cancel` does. Then nothing is changed.
        """
        refuse_in_loop(self._core.client, "job.update()", "await job.aupdate()")
        change, client = self._change(delay, at, priority, args), self._core.client
        self._wait_for_buffer(client.retry_for)
        while (call := self._update_call(change, self._look_up())) is not None:
            if (answer := client.run(call)) >= 0:
                return self._updated(change, answer)
        return False

    async def aupdate(
        self, *, delay: Duration | None = None, at: datetime | None = None, priority: int | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> bool:  # fmt: skip
        """Awaitable form of `update`."""
        change, client = self._change(delay, at, priority, args), self._core.client
        await self._await_buffer(client.retry_for)
        while (call := self._update_call(change, await self._alook_up())) is not None:
            if (answer := await client.arun(call)) >= 0:
                return self._updated(change, answer)
        return False

    def _change(
        self, delay: Duration | None, at: datetime | None, priority: int | None, args: Mapping[str, Any] | None
    ) -> JobChange:
        from conveyor.jobs.changes import JobChange

        return JobChange(self._core, delay, at, priority, args)

    def _update_call(self, change: JobChange, lookup: JobLookup) -> Call[operations.UpdateAnswer] | None:
        """Return the call that changes the job as it was read; None when it does not wait."""
        row = lookup[1]
        if row is None:
            self._refuse_waiting(self._status(lookup), "changed")
        return None if row is None or row.status in {"leased", "dead"} else change.call(self._keys(), row)

    def _updated(self, change: JobChange, answer: int) -> bool:
        if answer and change.replaced_blob is not None and self._core.sealing is not None:
            self._core.sealing.delete(change.replaced_blob)
        return answer == 1

    def rerun(self) -> Job[R_co]:
        """
        Enqueue a new job with the task, arguments and options of this one, which has ended; return its handle.

        The new one knows this one as `info().origin`. The arguments of a dead letter are kept as long as it is, those of a job
        that ended well as long as its result, up to 2 KiB. Raises ResultExpired without them, ConfigurationError for a job that
        has not ended, UnknownTask for a task that this program does not know, JobNotFound, and what `enqueue` does.
        """
        refuse_in_loop(self._core.client, "job.rerun()", "await job.arerun()")
        again = self._again(self._look_up())
        return cast("Job[R_co]", again.task.enqueue(again.outgoing, None, again.args, again.kwargs))

    async def arerun(self) -> Job[R_co]:
        """Awaitable form of `rerun`."""
        again = self._again(await self._alook_up())
        return cast("Job[R_co]", await again.task.aenqueue(again.outgoing, None, again.args, again.kwargs))

    def _again(self, lookup: JobLookup) -> Again:
        from conveyor.jobs.changes import run_again

        where, row, record = lookup
        if self._is_buffered() or (row is None and self._status(lookup) == "waiting"):
            raise ConfigurationError(
                f"Job {self.id} waits: only a job that has ended runs again. Nothing was enqueued."
            )
        return run_again(
            self._core, str(self.queue), self._bare_id, row, read_outcome(record) if where == "result" else None
        )


def watch_jobs(core: JobCore, jobs: Sequence[Job[Any]], after: object) -> Generator[JobUpdate, None, None]:
    """Yield what happens to *jobs*, until all have ended; *after* is checked at once."""
    check_after(after, len(jobs))

    def watch() -> Generator[JobUpdate, None, None]:
        for job in jobs:
            if job.queue is None:
                job._look_up()  # noqa: SLF001
        yield from core.watch_hub.watch(_changes(core, jobs, after))

    return watch()


def awatch_jobs(core: JobCore, jobs: Sequence[Job[Any]], after: object) -> AsyncGenerator[JobUpdate, None]:
    """Awaitable form of `watch_jobs`."""
    check_after(after, len(jobs))

    async def watch() -> AsyncGenerator[JobUpdate, None]:
        for job in jobs:
            if job.queue is None:
                await job._alook_up()  # noqa: SLF001
        updates = core.watch_hub.awatch(_changes(core, jobs, after))
        try:
            async for update in updates:
                yield update
        finally:
            await updates.aclose()

    return watch()


def _changes(core: JobCore, jobs: Sequence[Job[Any]], after: object) -> list[Changes]:
    decoder = core.decoder
    watched = [job._watched() for job in jobs]  # noqa: SLF001
    return [Changes(one, place, decoder) for one, place in zip(watched, places(after, watched), strict=True)]


def _cancellation() -> Generator[float, int, CancelAnswer | None]:
    """
    Yield the seconds to pause before each run of cancel.lua, receive its reply; return what to say.

    None: Redis does not know the job.
    """
    reply = first = yield 0.0
    for pause in _ANSWER_PAUSES if first == operations.CANCEL_ASKED else ():
        if (reply := (yield pause)) != operations.CANCEL_ASKED:
            break
    if first == operations.CANCEL_UNKNOWN:
        return None
    if first == operations.CANCEL_REMOVED:
        return "removed"
    if first not in {operations.CANCEL_ASKED, operations.CANCEL_RUNS}:
        return ""
    return "will-not-start" if reply == operations.CANCEL_NOT_STARTED else "asked"


def note_accepted(job: Job[Any], id: str) -> None:  # noqa: A002
    """Note the id that the queue answered with: the job's own, or that of a job that existed."""
    if isinstance(id, ExistingId):
        job.duplicate, job.conflict = True, id.conflict
    job._bare_id = id  # noqa: SLF001


def refuse_in_loop(client: Client, call: str, twin: str) -> None:
    """Raise ConfigurationError (E06) when an event loop runs in this thread, unless the app allows to block it."""
    if _get_running_loop() is not None and not client.allow_in_loop:
        raise ConfigurationError(
            f"{call} called while an event loop is running in this thread.\n"
            f"    Write:  {twin}          It would have blocked everything else on this loop. Nothing was done.",
            code="E06",
        )


def _is_known(lookup: JobLookup) -> bool:
    return lookup[0] != "none"


def _situation(core: JobCore, status: Status, queue: str, counts: inspection.QueueCounts) -> str:
    if status == "leased":
        return "A worker has leased it."
    if status == "scheduled":
        return "It is scheduled for later."
    if status not in {"ready", "waiting"}:
        return ""  # it ended a moment ago
    if counts.paused:
        return f"It is {status!r}, and queue {queue!r} is paused."
    if not counts.workers:
        return f"It is {status!r}, and no worker takes queue {queue!r}. Start one:  {core.worker_command}"
    return f"It is {status!r}, among {counts.ready:,} in queue {queue!r}, whose workers are busy."


def _timeout_seconds(timeout: Duration | None) -> float | None:
    return None if timeout is None else milliseconds(timeout, name="timeout") / 1000
