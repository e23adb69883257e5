"""Events as typed values: a listener of `app.on(JobDead)` or `app.on("dead")` gets one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in this process; subclasses say what."""

    name: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class JobEvent(Event):
    """Something that happened to a job; `attempt` counts from 1."""

    job_id: str
    task: str
    queue: str
    attempt: int


@dataclass(frozen=True, slots=True)
class JobStarted(JobEvent):
    """An attempt begins."""

    name: ClassVar[str] = "started"


@dataclass(frozen=True, slots=True)
class JobDone(JobEvent):
    """An attempt succeeded; `duration` in seconds."""

    name: ClassVar[str] = "done"
    duration: float


@dataclass(frozen=True, slots=True)
class JobRetried(JobEvent):
    """An attempt failed and another follows after `delay` seconds."""

    name: ClassVar[str] = "retried"
    delay: float
    error: BaseException


@dataclass(frozen=True, slots=True)
class JobDead(JobEvent):
    """The job is given up; `reason` says why, `error` is the last one, None for a poison job."""

    name: ClassVar[str] = "dead"
    reason: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class JobCancelledEvent(JobEvent):
    """A job was cancelled while this worker held it."""

    name: ClassVar[str] = "cancelled"


@dataclass(frozen=True, slots=True)
class JobLost(JobEvent):
    """The lease was gone when the job ended: its outcome was refused, another worker runs it."""

    name: ClassVar[str] = "lost"


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    """A worker takes jobs from now on."""

    name: ClassVar[str] = "worker-started"
    worker: str


@dataclass(frozen=True, slots=True)
class WorkerStopped(Event):
    """A worker has handed everything back."""

    name: ClassVar[str] = "worker-stopped"
    worker: str


EVENTS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (JobStarted, JobDone, JobRetried, JobDead, JobCancelledEvent, JobLost, WorkerStarted, WorkerStopped)
}
