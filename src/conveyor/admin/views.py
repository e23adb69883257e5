"""Queues, jobs and workers as people see them: typed values made from stored records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
from msgspec.structs import asdict, replace

from conveyor.ids import made_at_ms, public
from conveyor.payload.live_records import Progress
from conveyor.payload.pipeline import MAX_LARGE
from conveyor.payload.records import Failure, Status
from conveyor.payload.redaction import Hide
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.payload.versions import sealed_name
from conveyor.store.audit_log import AuditRow
from conveyor.store.inspection import Ended, FinishedJob, JobRow, LeftLately, QueueCounts
from conveyor.store.job_filter import LIVE
from conveyor.units import digits, instant, instant_or_none, iso_timestamp

if TYPE_CHECKING:
    from conveyor.jobs.history import HistoryEntry
    from conveyor.jobs.schedules import Schedule
    from conveyor.jobs.why import Why
    from conveyor.messaging.limit_control import LimitState

STATES: tuple[Status, ...] = (*LIVE, "done")
"""The states that can be listed. `done`: recently finished jobs, about a thousand per queue."""


class QueueInfo(msgspec.Struct, frozen=True, gc=False):  # ten thousand at once: no cycle to look for
    """
    The contents of a queue.

    `oldest_age`: seconds since the oldest ready job could have started, None without one. For a queue with partitions
    the counts are sums; `workers` is the largest number of workers in one partition. `outbox`: jobs that its jobs
    spawned and that are not delivered to their queues yet. `unplaced`: jobs that have a record and are in no place;
    `repair` puts them back. `unanswered`: the partitions, or the queue itself, that are not counted because their server
    does not answer. `blocked`: producers that wait for room. `dropped`: jobs that were dropped for newer ones. `silent`: workers
    whose leases have ended, since they died or hang; `workers` are the others.
    """

    name: str
    ready: int
    scheduled: int
    waiting: int
    leased: int
    dead: int
    workers: int
    oldest_age: float | None
    paused: bool
    max_length: int | None
    partitions: int = 1
    outbox: int = 0
    unplaced: int = 0
    unanswered: tuple[str, ...] = ()
    blocked: int = 0
    dropped: int = 0
    silent: int = 0

    @property
    def stranded(self) -> bool:
        """Whether jobs could start, or spawned ones be delivered, and there is no worker for it; those that are leased are lost."""
        return self.workers == 0 and (
            (self.ready + self.waiting + self.leased > 0 and not self.paused) or self.outbox > 0
        )


def queue_info(name: str, counts: QueueCounts, partitions: int = 1, unanswered: tuple[str, ...] = ()) -> QueueInfo:
    """Return a queue that was counted."""
    oldest = counts.oldest_age if counts.ready else None  # the first entry may be the stub of a cancelled job
    return QueueInfo(
        name, counts.ready, counts.scheduled, counts.waiting, counts.leased, counts.dead, counts.workers,
        oldest, counts.paused, counts.max_length, partitions, counts.outbox, counts.unplaced, unanswered,
        counts.blocked, counts.dropped, counts.silent,
    )  # fmt: skip


class ErrorInfo(msgspec.Struct, frozen=True):
    """The error of one attempt. `frame`: the innermost frame of the user's own code, "" where the record has none."""

    attempt: int
    at: datetime
    type: str
    message: str
    traceback: str
    worker: str
    frame: str = ""


class JobInfo(msgspec.Struct, frozen=True):
    """
    One job or message in its present state.

    `id`: the public id. `task`: "" for a message. `attempt`: number of starts; `failures`: starts that used up the
    budget. `due`: when a scheduled job starts; `ended`: when a finished or dead one ended. `payload` and `result` are
    JSON text, None where nothing is kept.

    `leased_at`: since when a worker holds the job; it runs from then on, unless all places of the worker are taken. `worker`,
    `host` and `pid`: who holds it. `timeout_ms`: the time limit of an attempt, its own or that of its task in the worker that
    holds it; None: no limit, or nobody holds it and it has none of its own. `limits`: the limits that it counts for, as
    ``name`` or ``name:key``. `progress`, `notes`: what the job said of itself. `origin`: the job that it runs again.
    """

    id: str
    queue: str
    status: Status
    task: str | None = None
    attempt: int = 0
    failures: int = 0
    crashes: int = 0
    priority: int = 0
    enqueued: datetime | None = None
    due: datetime | None = None
    expires: datetime | None = None
    ended: datetime | None = None
    ran_ms: int | None = None
    unique: str | None = None
    group: str | None = None
    limits: list[str] = msgspec.field(default_factory=list)
    keys: list[str] = msgspec.field(default_factory=list)
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    payload: str | None = None
    errors: list[ErrorInfo] = msgspec.field(default_factory=list)
    worker: str | None = None
    result: str | None = None
    reason: str = ""
    leased_at: datetime | None = None
    host: str | None = None
    pid: int | None = None
    timeout_ms: int | None = None
    tags: list[str] = msgspec.field(default_factory=list)
    progress: Progress | None = None
    notes: dict[str, Any] = msgspec.field(default_factory=dict)
    origin: str | None = None

    @property
    def since(self) -> datetime | None:
        """When its state began: its end, its lease, else when it was enqueued, None where that is not kept."""
        return self.ended or self.leased_at or self.enqueued


class WorkerInfo(msgspec.Struct, frozen=True, gc=False):  # a process has one in each of its queues
    """
    One worker of one queue.

    `held`: number of leased jobs. `lease_ends`: when its leases expire unless it renews them. `seen`: when it last renewed them,
    and `read_at` when this was read, by the server's clock.
    """

    id: str
    queue: str
    host: str
    pid: int | None
    held: int
    lease_ends: datetime
    about: dict[str, Any]
    seen: datetime
    read_at: datetime


class JobReport(NamedTuple):
    """A job, why it waits or that it does not, and the states that it came into, oldest first."""

    info: JobInfo
    why: Why
    history: list[HistoryEntry]


class QueueCount(NamedTuple):
    """
    A queue, what ended in it in each of the last minutes, the oldest first, and its workers, as far as they were asked for.

    `left`: what left each of its partitions, where minutes were asked for and all answered.
    """

    info: QueueInfo
    ended: Sequence[Ended]
    workers: Sequence[WorkerInfo]
    left: Sequence[LeftLately] = ()


class FailureGroup(msgspec.Struct, frozen=True):
    """
    Dead letters of one queue that failed alike.

    `task`: "" for messages. `type`, `message`: of the last error, "" without one. `pattern`: the message with "…" for what differs.
    `first`, `last`: when the oldest and the newest died. `id`, `message`: of the newest.
    """

    queue: str
    task: str
    type: str
    message: str
    pattern: str
    count: int
    first: datetime
    last: datetime
    id: str


class FailureSummary(msgspec.Struct, frozen=True):
    """Groups of dead letters, the largest first, with how many of *total* dead letters were read for them: the newest."""

    groups: list[FailureGroup]
    read: int
    total: int


ActionOutcome = Literal[
    "retried", "enqueued", "changed", "cancelled", "asked", "deleted", "done", "dead", "refused", "not found"
]  # fmt: skip


class ActionResult(msgspec.Struct, frozen=True):
    """
    The result of an action on one id.

    `refused`, `not found`: nothing changed. `asked`: the worker that runs the job was asked to stop it. `done`, `dead`: it ended so
    before it was cancelled.
    """

    id: str
    outcome: ActionOutcome
    detail: str = ""

    @property
    def done(self) -> bool:
        """Whether the action was carried out."""
        return self.outcome not in {"refused", "not found"}


class AuditEntry(msgspec.Struct, frozen=True):
    """
    An action that somebody took.

    `who`: the user of the dashboard, or the account on a machine. `target`: a queue, ids of jobs, a schedule. `filter`: of an
    action on all jobs that a filter chooses. `count`: how many it was done to, None where that means nothing.
    """

    id: str
    at: datetime
    who: str
    what: str
    target: str = ""
    filter: str = ""
    count: int | None = None
    detail: str = ""


def audit_entry(row: AuditRow) -> AuditEntry:
    """Return an entry of the audit as it was stored."""
    fields, count = row.fields, row.fields.get("count", "")
    return AuditEntry(
        row.id, instant(int(row.id.partition("-")[0])), fields.get("who", ""), fields.get("what", ""), fields.get("target", ""),
        fields.get("filter", ""), digits(count), fields.get("detail", ""),
    )  # fmt: skip


def live_job(queue: str, row: JobRow, decoder: RecordDecoder, limit: int = MAX_LARGE) -> JobInfo:
    """
    Return a job that is kept in its queue, dead ones included.

    *decoder* shows at most *limit* bytes of its body.
    """
    envelope, state = row.envelope, row.state
    name = sealed_name(envelope.task, envelope.extra.version)
    at = int(row.extra) if row.status in {"scheduled", "dead"} and row.extra else None
    leased = row.status == "leased"
    payload, hide = decoder.preview_and_hide(envelope.body, queue, name, row.id, limit=limit, call=bool(envelope.task))
    info = JobInfo(
        id=public(queue, row.id),
        queue=queue,
        status=row.status,
        task=envelope.task,
        attempt=state.starts + leased,  # the stored count does not include this start
        failures=state.failures,
        crashes=state.crashes,
        priority=envelope.priority,
        enqueued=instant_or_none(made_at_ms(row.id)),
        due=instant_or_none(at) if row.status == "scheduled" else None,
        expires=instant_or_none(envelope.expires_ms),
        ended=instant_or_none(at) if row.status == "dead" else None,
        unique=envelope.unique,
        group=envelope.group,
        limits=[limit.partition(":")[2] for limit in envelope.limits],
        keys=[str(key) for key in envelope.keys],
        headers=decoder.headers(envelope.extra.headers),
        tags=envelope.tags,
        origin=envelope.extra.origin or None,
        payload=payload,
        errors=[error_info(decoder.failure(failure, queue, row.id)) for failure in state.failures_list()],
        worker=row.extra if leased else None,
        leased_at=instant_or_none(row.leased_ms),
        host=row.about.get("host"),
        pid=row.about.get("pid"),
        timeout_ms=envelope.extra.timeout_ms or _task_limit(row.about, envelope.task),
        progress=decoder.progress(state.progress, queue, row.id),
        notes=decoder.notes(state.notes, queue, row.id),
    )
    return info if hide is None else without_values(info, hide)


def without_values(info: JobInfo, hide: Hide) -> JobInfo:
    """Return a job without the values that are hidden in its payload, wherever else they stand."""
    progress = info.progress
    return replace(
        info, unique=None if info.unique is None else hide(info.unique), keys=[hide(key) for key in info.keys],
        group=None if info.group is None else hide(info.group), limits=[hide(one) for one in info.limits],
        tags=[hide(tag) for tag in info.tags], headers={name: hide(text) for name, text in info.headers.items()},
        errors=[replace(one, message=hide(one.message), traceback=hide(one.traceback)) for one in info.errors],
        progress=None if progress is None else replace(progress, text=hide(progress.text)),
        notes=_hidden_in(info.notes, hide), reason=hide(info.reason),
    )  # fmt: skip


def _hidden_in(value: Any, hide: Hide) -> Any:
    """Return a value of dicts, lists and scalars in which each text was changed by *hide*."""
    if isinstance(value, dict):
        return {key: _hidden_in(one, hide) for key, one in value.items()}
    if isinstance(value, list):
        return [_hidden_in(one, hide) for one in value]
    return hide(value) if isinstance(value, str) else value


def _task_limit(about: dict[str, Any], task: str) -> int | None:
    """Return the time limit that a worker said *task* has; None for a record that is damaged."""
    limits = about.get("timeouts")
    limit = limits.get(task) if isinstance(limits, dict) else None
    return limit if isinstance(limit, int) else None


def finished_job(queue: str, entry: FinishedJob) -> JobInfo:
    """Return a job from its entry in the list of recently finished jobs."""
    status: Any = entry.status
    return JobInfo(
        id=public(queue, entry.id), queue=queue, status=status, task=entry.task, ended=instant(entry.at),
        enqueued=instant_or_none(made_at_ms(entry.id)), ran_ms=entry.ran_ms,
    )  # fmt: skip


def error_info(failure: Failure) -> ErrorInfo:
    """Return a stored failure as an ErrorInfo."""
    return ErrorInfo(
        failure.attempt,
        instant(failure.at),
        failure.type,
        failure.message,
        failure.traceback,
        failure.worker,
        failure.frame,
    )


def schedule_view(one: Schedule) -> dict[str, Any]:
    """Return a schedule with its next and its last instants. `cron` and its `tz`, or `every`, are what it was put with."""
    from conveyor.jobs.schedules import timing_of  # what lists queues and workers needs no part of it

    timing = timing_of(one)
    seconds, rest = divmod(timing.every_ms or 0, 1000)
    every = None if timing.every_ms is None else f"{seconds}.{rest:03}s" if rest else f"{seconds}s"
    return {
        "cron": timing.cron, "tz": timing.tz, "every": every,
        "name": one.name, "when": one.when, "task": one.task, "queue": one.queue, "origin": one.origin, "paused": one.paused,
        "due": one.due, "overlap": one.overlap, "missed": one.missed, "fired": one.fired, "skipped": one.skipped,
        "next": one.next(5), "runs": [{**asdict(run), "drift": run.drift} for run in one.runs()],
    }  # fmt: skip


def limit_view(state: LimitState) -> dict[str, Any]:
    """Return a limit, as it is in effect and as code declares it."""
    from conveyor.messaging.declared_limits import short_limit

    return {
        "queue": state.queue, "name": state.name, "key": state.key, "kind": state.limit.kind, "by": state.limit.by,
        "limit": short_limit(state.limit), "declared": None if state.declared is None else short_limit(state.declared),
        "overridden": state.overridden, "used": state.used, "waiting": state.waiting, "opens_at": state.opens_at,
    }  # fmt: skip


def json_form(value: object) -> object:
    """Return a value that JSON does not have as one that it has; raises TypeError. Times are ISO 8601, durations seconds."""
    if isinstance(value, datetime):
        return iso_timestamp(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, msgspec.Struct):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
