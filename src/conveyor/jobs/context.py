"""The context of a running job: what it is, how much time it has, and the jobs that it spawns."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from conveyor.errors import ConfigurationError, JobCancelled
from conveyor.jobs.live import NUMBERS, TEXTS, LiveRecord, Notes, refuse_progress
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.job_log import JobLog

    Logger = logging.LoggerAdapter[logging.Logger]

_LOGGER = logging.getLogger("conveyor.job")
J_co = TypeVar("J_co", covariant=True)
J = TypeVar("J")
MOST_SPAWNED = 1000
"""Jobs that one attempt may spawn at most, because its end is one step in Redis."""


class SpawnableCall(Protocol[J_co]):
    """A call of a task as a value, such as `task.s(…)`, which a job can spawn."""

    def follow(self) -> tuple[J_co, bytes]:
        """Return the handle of the future job, and its entry in an outbox."""
        ...


class Context:
    """
    One attempt of one job, as `current()` returns it.

    `job_id` is the public id, `attempt` counts from 1, `state` holds the resources of the lifespan. `enqueued_at` and
    `scheduled_for` are instants with a time zone, or None. A thread cannot be interrupted: there `cancelled` becomes
    true when the time limit has passed or the job was cancelled. Read it, or call `check()`.

    In the function of a batch task it is the context of the call: id, attempt, headers and instants are those of the first
    item, and `items` holds the context of each item of the list. A single item may be `cancelled` there.
    """

    __slots__ = (
        "_charges", "_costs", "_deadline_hook", "_emit_hook", "_items", "_live", "_live_hook", "_log", "_log_hook", "_logger",
        "_spawned", "attempt", "cancelled",
        "enqueued_at", "headers", "job_id", "queue", "scheduled_for", "state", "tags", "task", "timed_out",
    )  # fmt: skip
    _live: LiveRecord | None
    _log: JobLog | None

    def __init__(
        self,
        *,
        job_id: str,
        task: str,
        queue: str,
        attempt: int,
        headers: Mapping[str, str],
        state: Mapping[str, Any],
        deadline_hook: Callable[[int], None] | None,
        enqueued_at: datetime | None = None,
        tags: Sequence[str] = (),
        scheduled_for: datetime | None = None,
        items: Callable[[], Iterable[Context]] | None = None,
        costs: Mapping[str, str] | None = None,
        emit_hook: Callable[[Any], Awaitable[None]] | None = None,
        live: Callable[[], LiveRecord] = LiveRecord,
        log: Callable[[], JobLog] | None = None,
    ) -> None:
        """
        Make the context of an attempt.

        Args:
            job_id: the public id.
            task: the name of the task.
            queue: the name of the queue.
            attempt: the number of the attempt.
            headers: those of the job.
            state: the resources of the lifespan.
            deadline_hook: gets the ms from now to the new time limit; None: no limit.
            enqueued_at: when the job was enqueued.
            tags: those of the job.
            scheduled_for: the planned instant of a scheduled job.
            items: returns the contexts of a batch's items; None: it is no batch.
            costs: the argument that says the cost of each limit with one, by its name.
            emit_hook: gets each partial result; None: none can be stored.
            live: makes what takes progress and notes, at their first use.
            log: makes what takes the lines that the job logs, at the first of them; None: they are not kept.

        """
        self.job_id = job_id
        self.task = task
        self.queue = queue
        self.attempt = attempt
        self.headers = headers
        self.tags = tags
        self.state = state
        self.enqueued_at = enqueued_at
        self.scheduled_for = scheduled_for
        self.cancelled = False
        self.timed_out = False
        self._spawned: list[bytes] | None = []
        self._items = items
        self._deadline_hook = deadline_hook
        self._costs = costs or {}
        self._emit_hook = emit_hook
        self._charges: dict[str, int] = {}
        self._live_hook, self._log_hook = live, log
        self._live = self._log = None
        self._logger: Logger | None = None

    @property
    def logger(self) -> Logger:
        """A logger whose records carry `job_id`, `task`, `queue` and `attempt`."""
        if self._logger is None:
            facts = {"job_id": self.job_id, "task": self.task, "queue": self.queue, "attempt": self.attempt}
            self._logger = logging.LoggerAdapter(_LOGGER, facts)
        return self._logger

    @property
    def items(self) -> tuple[Context, ...]:
        """The contexts of a batch's items, in the order of the list; empty where the job is no batch."""
        return () if self._items is None else tuple(self._items())

    def extend(self, duration: Duration) -> None:
        """Move the time limit of this attempt to *duration* from now."""
        ms = milliseconds(duration)
        if self._deadline_hook is not None:
            self._deadline_hook(ms)

    def emit(self, value: Any) -> Awaitable[None]:
        """
        Add *value* to the partial results of this job, which `job.stream()` reads while the job runs.

        Write ``await context.emit(value)`` in an `async def`, where it waits while Redis is slow, and ``context.emit(value)`` in
        a `def`. All parts reach Redis before the end of the job. A job that is tried again emits anew: readers see the
        attempt of each part. Raises PayloadError for a value that cannot be stored, and ConfigurationError (E44) after the end.
        """
        if self._items is not None:
            raise ConfigurationError(
                f"A batch of {self.task} emitted a value, which belongs to one of its items. Write: current().items[0].emit(…)."
            )
        if self._spawned is None:
            raise ConfigurationError(
                f'Job {self.job_id} emitted a value after its own end: with ack="early" a job ends before it runs, '
                "otherwise one of its threads is still running. Nothing was stored.",
                code="E44",
            )
        if self._emit_hook is None:
            raise ConfigurationError(
                f"Job {self.job_id} emitted a value, and this context belongs to no worker. Pass emit_hook= to it in a test."
            )
        return self._emit_hook(value)

    def progress(self, done: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """
        Say how far the job is: *done* of *total*, with a text, or one of them alone; `job.progress()` returns it.

        Call it as often as you like: at most four times a second something is written, and the last before the job ends.
        """
        live = self._live or open_live(self)
        if type(done) not in NUMBERS or type(total) not in NUMBERS or type(text) not in TEXTS or not (done or text):
            refuse_progress(done, total, text)
        if (done is not None and not 0 <= done < math.inf) or (total is not None and not 0 <= total < math.inf):
            refuse_progress(done, total, text)
        live.progress = (done, total, text)
        if not live.is_changed:
            live.note_change()

    @property
    def notes(self) -> Notes:
        """
        A dict of JSON values that the next attempt of the job finds again, after a retry and after a crash.

        It takes at most 8 KiB of JSON (PayloadError above). A change is written within a quarter of a second; one inside a
        value, as ``notes["seen"].append(7)``, when the attempt ends.
        """
        return (self._live or open_live(self)).notes

    def charge(self, cost: float, limit: str | None = None) -> None:
        """
        Say what this attempt really cost, in place of what its argument said before it started.

        A higher cost delays the next starts, a lower one gives the rest back, when the attempt ends; of several calls the
        last counts. *limit* names the limit (None: the one with ``cost=``). Raises ConfigurationError without such a limit.
        """
        if self._items is not None:
            raise ConfigurationError(
                f"A batch of {self.task} told a cost, which is that of one of its items. Write: current().items[0].charge(…)."
            )
        names = [limit] if limit is not None else list(self._costs)
        arguments = {self._costs.get(name) for name in names}
        if not names or None in arguments or len(arguments) > 1:
            known = ", ".join(map(repr, self._costs)) or "none"
            raise ConfigurationError(
                f"context.charge({cost!r}{f', {limit!r}' if limit is not None else ''}): {self.task} needs one limit with a cost, "
                f'such as Rate(100_000, "1m", cost="tokens"), and has {known}.'
                + (" Name the one that is meant: charge(…, limit=…)." if len(arguments) > 1 else "")
            )
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
            raise ConfigurationError(f"context.charge takes a number of at least 0, not {cost!r}.")
        self._charges.update(dict.fromkeys(names, math.ceil(cost)))

    def spawn(self, call: SpawnableCall[J]) -> J:
        """
        Enqueue *call* (`task.s(…)`, also of `task.options(…)`) exactly once if, and only if, this attempt succeeds.

        Return the handle of the future job, with its id. Nothing is sent before this job has ended, and nothing at
        all when the attempt fails, is cancelled, or has lost its lease. Raises PayloadError for arguments that cannot
        be stored, and ConfigurationError (E44) for more than 1,000 jobs or after the end of the job.
        """
        if self._items is not None:
            raise ConfigurationError(
                f"A batch of {self.task} spawned a job, which belongs to one of its items: that item may fail and the others not. "
                "Write: current().items[0].spawn(…). Nothing was enqueued.",
                code="E44",
            )
        if self._spawned is None:
            raise ConfigurationError(
                f'Job {self.job_id} spawned a job after its own end: with ack="early" a job ends before it runs, '
                "otherwise one of its threads is still running. Nothing was enqueued. Use enqueue instead.",
                code="E44",
            )
        if len(self._spawned) >= MOST_SPAWNED:
            raise ConfigurationError(
                f"Job {self.job_id} spawned {MOST_SPAWNED:,} jobs, the most that one job can spawn. "
                "Spawn a job that spawns the rest.",
                code="E44",
            )
        job, entry = call.follow()
        self._spawned.append(entry)
        return job

    def check(self) -> None:
        """Raise TimeoutError when the time limit has passed, JobCancelled when the job was cancelled."""
        if self.timed_out:
            raise TimeoutError(f"Job {self.job_id} has used up its time limit.")
        if self.cancelled:
            raise JobCancelled(f"Job {self.job_id} was cancelled.")

    def __repr__(self) -> str:
        return f"<Context {self.job_id} {self.task} attempt {self.attempt}>"


class _ContextProxy(Context):
    """Stands for the context of a future job; inside a job it passes everything on to that job's context."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        # The slots are empty, so every attribute arrives here.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(current_context(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(current_context(name), name, value)

    def __repr__(self) -> str:
        return "current()"


class ContextSource(Protocol):
    """Makes a context at first use: most jobs never use one."""

    def open(self) -> Context:
        """Return the context."""
        ...


CURRENT: ContextVar[Context | ContextSource | None] = ContextVar("conveyor_context", default=None)
_PLACEHOLDER = _ContextProxy()


def current() -> Context:
    """
    Return the context of the running job.

    Outside a job it returns a placeholder. As the default value of a task's parameter the placeholder makes the worker
    pass the real context. Any other use of it raises ConfigurationError.
    """
    source = CURRENT.get()
    return _PLACEHOLDER if source is None else _context(source)


def _context(source: Context | ContextSource) -> Context:
    return source if isinstance(source, Context) else source.open()


def current_context(wanted: str) -> Context:
    """Return the context of the running job; raises ConfigurationError, which names the member that was *wanted*, outside one."""
    source = CURRENT.get()
    if source is None:
        # Methods such as progress() and emit() read a slot first.
        asked = "current()" if wanted.startswith("_") else f"context.{wanted}"
        raise ConfigurationError(
            f"{asked}: no job is running here. A context exists only while a worker runs a job; "
            "in a test, pass one: Context(job_id=…, …)."
        )
    return _context(source)


def queue_of_job() -> str | None:
    """Return the queue of the job that runs here, None outside a job."""
    source = CURRENT.get()
    return None if source is None else _context(source).queue


def spawned_entries(context: Context) -> list[bytes]:
    """Return what an attempt spawned so far: entries of an outbox."""
    return context._spawned or []  # noqa: SLF001


def adopt_spawned(context: Context, entries: list[bytes]) -> None:
    """Make *entries*, spawned in another process, those of this context."""
    context._spawned = entries  # noqa: SLF001


def charges_of(context: Context) -> dict[str, int]:
    """Return the true costs that an attempt has told so far, by the names of limits."""
    return context._charges  # noqa: SLF001


def adopt_charges(context: Context, charges: dict[str, int]) -> None:
    """Make *charges*, told in another process, those of this context."""
    context._charges = charges  # noqa: SLF001


def live_of(context: Context) -> LiveRecord | None:
    """Return what an attempt has said of itself; None when it said nothing."""
    return context._live  # noqa: SLF001


def open_live(context: Context) -> LiveRecord:
    """Return what takes the progress and the notes of an attempt, made at the first call; raises ConfigurationError in a batch."""
    if context._items is not None:  # noqa: SLF001
        raise ConfigurationError(
            f"A batch of {context.task} has no progress and no notes of its own, since its items end each for itself. "
            "Write: current().items[0].progress(…)."
        )
    live = context._live  # noqa: SLF001
    if live is None:
        live = context._live = context._live_hook()  # noqa: SLF001
    return live


def log_of(source: Context | ContextSource, *, made: bool = False) -> JobLog | None:
    """Return what takes the lines of a job, made at the first call unless *made*; None: none are kept, or none was made."""
    context = _context(source)
    if context._log is None and context._log_hook is not None and not made:  # noqa: SLF001
        context._log = context._log_hook()  # noqa: SLF001
    return context._log  # noqa: SLF001


def share_log(context: Context, log: JobLog) -> None:
    """Make the lines of a batch those of one of its items, unless that has some of its own."""
    context._log = context._log or log  # noqa: SLF001


def end_spawning(context: Context) -> None:
    """Refuse what is spawned from now on: the job has ended, as far as Redis knows."""
    context._spawned = None  # noqa: SLF001
