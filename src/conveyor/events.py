"""Events as typed values: a listener of `app.on(JobDead)` or `app.on("dead")` gets one."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """An event of this process; each subclass is one kind."""

    name: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class JobEvent(Event):
    """
    An event of a job; `attempt` counts from 1, and `task` is "" for a message.

    `id`, `at` and `worker` are those of an event that `app.events` yields: where to go on (``app.events(queue, after=event.id)``),
    when it was, and the worker as ``host:pid``.
    """

    job_id: str
    task: str
    queue: str
    attempt: int
    id: str = field(default="", kw_only=True)
    at: datetime | None = field(default=None, kw_only=True)
    worker: str = field(default="", kw_only=True)


@dataclass(frozen=True, slots=True)
class JobStarted(JobEvent):
    """An attempt starts; as `app.events` yields it, a worker has leased the job."""

    name: ClassVar[str] = "started"


@dataclass(frozen=True, slots=True)
class JobDone(JobEvent):
    """An attempt succeeded; `duration` in seconds, as `app.events` yields it from the lease on."""

    name: ClassVar[str] = "done"
    duration: float


@dataclass(frozen=True, slots=True)
class JobRetried(JobEvent):
    """An attempt failed, and the next one follows after `delay` seconds."""

    name: ClassVar[str] = "retried"
    delay: float
    error: BaseException


@dataclass(frozen=True, slots=True)
class JobDead(JobEvent):
    """
    The job is dead: `reason` says why; `error` is the last one, None for a poison job.

    As `app.events` yields an event, its `error` is a `JobFailed` with the class and the first words.
    """

    name: ClassVar[str] = "dead"
    reason: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class JobCancelledEvent(JobEvent):
    """
    A job was cancelled while this worker had leased it.

    As `app.events` yields it, wherever the job was: `reason` is "" when a caller cancelled it, `by` says who.
    """

    name: ClassVar[str] = "cancelled"
    reason: str = ""
    by: str = ""


@dataclass(frozen=True, slots=True)
class JobLost(JobEvent):
    """The lease was lost before the job ended: its outcome was refused, and another worker runs it."""

    name: ClassVar[str] = "lost"


@dataclass(frozen=True, slots=True)
class JobEnqueued(JobEvent):
    """A job, or a message, is in its queue; `due` is when it may start, None at once. Only `app.events` yields it."""

    name: ClassVar[str] = "enqueued"
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobReturned(JobEvent):
    """
    The job is back in its queue without a failure, to go on after `delay` seconds. Only `app.events` yields it.

    `reason`: "crashed", "handed back" (its worker stopped, or could not run it), "put off" (a snooze) or "limit".
    """

    name: ClassVar[str] = "returned"
    reason: str
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class JobPromoted(JobEvent):
    """A scheduled job was made ready, by somebody. Only `app.events` yields it."""

    name: ClassVar[str] = "promoted"
    by: str = ""


@dataclass(frozen=True, slots=True)
class JobUpdated(JobEvent):
    """A waiting job was changed, by somebody, or replaced by a push with its unique key. Only `app.events` yields it."""

    name: ClassVar[str] = "updated"
    by: str = ""
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobRedriven(JobEvent):
    """A dead letter was put back, by somebody. Only `app.events` yields it."""

    name: ClassVar[str] = "redriven"
    by: str = ""


@dataclass(frozen=True, slots=True)
class EventsMissed(JobEvent):
    """Events of the queue behind the one before are not kept any more. Only `app.events` yields it; it is of no job."""

    name: ClassVar[str] = "events-missed"


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    """A worker leases jobs from now on."""

    name: ClassVar[str] = "worker-started"
    worker: str


@dataclass(frozen=True, slots=True)
class WorkerStopped(Event):
    """A worker has stopped and handed back all its jobs."""

    name: ClassVar[str] = "worker-stopped"
    worker: str


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """
    An update that `job.watch()` yields: the state of a job has changed.

    `id` is where to go on (``job.watch(after=update.id)``). `attempt` counts from 1; before a start it is the number of the
    attempt to come. `at` is the instant where it is known.
    """

    id: str
    job_id: str
    state: str
    attempt: int
    at: datetime | None


@dataclass(frozen=True, slots=True)
class StateChanged(JobUpdate):
    """The job is scheduled, ready, waiting or leased now; `error` is that of the attempt before, where it has failed."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class ProgressChanged(JobUpdate):
    """The job has told a progress: `done` of `total`, and a text; None and "" stand for what it did not tell."""

    done: float | None = None
    total: float | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class JobEnded(JobUpdate):
    """The job is done, dead or cancelled; `reason` says why it was cancelled, `error` is the last one of a dead job."""

    reason: str = ""
    error: str = ""


EVENTS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (JobStarted, JobDone, JobRetried, JobDead, JobCancelledEvent, JobLost, WorkerStarted, WorkerStopped)
}
