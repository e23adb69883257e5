"""
One attempt at one job, from its lease to its settlement, and the task it runs.

Both are laid out for the hot path.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from conveyor.errors import ConveyorError, PayloadError
from conveyor.ids import clean, made_at_ms, public
from conveyor.jobs.context import (
    Context,
    adopt_charges,
    adopt_spawned,
    charges_of,
    end_spawning,
    live_of,
    log_of,
    open_live,
    spawned_entries,
)
from conveyor.jobs.job_log import JobLog
from conveyor.jobs.live import LiveRecord
from conveyor.messaging import retry
from conveyor.messaging.declared_limits import cost_arguments
from conveyor.payload.failures import message, type_name
from conveyor.payload.formats import body_text
from conveyor.payload.live_records import Progress, StoredLine, open_notes, pack_notes, pack_progress
from conveyor.payload.records import AttemptHistory, Envelope
from conveyor.store.inspection import BUCKETS_MS
from conveyor.units import instant

if TYPE_CHECKING:
    import asyncio

    from conveyor.jobs.task import TaskDefinition
    from conveyor.messaging.declared_limits import DeclaredLimit
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.payload.redaction import Hide
    from conveyor.payload.signature import TaskSignature
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Settlement, TurnReport


Decode = Callable[[bytes], tuple[list[Any], dict[str, Any]]]


def _decode_entry(signature: TaskSignature) -> Decode:
    """
    Return a decoder for the entries of a plain list: the members of an object become arguments by name.

    An entry that does not fit so is the argument of a task that has exactly one.
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
    """A task as one consumer runs it, with the counters since the last turn."""

    __slots__ = (
        "costs",
        "decode",
        "delays",
        "early",
        "ends",
        "fills",
        "first_starts",
        "function",
        "has_webhook",
        "keep_ms",
        "keeps_logs",
        "kind",
        "limits",
        "load_error",
        "name",
        "stores",
        "successes",
        "task",
        "timeout",
        "timeout_hard",
        "waits",
    )  # fmt: skip

    def __init__(
        self, task: TaskDefinition, *, raw: bool = False, limits: Mapping[str, DeclaredLimit] | None = None
    ) -> None:
        """
        Args:
            task: the task.
            raw: its jobs are entries of a plain list, written by programs that know no parameters.
            limits: those that its jobs in this queue have, by name.
        """
        self.task = task
        self.limits = limits or {}
        self.costs = cost_arguments(self.limits.values())
        self.name = task.name
        self.load_error: ConveyorError | None = None
        self.function = task.function
        self.kind: str = task.run_in if task.batch is None else "batch"  # the kind of a job that is gathered first
        self.decode: Decode = _decode_entry(task.signature) if raw else task.signature.decode
        self.fills = bool(task.signature.injected)
        """True when the worker fills parameters of it: its context, or dependencies."""
        self.timeout: float | None = None if task.settings.timeout_ms is None else task.settings.timeout_ms / 1000
        hard_ms = task.settings.timeout_hard_ms
        self.timeout_hard: float | None = None if hard_ms is None else hard_ms / 1000
        self.early = task.settings.ack == "early"
        # One that is acknowledged has no place for them.
        self.keeps_logs = task.settings.logs != "never" and not self.early
        self.stores = not task.returns_none
        self.keep_ms, self.has_webhook = task.settings.keep_ms, task.settings.webhook is not None
        self.ends: dict[str, int] = {}
        """Attempts that ended otherwise since the last turn: `failed`, `retried` (a part of these), `cancelled` and `expired`."""
        self.successes: list[Attempt] = []
        """Attempts that have succeeded since the last turn."""
        self.first_starts: list[Attempt] = []
        """Attempts that have ended since the last turn, and were the first at their jobs."""
        self.delays: dict[int, int] = {}
        """First starts by how long after its instant a job started, in buckets as those of the durations."""
        self.waits: dict[str, float] = {}
        """The ms that jobs have waited, by what for."""

    @classmethod
    def unknown(cls, name: str, load_error: ConveyorError | None = None) -> Handler:
        """Return the handler of a job that cannot run here, because of *load_error*; None: the task is not known."""
        handler = cls.__new__(cls)
        handler.name, handler.kind, handler.load_error = name, "unknown", load_error
        handler.early = handler.stores = handler.keeps_logs = handler.has_webhook = False
        handler.keep_ms = 0
        handler.limits, handler.costs = {}, {}
        handler.ends = {}
        handler.successes, handler.first_starts, handler.delays, handler.waits = [], [], {}, {}
        handler.timeout = handler.timeout_hard = None
        return handler

    def _count_successes(self, into: dict[str, int]) -> None:
        """Add the successes since the last turn to *into*, and how long they ran."""
        # Once a turn, as starts are: a call for each end would take longer than what it counts.
        run, short, buckets, name = 0.0, 0, dict[int, int](), self.name
        for attempt in self.successes:
            ms = (attempt.ended - attempt.started) * 1000
            run += ms
            if ms <= 5:
                short += 1
            else:
                bucket = bisect_left(BUCKETS_MS, ms)
                buckets[bucket] = buckets.get(bucket, 0) + 1
        if short:
            buckets[0] = short
        into["done:" + name], into["ms:" + name] = len(self.successes), round(run)
        for bucket, count in buckets.items():
            into[f"le{bucket}:{name}"] = count
        self.successes = []

    def _count_starts(self, now_ms: int) -> None:
        """
        Count how long after they could have started jobs did, and what they may have waited for.

        One with an id of its caller's own, pushed without an instant, tells no time, and is left out.
        """
        # Once a turn, since at each end it would be a fifth of what an end costs. Jobs that are pushed together have the same
        # first letters of their ids, which are the instant, and mostly one bucket: neither is worked out for each of them.
        clock, delays, plain_ms = now_ms - perf_counter() * 1000, self.delays, 0.0
        last, made = "", None  # letters and their instant
        low, high, bucket, count = 0.0, 0.0, 0, 0  # above low and up to high ms is the bucket, with its count
        for attempt in self.first_starts:
            envelope = attempt.envelope
            if envelope is PLAIN_ENVELOPE or not (envelope.due_ms or envelope.own_id):
                letters = attempt.id[:8]
                if letters != last:
                    last, made = letters, made_at_ms(attempt.id)
                due = made
            else:
                due = envelope.due_ms or made_at_ms(attempt.id)
            if due is None:
                continue
            ms = clock + attempt.started * 1000 - due
            if not low < ms <= high:
                if count:
                    delays[bucket] = delays.get(bucket, 0) + count
                bucket, count = bisect_left(BUCKETS_MS, ms), 0
                low = BUCKETS_MS[bucket - 1] if bucket else -inf
                high = BUCKETS_MS[bucket] if bucket < len(BUCKETS_MS) else inf
            count += 1
            if ms < 0:  # the clocks of its maker and of the server differ
                ms = 0.0
            if envelope is PLAIN_ENVELOPE:
                plain_ms += ms
            else:
                attributes = envelope.attributes
                cause = "limit" if "\tl" in attributes else "group" if "\tg" in attributes else "queue"
                self.waits[cause] = self.waits.get(cause, 0.0) + ms
        if count:
            delays[bucket] = delays.get(bucket, 0) + count
        self.first_starts = []
        if last:
            self.waits["queue"] = self.waits.get("queue", 0.0) + plain_ms

    def drain(self, into: dict[str, int], now_ms: int) -> None:
        """Move the counters into *into*, as fields of this minute's hash. *now_ms*: the server's time."""
        if self.first_starts:
            self._count_starts(now_ms)
        name = self.name
        if self.successes:
            self._count_successes(into)
        if self.waits:
            for bucket, count in self.delays.items():
                into[f"at{bucket}:{name}"] = count
            for cause, ms in self.waits.items():
                into[f"wait:{cause}:{name}"] = round(ms)
            self.delays, self.waits = {}, {}
        if self.ends:
            for end, count in self.ends.items():
                into[f"{end}:{name}"] = count
            self.ends = {}


class GatheringGroup(Protocol):
    """A queue, as the batches that gather jobs of it are counted: batches, jobs that they have, and jobs that they want."""

    gathering: int
    gathered: int
    wanted: int


class PartSink(Protocol):
    """Writes the partial results of attempts."""

    is_used: bool

    def add(self, attempt: Attempt, data: bytes) -> Awaitable[None]:
        """Write an encoded part soon."""
        ...

    def end(self, attempt: Attempt) -> Settlement | None:
        """Return what a turn carries in front of the end of an attempt that emitted."""
        ...


class AttemptOwner(Protocol):
    """The consumer that leased an attempt, as the attempt and those that settle it use it."""

    keys: QueueKeys
    queue: str
    shared_state: Mapping[str, Any]
    report: TurnReport
    changed_handlers: set[Handler]
    blobs: dict[str, str]

    @property
    def sealing(self) -> PayloadPipeline | None: ...
    @property
    def part_writer(self) -> PartSink: ...
    @property
    def group(self) -> GatheringGroup: ...
    @property
    def now_ms(self) -> int: ...
    def note_backlog(self, change: int) -> None: ...
    def announce(self, attempt: Attempt) -> None: ...
    def on_started(self, attempt: Attempt) -> None: ...
    def on_abandoned(self) -> None: ...
    def on_finished(self, attempt: Attempt) -> None: ...
    def holds(self, attempt: Attempt) -> bool: ...
    def schedule(self, *, at_once: bool = False) -> None: ...
    def note_retry(self, attempt: Attempt, ms: int) -> None: ...
    def note_change(self, attempt: Attempt) -> None: ...
    def move_deadline(self, attempt: Attempt, seconds: float) -> None: ...
    def give_way(self, seconds: float) -> None: ...
    def encode_part(self, value: object) -> bytes: ...


PLAIN_ENVELOPE = Envelope("", b"")
OnFinished = Callable[["Attempt", Any, "BaseException | None"], None]
"""Called at the end of an attempt, with its result or its error."""


class Attempt(Struct, eq=False):
    """
    One run of a leased job. Times in seconds by `time.perf_counter`; 0.0 until then.

    A struct, since one is made of each job that is leased: its constructor in C takes 0.5 µs where one in Python takes 1.1.
    """

    consumer: AttemptOwner
    handler: Handler
    id: str
    body: bytes
    envelope: Envelope
    state: AttemptHistory | None = None
    number: int = 1
    started: float = 0.0
    ended: float = 0.0
    deadline: float | None = None
    context: Context | None = None
    runner: asyncio.Task[None] | None = None
    stop_reason: str | None = None
    """Timeout, cancel, stop, expired or lost; None while it is not being stopped."""
    crashed_before: bool = False
    waiter: asyncio.Future[Any] | None = None
    """Set while it is on a thread and middlewares wait for it."""
    sealed: bool = False
    """True while its body is still sealed, or of an older version."""
    unclaimed: list[Callable[[], Any]] | None = None
    """
    The function that a thread is to call, until the thread that starts it, or the loop that takes it back, removes it.

    None when the attempt was not given to threads: the event loop alone decides about it.
    """
    presumed: bool | None = None
    """Set when its crash was counted before it began (`Quarantine`): true when it runs alone."""

    def load_state(self, state: bytes) -> None:
        """Read what happened in earlier attempts."""
        try:
            self.state = AttemptHistory.decode(state)
        except Exception as error:  # whatever a program wrote there must not end the worker
            load_error = PayloadError(f"E15 The state cannot be read: {error}.", code="E15")
            self.handler = Handler.unknown(self.handler.name, load_error)
            return
        self.number = self.state.starts + 1
        self.crashed_before = self.state.crashes > 0

    @property
    def history(self) -> AttemptHistory:
        """The history of earlier attempts, as it was leased, with what this one has said of itself."""
        history, live = self.state or AttemptHistory(), self.live_record
        if live is None:
            return history
        place = (self.consumer.sealing, self.consumer.queue, self.id)
        if (progress := live.last_progress()) is not None:
            if progress.text and (hide := self.hider()) is not None:
                progress = Progress(progress.done, progress.total, hide(progress.text))
            history = replace(history, progress=pack_progress(place[0], progress, *place[1:]))
        if live.notes_json is not None:
            history = replace(history, notes=pack_notes(place[0], live.notes_json, *place[1:]))
        return history

    @property
    def running_history(self) -> AttemptHistory:
        """The history as Redis has it while the attempt runs: with the crash that was counted before it began."""
        history = self.history
        return retry.with_presumed_crash(history, alone=self.presumed) if self.presumed is not None else history

    @property
    def live_record(self) -> LiveRecord | None:
        """The progress and notes that the attempt has told; None when it told nothing."""
        return None if self.context is None else live_of(self.context)

    def adopt_live(self, progress: Progress | None, notes_json: bytes | None) -> None:
        """Adopt what it said of itself in another process."""
        open_live(self.open()).adopt(progress, notes_json)

    def stored_notes(self) -> dict[str, Any]:
        """Return what earlier attempts have noted; raises PayloadError where that cannot be read here."""
        state = self.state
        return {} if state is None else open_notes(self.consumer.sealing, state.notes, self.consumer.queue, self.id)

    @property
    def log(self) -> JobLog | None:
        """The lines that it has logged; None when it logged none, or they are not kept."""
        return None if self.context is None else log_of(self.context, made=True)

    def follow(self, seconds: float) -> None:
        """Have its lines sent at once for so many seconds."""
        if (log := log_of(self.open())) is not None:
            log.follow(seconds)

    def adopt_lines(self, lines: list[StoredLine]) -> None:
        """Add lines that it logged in another process."""
        if (log := log_of(self.open())) is not None:
            log.add(lines)

    def _make_log(self) -> JobLog:
        return JobLog(lambda: self.consumer.note_change(self))

    def _make_live(self) -> LiveRecord:
        return LiveRecord(lambda: self.consumer.note_change(self), self.stored_notes)

    @property
    def timeout(self) -> float | None:
        """The time limit in seconds, at which it is stopped from outside: the job's own, else its task's."""
        if self.handler.timeout_hard is not None:
            return self.handler.timeout_hard  # until then its process keeps the other one
        own = self.envelope.extra.timeout_ms
        return own / 1000 if own is not None else self.handler.timeout

    def hider(self) -> Hide | None:
        """Return what takes redacted values of its arguments out of texts about it; None where nothing is redacted."""
        if self.handler.kind == "unknown" or self.sealed:
            return None
        core = self.handler.task.core
        if not core.client.redaction.concerns(self.handler.name):
            return None
        return core.client.redaction.hider(body_text(self.body, core.formats, call=True), self.handler.name)

    @property
    def public_id(self) -> str:
        """The id as programs and people see it, with the queue."""
        return public(self.consumer.queue, self.id)

    def open(self) -> Context:
        """Return the context of the job, made at the first call."""
        if self.context is None:
            made, due = made_at_ms(self.id), self.envelope.due_ms
            self.context = Context(
                job_id=self.public_id,
                task=self.handler.name,
                queue=self.consumer.queue,
                attempt=self.number,
                headers=self.envelope.extra.headers,
                tags=self.envelope.tags if self.envelope.attributes else (),
                state=self.consumer.shared_state,
                deadline_hook=self.move_deadline,
                enqueued_at=None if made is None else instant(made),
                scheduled_for=None if due is None else instant(due),
                costs=self.costs,
                emit_hook=self.emit,
                live=self._make_live,
                log=self._make_log if self.handler.keeps_logs else None,
            )
            if self.handler.early:
                end_spawning(self.context)  # it has ended, as far as Redis knows
            if self.stop_reason is not None:
                self.flag_context()
        return self.context

    @property
    def spawned(self) -> list[bytes]:
        """The outbox entries of the jobs that it spawned so far."""
        return [] if self.context is None else spawned_entries(self.context)

    def emit(self, value: Any) -> Awaitable[None]:
        """Encode a partial result and write it soon. Raises PayloadError, and ConfigurationError after the end."""
        return self.emit_encoded(self.consumer.encode_part(value))

    def emit_encoded(self, data: bytes) -> Awaitable[None]:
        """Write an encoded partial result soon."""
        return self.consumer.part_writer.add(self, data)

    @property
    def costs(self) -> dict[str, str]:
        """The arguments that say the costs of its limits; none where it ends before it runs."""
        if not self.handler.costs or self.handler.early:
            return {}
        names = {text.split(":", 2)[1] for text in self.envelope.limits}
        return {name: argument for name, argument in self.handler.costs.items() if name in names}

    @property
    def charges(self) -> dict[str, int]:
        """The true costs that it has told so far, by the names of limits."""
        return {} if self.context is None else charges_of(self.context)

    def set_charges(self, charges: dict[str, int]) -> None:
        """Adopt the costs that it told in another process."""
        adopt_charges(self.open(), charges)

    def set_spawned(self, spawned: list[bytes]) -> None:
        """Add the entries of jobs that it spawned in another process."""
        adopt_spawned(self.open(), spawned)

    def flag_context(self) -> None:
        """Tell the job, through its context, that it is being stopped."""
        if self.context is not None:
            self.context.cancelled = True
            self.context.timed_out = self.stop_reason == "timeout"

    @property
    def label(self) -> str:
        """Task and id for a line of the log, cleaned: any program that writes to Redis chooses them."""
        return clean(f"{self.handler.name} {self.public_id}")

    def expire(self) -> bool:
        """Stop an attempt that would begin after its job has expired; tell whether it is so."""
        expires = self.envelope.expires_ms
        if expires is None or expires > self.consumer.now_ms:
            return False
        self.stop_reason = "expired"
        return True

    def move_deadline(self, ms: int) -> None:
        """Set the deadline *ms* ahead."""
        self.consumer.move_deadline(self, ms / 1000)

    def __repr__(self) -> str:
        return f"<Attempt {self.number} of {self.public_id} ({self.handler.name})>"


def error_line(error: Any, hide: Hide | None = None) -> str:
    """Return an error's class and text in one line for a log, whatever its `__str__` does; *hide* takes values out of it."""
    text = message(error) if hide is None else hide(message(error))
    return one_line(f"{type_name(error).rpartition('.')[2]}: {text}")


def one_line(text: str) -> str:
    """Return *text* in one line for a log, without control characters."""
    return clean(" ".join(text.split())[:500])
