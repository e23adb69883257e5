"""
One attempt at one job, from its lease to its settlement.

What a worker needs to know of a task, laid out for the hot path.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError, PayloadError
from conveyor.ids import clean, made_at_ms, public
from conveyor.jobs.context import Context, adopt_spawned, end_spawning, spawned_entries
from conveyor.payload.failures import message, type_name
from conveyor.payload.records import AttemptHistory, Envelope, read_envelope

if TYPE_CHECKING:
    import asyncio

    from conveyor.jobs.task import TaskDefinition
    from conveyor.payload.signature import TaskSignature
    from conveyor.worker.protocols import AttemptOwner


BUCKETS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 3_600_000)
"""Upper bounds of the duration histogram; the last field counts what took longer."""


Decode = Callable[[bytes], tuple[list[Any], dict[str, Any]]]


def _decode_entry(signature: TaskSignature) -> Decode:
    """
    Return how an entry of a plain list becomes arguments: an object's members by name, as from `enqueue`.

    What does not fit so is the one argument of a task that has one.
    """
    (name, *others) = signature.parameters or ("",)

    def decode(body: bytes) -> tuple[list[Any], dict[str, Any]]:
        try:
            return signature.decode(body)
        except PayloadError:
            if others or not name:
                raise
            return signature.decode(b'{"%b":%b}' % (name.encode(), body))

    return decode


class Handler:
    """A task as one consumer runs it, with its counters since the last turn."""

    __slots__ = (
        "buckets",
        "decode",
        "done",
        "early",
        "failed",
        "function",
        "injected",
        "kind",
        "load_error",
        "name",
        "retried",
        "run_ms",
        "stores",
        "task",
        "timeout",
    )  # fmt: skip

    def __init__(self, task: TaskDefinition, *, raw: bool = False) -> None:
        """Look everything up once; *raw* for the entries of a plain list, written by programs that know no parameters."""
        self.task = task
        self.name = task.name
        self.load_error: ConveyorError | None = None
        self.function = task.function
        self.kind: str = task.run_in
        self.decode: Decode = _decode_entry(task.signature) if raw else task.signature.decode
        self.injected = task.signature.injected
        self.timeout: float | None = None if task.settings.timeout_ms is None else task.settings.timeout_ms / 1000
        self.early = task.settings.ack == "early"
        self.stores = not task.returns_none
        self.done = self.failed = self.retried = 0
        self.run_ms = 0.0
        self.buckets: dict[int, int] = {}

    @classmethod
    def unknown(cls, name: str, load_error: ConveyorError | None = None) -> Handler:
        """Return the handler of a job nobody here can run: why not is *unfit*, or that nobody knows the task."""
        found = cls.__new__(cls)
        found.name, found.kind, found.load_error = name, "unknown", load_error
        found.early = found.stores = False
        found.done = found.failed = found.retried = 0
        found.timeout = None
        return found

    def count_done(self, seconds: float) -> None:
        """Count a success that ran for *seconds*."""
        self.done += 1
        ms = seconds * 1000
        self.run_ms += ms
        bucket = 0 if ms <= 5 else bisect_left(BUCKETS_MS, ms)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    def drain(self, into: dict[str, int]) -> None:
        """Move the counters into *into*, as fields of this minute's hash."""
        name = self.name
        if self.done:
            into["done:" + name] = self.done
            into["ms:" + name] = round(self.run_ms)
            for bucket, count in self.buckets.items():
                into[f"le{bucket}:{name}"] = count
            self.buckets = {}
            self.done, self.run_ms = 0, 0.0
        if self.failed:
            into["failed:" + name] = self.failed
            self.failed = 0
        if self.retried:
            into["retried:" + name] = self.retried
            self.retried = 0


PLAIN = Envelope("", b"")


class Attempt:
    """A leased job in the hands of this worker. Times in seconds by `time.perf_counter`."""

    __slots__ = (
        "body",
        "consumer",
        "context",
        "ended",
        "envelope",
        "handler",
        "id",
        "number",
        "runner",
        "started",
        "state",
        "stopped",
        "suspect",
        "until",
        "waiter",
    )  # fmt: skip
    closed = False
    """True while its body is still wrapped, or of an older version."""

    def __init__(self, consumer: AttemptOwner, handler: Handler, id: str, body: bytes) -> None:  # noqa: A002
        """Take a plain, fresh job; `mark` and `recall` add what is rarer."""
        self.consumer = consumer
        self.handler = handler
        self.id = id
        self.body = body
        self.envelope: Envelope = PLAIN
        self.state: AttemptHistory | None = None
        self.number = 1
        self.started = 0.0
        self.ended = 0.0
        self.until: float | None = None
        self.context: Context | None = None
        self.runner: asyncio.Task[None] | None = None
        self.stopped: str | None = None  # why it is being stopped: timeout, cancel, stop or lost
        self.suspect = False
        self.waiter: asyncio.Future[Any] | None = None  # set while it is on a thread and middlewares wait for it

    def mark(self, data: bytes) -> None:
        """Read the whole envelope of a job that is not plain."""
        self.envelope = read_envelope(data)
        self.body = self.envelope.body

    def recall(self, state: bytes) -> None:
        """Read what happened to the job before."""
        try:
            self.state = AttemptHistory.decode(state)
        except Exception as error:  # whatever somebody wrote there must not end the worker
            load_error = PayloadError(f"E15 The state cannot be read: {error}.", code="E15")
            self.handler = Handler.unknown(self.handler.name, load_error)
            return
        self.number = self.state.starts + 1
        self.suspect = self.state.crashes > 0

    @property
    def history(self) -> AttemptHistory:
        """The state as it was leased."""
        return self.state or AttemptHistory()

    @property
    def timeout(self) -> float | None:
        """The time limit in seconds: the job's own, else its task's."""
        own = self.envelope.extra.timeout_ms
        return own / 1000 if own is not None else self.handler.timeout

    @property
    def public_id(self) -> str:
        """The id people see."""
        return public(self.consumer.queue, self.id)

    def open(self) -> Context:
        """Return the context handed to the job."""
        if self.context is None:
            made = made_at_ms(self.id)
            self.context = Context(
                job_id=self.public_id,
                task=self.handler.name,
                queue=self.consumer.queue,
                attempt=self.number,
                headers=self.envelope.extra.headers,
                state=self.consumer.shared_state,
                deadline_hook=self.move_deadline,
                enqueued_at=None if made is None else datetime.fromtimestamp(made / 1000, UTC),
            )
            if self.handler.early:
                end_spawning(self.context)  # it has ended, as far as Redis knows
            if self.stopped:
                self.flag()
        return self.context

    @property
    def spawned(self) -> list[bytes]:
        """What it spawned so far."""
        return [] if self.context is None else spawned_entries(self.context)

    def adopt(self, spawned: list[bytes]) -> None:
        """Take what it spawned in another process."""
        adopt_spawned(self.open(), spawned)

    def flag(self) -> None:
        """Tell the job, through its context, that it is being stopped."""
        if self.context is not None:
            self.context.cancelled = True
            self.context.timed_out = self.stopped == "timeout"

    @property
    def label(self) -> str:
        """Task and id for a line of the log: whoever writes to Redis chooses them."""
        return clean(f"{self.handler.name} {self.public_id}")

    def move_deadline(self, ms: int) -> None:
        """Give the attempt *ms* from now on."""
        self.consumer.move_deadline(self, ms / 1000)

    def __repr__(self) -> str:
        return f"<Attempt {self.number} of {self.public_id} ({self.handler.name})>"


class SealedAttempt(Attempt):
    """An attempt at a job whose body must be opened before it can start."""

    __slots__ = ("closed",)

    def __init__(self, consumer: AttemptOwner, handler: Handler, id: str, body: bytes) -> None:  # noqa: A002
        """Take it as it was leased."""
        super().__init__(consumer, handler, id, body)
        self.closed = True


def details(error: Any) -> str:
    """Return an error's class and text in one line for a log, whatever its `__str__` does."""
    return line(f"{type_name(error).rpartition('.')[2]}: {message(error)}")


def line(text: str) -> str:
    """Return *text* in one line for a log, with nothing that steers a terminal."""
    return clean(" ".join(text.split())[:500])
