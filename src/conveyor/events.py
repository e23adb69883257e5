"""Events as typed values: a listener of `app.on(JobDead)` or `app.on("dead")` gets one."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

import msgspec


class Event(msgspec.Struct, frozen=True):
    """An event of this process; each subclass is one kind."""

    name: ClassVar[str] = ""


class _Origin(Event, frozen=True, kw_only=True):
    id: str = ""
    at: datetime | None = None
    worker: str = ""


class JobEvent(_Origin, frozen=True):
    """
    An event of a job; `attempt` counts from 1, and `task` is "" for a message.

    `id`, `at` and `worker` are those of an event that `app.events` yields: where to go on (``app.events(queue, after=event.id)``),
    when it was, and the worker as ``host:pid``.
    """

    job_id: str
    task: str
    queue: str
    attempt: int


class JobStarted(JobEvent, frozen=True):
    """An attempt starts; as `app.events` yields it, a worker has leased the job."""

    name: ClassVar[str] = "started"


class JobDone(JobEvent, frozen=True):
    """An attempt succeeded; `duration` in seconds, as `app.events` yields it from the lease on."""

    name: ClassVar[str] = "done"
    duration: float


class JobRetried(JobEvent, frozen=True):
    """An attempt failed, and the next one follows after `delay` seconds."""

    name: ClassVar[str] = "retried"
    delay: float
    error: BaseException


class JobDead(JobEvent, frozen=True):
    """
    The job is dead: `reason` says why; `error` is the last one, None for a poison job.

    As `app.events` yields an event, its `error` is a `JobFailed` with the class and the first words.
    """

    name: ClassVar[str] = "dead"
    reason: str
    error: BaseException | None


class JobCancelledEvent(JobEvent, frozen=True):
    """
    A job was cancelled while this worker had leased it.

    As `app.events` yields it, wherever the job was: `reason` is "" when a caller cancelled it, `by` says who.
    """

    name: ClassVar[str] = "cancelled"
    reason: str = ""
    by: str = ""


class JobLost(JobEvent, frozen=True):
    """The lease was lost before the job ended: its outcome was refused, and another worker runs it."""

    name: ClassVar[str] = "lost"


class JobEnqueued(JobEvent, frozen=True):
    """A job, or a message, is in its queue; `due` is when it may start, None at once. Only `app.events` yields it."""

    name: ClassVar[str] = "enqueued"
    due: datetime | None = None


class JobReturned(JobEvent, frozen=True):
    """
    The job is back in its queue without a failure, to go on after `delay` seconds. Only `app.events` yields it.

    `reason`: "crashed", "handed back" (its worker stopped, or could not run it), "put off" (a snooze) or "limit".
    """

    name: ClassVar[str] = "returned"
    reason: str
    delay: float = 0.0


class JobPromoted(JobEvent, frozen=True):
    """A scheduled job was made ready, by somebody. Only `app.events` yields it."""

    name: ClassVar[str] = "promoted"
    by: str = ""


class JobUpdated(JobEvent, frozen=True):
    """A waiting job was changed, by somebody, or replaced by a push with its unique key. Only `app.events` yields it."""

    name: ClassVar[str] = "updated"
    by: str = ""
    due: datetime | None = None


class JobRedriven(JobEvent, frozen=True):
    """A dead letter was put back, by somebody. Only `app.events` yields it."""

    name: ClassVar[str] = "redriven"
    by: str = ""


class EventsMissed(JobEvent, frozen=True):
    """Events of the queue behind the one before are not kept any more. Only `app.events` yields it; it is of no job."""

    name: ClassVar[str] = "events-missed"


class WorkerStarted(Event, frozen=True):
    """A worker leases jobs from now on."""

    name: ClassVar[str] = "worker-started"
    worker: str


class WorkerStopped(Event, frozen=True):
    """A worker has stopped and handed back all its jobs."""

    name: ClassVar[str] = "worker-stopped"
    worker: str


class JobUpdate(msgspec.Struct, frozen=True):
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


class StateChanged(JobUpdate, frozen=True):
    """The job is scheduled, ready, waiting or leased now; `error` is that of the attempt before, where it has failed."""

    error: str = ""


class ProgressChanged(JobUpdate, frozen=True):
    """The job has told a progress: `done` of `total`, and a text; None and "" stand for what it did not tell."""

    done: float | None = None
    total: float | None = None
    text: str = ""


class JobEnded(JobUpdate, frozen=True):
    """The job is done, dead or cancelled; `reason` says why it was cancelled, `error` is the last one of a dead job."""

    reason: str = ""
    error: str = ""


EVENTS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (JobStarted, JobDone, JobRetried, JobDead, JobCancelledEvent, JobLost, WorkerStarted, WorkerStopped)
}
