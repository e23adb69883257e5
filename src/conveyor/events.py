"""Events as typed values: a listener of `app.on(JobDead)` or `app.on("dead")` gets one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """An event of this process; each subclass is one kind."""

    name: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class JobEvent(Event):
    """An event of a job; `attempt` counts from 1."""

    job_id: str
    task: str
    queue: str
    attempt: int


@dataclass(frozen=True, slots=True)
class JobStarted(JobEvent):
    """An attempt starts."""

    name: ClassVar[str] = "started"


@dataclass(frozen=True, slots=True)
class JobDone(JobEvent):
    """An attempt succeeded; `duration` in seconds."""

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
    """The job is dead: `reason` says why; `error` is the last one, None for a poison job."""

    name: ClassVar[str] = "dead"
    reason: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class JobCancelledEvent(JobEvent):
    """A job was cancelled while this worker had leased it."""

    name: ClassVar[str] = "cancelled"


@dataclass(frozen=True, slots=True)
class JobLost(JobEvent):
    """The lease was lost before the job ended: its outcome was refused, and another worker runs it."""

    name: ClassVar[str] = "lost"


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
