"""A handle of one job: its id, how it stands, how it ended."""

from __future__ import annotations

from asyncio import _get_running_loop, sleep
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from conveyor import ids
from conveyor.errors import ConfigurationError, JobCancelled, JobFailed, JobNotFound, ResultExpired
from conveyor.payload.records import Failure, Status, read_outcome, read_whatever
from conveyor.store import inspection, operations
from conveyor.store.operations import ExistingId
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.results import Answer, ResultSubscriber
    from conveyor.payload.codec import ValueCodec
    from conveyor.payload.formats import FormatRegistry
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys

_LOOK = 0.02
"""Seconds between two looks at the buffer of this program."""
R_co = TypeVar("R_co", covariant=True)
Shown = tuple[str, inspection.JobRow | None, bytes]


class ResultSpec(Protocol):
    """What a task says about its results."""

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
    def definitions(self) -> Mapping[str, ResultSpec]: ...
    @property
    def sealing(self) -> PayloadPipeline | None: ...
    @property
    def formats(self) -> FormatRegistry: ...

    def keys(self, queue: str) -> QueueKeys: ...


class Job(Generic[R_co]):
    """
    A handle of one job; making one costs nothing and asks nothing.

    `id` is the public id, `duplicate` is true when the enqueue met a job that existed. `queue` and `task` are None
    for a handle made from an id that does not tell them, until something was asked.
    """

    __slots__ = ("_bare_id", "_core", "_result_spec", "duplicate", "queue", "task")

    def __init__(
        self,
        core: JobCore,
        bare_id: str,
        queue: str | None,
        result_spec: ResultSpec | None = None,
        *,
        duplicate: bool = False,
    ) -> None:
        """
        Make a handle; nothing is sent.

        Args:
            core: the inside of the app.
            bare_id: the id without the queue.
            queue: the queue or partition, None when it is to be looked for.
            result_spec: the task, None when it is not known yet.
            duplicate: whether the enqueue met a job that existed.

        """
        self._core = core
        self._bare_id = bare_id
        self._result_spec = result_spec
        self.queue = queue
        self.task: str | None = None if result_spec is None else result_spec.name
        self.duplicate = duplicate

    @property
    def id(self) -> str:
        """The public id: ``queue:id`` when it was generated, as it is when the caller gave it."""
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
        Return scheduled, ready, leased, done, dead or cancelled; waiting for a spawned job that has not left its parent,
        and for one in the buffer of this program.

        A job that Redis no longer knows is done: one that succeeded and keeps no result leaves no record. Raises
        JobNotFound for an id of the caller's own that no queue has seen within a day.
        """
        refuse_in_loop("job.status()", "await job.astatus()")
        if self._waits_here():
            return "waiting"
        return self._status(self._show())

    async def astatus(self) -> Status:
        """Do the same without blocking the event loop."""
        if self._waits_here():
            return "waiting"
        return self._status(await self._ashow())

    def _status(self, shown: Shown) -> Status:
        place, row, record = shown
        if row is not None:
            return row.status
        if place == "result":
            return read_outcome(record).status
        if place == "none" and not record and ids.may_come(self._bare_id):
            return "waiting"  # its parent has not ended, or has a moment ago
        return "cancelled" if place == "cancelled" else "done"

    def _waits_here(self) -> bool:
        buffer = self._core.client.buffer
        return buffer is not None and buffer.holds(self._bare_id)

    def _left_here(self, seconds: float | None) -> float | None:
        """Wait until the buffer of this program has delivered it; return what is left of so many seconds."""
        buffer = self._core.client.buffer
        if buffer is None or not buffer.holds(self._bare_id):
            return seconds
        began = monotonic()
        if not buffer.wait_for(self._bare_id, seconds) and seconds is not None:
            raise self._too_late(seconds)
        return None if seconds is None else max(0.0, seconds - (monotonic() - began))

    async def _aleft_here(self, seconds: float | None) -> float | None:
        """Do the same without blocking the event loop."""
        began = monotonic()
        while self._waits_here():
            if seconds is not None and monotonic() - began >= seconds:
                raise self._too_late(seconds)
            await sleep(_LOOK)
        return None if seconds is None else max(0.0, seconds - (monotonic() - began))

    def _show(self) -> Shown:
        client = self._core.client
        if self.queue is not None:
            return self._found(self.queue, client.run(inspection.get_job(self._core.keys(self.queue), self._bare_id)))
        for queue in self._likely(client.queues()):
            shown = client.run(inspection.get_job(self._core.keys(queue), self._bare_id))
            if _is_known(shown):
                return self._found(queue, shown)
        raise self._unknown()

    async def _ashow(self) -> Shown:
        client = self._core.client
        if self.queue is not None:
            return self._found(
                self.queue, await client.arun(inspection.get_job(self._core.keys(self.queue), self._bare_id))
            )
        for queue in self._likely(await client.aqueues()):
            shown = await client.arun(inspection.get_job(self._core.keys(queue), self._bare_id))
            if _is_known(shown):
                return self._found(queue, shown)
        raise self._unknown()

    def _likely(self, queues: list[str]) -> list[str]:
        from conveyor.messaging.partitions import likely_first

        return likely_first(queues, self._bare_id)

    def _found(self, queue: str, shown: Shown) -> Shown:
        self.queue = queue
        if self.task is None and shown[1] is not None:
            self.task = name = shown[1].envelope.task
            self._result_spec = self._core.definitions.get(name)
        return shown

    def _unknown(self) -> JobNotFound:
        return JobNotFound(
            f"No queue of namespace {self._core.namespace!r} knows a job {self._bare_id!r}. An id of your own is "
            "remembered until a day after its job ended."
        )

    # -- result ---------------------------------------------------------------------------------------------------

    def result(self, timeout: Duration | None = None) -> R_co:
        """
        Wait until the job has ended and return what it returned.

        Raises TimeoutError after *timeout* (None: wait for ever), JobFailed, JobCancelled, and ResultExpired when the
        job finished and the value it promised is no longer kept. The wait is by push: nothing is polled.
        """
        refuse_in_loop("job.result()", "await job.aresult()")
        seconds = _seconds(timeout)
        left = self._left_here(seconds)
        if self.task is None:
            self._show()  # the task says what type the result has, and only a live job names it
        answer = self._core.result_subscriber.wait(self._keys(), self._bare_id, left)
        return self._value(answer, seconds)

    async def aresult(self, timeout: Duration | None = None) -> R_co:  # noqa: ASYNC109  the twin of result
        """Do the same without blocking the event loop."""
        seconds = _seconds(timeout)
        left = seconds if self._core.client.buffer is None else await self._aleft_here(seconds)
        if self.task is None:
            await self._ashow()
        answer = await self._core.result_subscriber.await_(self._keys(), self._bare_id, left)
        return self._value(answer, seconds)

    def _keys(self) -> QueueKeys:
        assert self.queue is not None
        return self._core.keys(self.queue)

    def _value(self, answer: Answer | None, seconds: float | None) -> R_co:
        if answer is None:
            raise self._too_late(seconds)
        word, data = answer
        if word == "dead":
            _, state, _ = read_whatever(b"\n\n", data)
            errors = state.failures_list()
            raise self._failed(errors[-1] if errors else None, f"its worker crashed {state.crashes} times while it ran")
        if word == "gone":
            return self._nothing(just_ended=data == b"done")
        outcome = read_outcome(data)
        if outcome.status == "dead":
            raise self._failed(outcome.failure, outcome.reason)
        value = bytes(outcome.value)
        if outcome.packed or (self._core.sealing is not None and data and outcome.status == "done"):
            from conveyor.payload.pipeline import MAX_LARGE
            from conveyor.payload.sealed_records import open_result

            limit = MAX_LARGE if self._result_spec is None else self._result_spec.results.max_payload
            value = open_result(self._core.sealing, outcome, str(self.queue), self._bare_id, limit)
        if outcome.status == "cancelled":
            why = "expired before it started" if outcome.reason == "expired" else "was cancelled"
            raise JobCancelled(f"Job {self.id} {why}.")
        if self._result_spec is None:
            from conveyor.payload.formats import FormatCodec

            what = f"The result of {self.id}"
            untyped: FormatCodec[R_co] = FormatCodec(formats=self._core.formats, what=what, max_payload=1 << 30)
            return untyped.decode(value)
        return cast("R_co", self._result_spec.results.decode(value))

    def _too_late(self, seconds: float | None) -> TimeoutError:
        return TimeoutError(f"Job {self.id} has not ended within {seconds:g} s. It goes on; ask again later.")

    def _nothing(self, *, just_ended: bool) -> R_co:
        # Of a task that is not known here, nobody can say whether it had promised a value.
        promised = self._result_spec.promises_result if self._result_spec is not None else not just_ended
        if promised:
            raise ResultExpired(
                f"Job {self.id} has finished, and its result is not kept any more (or never was). "
                "Ask earlier, or keep it longer: @app.task(keep_result='1h')."
            )
        return cast("R_co", None)

    def _failed(self, failure: Failure | None, reason: str) -> JobFailed:
        if failure is None:
            return JobFailed(self.id, "Crashed", reason, "")
        if failure.packed:
            from conveyor.payload.sealed_records import open_failure

            failure = open_failure(self._core.sealing, failure, str(self.queue), self._bare_id)
        return JobFailed(self.id, failure.type, failure.message, failure.traceback)

    # -- cancelling -----------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """
        Cancel the job: it will not start, and a running one is asked to stop.

        Return False when it had ended already; raises TimeoutError while it waits in a buffer. Whether a running job
        does stop is its own affair: `result` tells.
        """
        refuse_in_loop("job.cancel()", "await job.acancel()")
        if self.queue is None:
            self._show()
        self._left_here(self._core.client.patience)
        return self._core.client.run(operations.cancel(self._keys(), self._bare_id)) > 0

    async def acancel(self) -> bool:
        """Do the same without blocking the event loop."""
        if self.queue is None:
            await self._ashow()
        await self._aleft_here(self._core.client.patience)
        return await self._core.client.arun(operations.cancel(self._keys(), self._bare_id)) > 0


def note_accepted(job: Job[Any], id: str) -> None:  # noqa: A002
    """Note the id that the queue answered with: the job's own, or that of a job that existed."""
    job.duplicate = isinstance(id, ExistingId)
    job._bare_id = id  # noqa: SLF001


def refuse_in_loop(call: str, twin: str) -> None:
    """Raise ConfigurationError (E06) when an event loop runs in this thread."""
    if _get_running_loop() is not None:
        raise ConfigurationError(
            f"{call} called while an event loop is running in this thread.\n"
            f"    Write:  {twin}          It would have blocked everything else on this loop. Nothing was done.",
            code="E06",
        )


def _is_known(shown: Shown) -> bool:
    return shown[0] != "none" or bool(shown[2])


def _seconds(timeout: Duration | None) -> float | None:
    return None if timeout is None else milliseconds(timeout, name="timeout") / 1000
