"""
The exception tree.

Every error has a `code`, says what happened with its values, and says what to do.

    ConveyorError
    ├── StoreUnavailable       E01  Redis cannot be reached or does not answer (also E37)
    ├── ConfigurationError     E02  something is declared or set up wrongly (also E05 E06 E08 E09 E10 E18 E19 E34-E36 E46-E48)
    ├── PayloadError           E03  arguments or a value that cannot be stored or decoded (also E04 E15 E21 E22 E38-E43 E50)
    ├── UnknownTask            E05  no task of that name is registered here
    ├── LeaseLost              E14  the lease of the message is lost
    ├── ResultExpired          E20  the job has finished, and its value is no longer kept
    ├── QueueFull              E23  the queue, or Redis itself, is full
    ├── JobFailed              E24  the job ended in an error
    ├── JobCancelled           E25  the job was cancelled, or expired before it started
    ├── Duplicate              E26  a job with that unique key exists
    ├── JobNotFound            E27  no job with that id is known
    ├── RateLimited            E28  a service refused the job for now; its limit holds until then
    ├── DurabilityNotReached   E29  stored, but not confirmed by fsync or replicas as requested
    ├── QueueNotFound          E30  no queue of that name is known
    ├── ScheduleNotFound       E51  no schedule of that name is known
    ├── WorkerNotFound         E56  no worker of that name serves a queue
    └── InvalidFilter          E58  a filter of jobs that cannot be read, and where

`Snooze` and `RetryIn` are not errors: a job raises them to run again later, without using an attempt and with.
`BatchFailed` is not one of them either: a batch raises it to say which of its items failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

LONGEST_TEXT = 4_000
"""Characters of the text of an error: of a longer one, which repeats some large value, the middle is left out."""


class ConveyorError(Exception):
    """The root of all errors of this library; `code` names its entry in docs/errors.md."""

    code = "E00"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        if len(message) > LONGEST_TEXT:
            message = f"{message[: LONGEST_TEXT // 2]} … {message[-LONGEST_TEXT // 2 :]}"
        super().__init__(message)
        if code is not None:
            self.code = code


class StoreUnavailable(ConveyorError):
    """Redis cannot be reached, or did not answer in time; repeating the call is safe."""

    code = "E01"


class ConfigurationError(ConveyorError):
    """Something is declared or set up wrongly; nothing was stored."""

    code = "E02"


class InvalidFilter(ConfigurationError):
    """A filter of jobs cannot be read; `position` is the column, from 0, at which that shows."""

    code = "E58"

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position

    def __reduce__(self) -> tuple[type[InvalidFilter], tuple[str, int]]:
        """Support pickling, for callers with several processes."""
        return type(self), (str(self), self.position)


class PayloadError(ConveyorError):
    """A value does not fit its type, cannot be stored, or cannot be decoded; nothing was stored."""

    code = "E03"


class UnknownTask(ConveyorError):
    """No task of that name is registered in this program."""

    code = "E05"


class LeaseLost(ConveyorError):
    """The lease was given up, so another worker may hold the message; nothing was changed."""

    code = "E14"


class ResultExpired(ConveyorError):
    """The job finished, and the value it promised is no longer kept."""

    code = "E20"


class QueueFull(ConveyorError):
    """The queue has reached its maximum length, or Redis its memory limit; nothing was stored."""

    code = "E23"


class JobFailed(ConveyorError):
    """The job ended in an error: `type` (qualified name), `message` and `traceback` (text) describe it."""

    code = "E24"

    def __init__(self, job_id: str, type: str, message: str, traceback: str) -> None:  # noqa: A002  the contract's name
        super().__init__(f"Job {job_id} failed: {type}: {message}")
        self.job_id = job_id
        self.type = type
        self.message = message
        self.traceback = traceback

    def __reduce__(self) -> tuple[type[JobFailed], tuple[str, str, str, str]]:
        """Support pickling, for callers with several processes."""
        return type(self), (self.job_id, self.type, self.message, self.traceback)


class JobCancelled(ConveyorError):
    """The job was cancelled, or expired before it started."""

    code = "E25"


class Duplicate(ConveyorError):
    """A job with that unique key exists; `job_id` is its id."""

    code = "E26"

    def __init__(self, job_id: str, key: str) -> None:
        super().__init__(f"Job {job_id} already holds the unique key {key!r}. Nothing was enqueued.")
        self.job_id = job_id
        self.key = key

    def __reduce__(self) -> tuple[type[Duplicate], tuple[str, str]]:
        """Support pickling, for callers with several processes."""
        return type(self), (self.job_id, self.key)


class JobNotFound(ConveyorError):
    """No job with that id is known to the queue."""

    code = "E27"


class ScheduleNotFound(ConveyorError):
    """No schedule of that name is known; `name` is the name."""

    code = "E51"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no schedule {name!r}. `conveyor schedule list` shows those that are there.")
        self.name = name

    def __reduce__(self) -> tuple[type[ScheduleNotFound], tuple[str]]:
        """Support pickling, for callers with several processes."""
        return type(self), (self.name,)


class WorkerNotFound(ConveyorError):
    """No worker of that name serves a queue; `name` is the name."""

    code = "E56"

    def __init__(self, name: str, known: Sequence[str] = ()) -> None:
        listed = f" There are: {', '.join(sorted(known)[:10])}." if known else ""
        super().__init__(
            f"No worker {name!r} serves a queue, or not any more.{listed} `conveyor workers list` shows them."
        )
        self.name = name
        self.known = list(known)

    def __reduce__(self) -> tuple[type[WorkerNotFound], tuple[str, list[str]]]:
        """Support pickling, for callers with several processes."""
        return type(self), (self.name, self.known)


class RateLimited(ConveyorError):
    """
    Raised by a job, or a consumer of messages, that a service refused for now: a 429 with Retry-After.

    Its first rate limit, for its key, starts nothing until *after* has passed; the job itself waits there and uses no
    attempt. *after*: seconds, a `timedelta`, or a text such as ``"30s"``.
    """

    code = "E28"

    def __init__(self, after: float | str | timedelta) -> None:
        text = f"{after:g} s" if isinstance(after, int | float) else str(after)
        super().__init__(f"A service asked to wait for {text}.")
        self.after = after

    def __reduce__(self) -> tuple[type[RateLimited], tuple[float | str | timedelta]]:
        """Support pickling, for callers with several processes."""
        return type(self), (self.after,)


class DurabilityNotReached(ConveyorError):
    """
    The jobs are stored, but not confirmed by fsync or replicas as requested.

    They run, and repeating the push with the same id is safe. `job_ids` are all that the call stored, `job_id` the first.
    `asked` and `got` count replicas. `fsync` is None when no fsync was requested, else whether it was confirmed.
    """

    code = "E29"

    def __init__(
        self, message: str, *, job_ids: Sequence[str] = (), asked: int = 0, got: int = 0, fsync: bool | None = None
    ) -> None:
        super().__init__(message)
        self.job_ids = list(job_ids)
        self.asked = asked
        self.got = got
        self.fsync = fsync

    @property
    def job_id(self) -> str:
        """The id of the job; the first where there are several."""
        return self.job_ids[0] if self.job_ids else ""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Support pickling, for callers with several processes."""
        return _not_reached, (str(self), self.job_ids, self.asked, self.got, self.fsync)


def _not_reached(message: str, job_ids: list[str], asked: int, got: int, fsync: bool | None) -> DurabilityNotReached:
    return DurabilityNotReached(message, job_ids=job_ids, asked=asked, got=got, fsync=fsync)


class QueueNotFound(ConveyorError):
    """No message or job was ever pushed to a queue of that name."""

    code = "E30"


class Snooze(Exception):  # not an error: control flow with a meaning
    """
    Raised by a job that is to run again after *delay* without using an attempt.

    *delay*: seconds, a `timedelta`, or a text such as ``"5m"``.
    """

    def __init__(self, delay: float | str | timedelta) -> None:
        super().__init__(delay)
        self.delay = delay


class RetryIn(Exception):  # not an error: a failure that knows when to try again
    """
    Raised by a job or a consumer of messages that failed and is to be tried again after *delay*.

    It uses an attempt, as any failure does; only the pause is the caller's. *delay*: seconds, a `timedelta`, or
    a text such as ``"5m"``.
    """

    def __init__(self, delay: float | str | timedelta) -> None:
        super().__init__(delay)
        self.delay = delay


class BatchFailed(Exception):
    """
    Raised by the function of a batch task when some of its items failed; the others are done.

    *errors*: the error of each item that failed, by its index in the list. An item is tried again as a job is that raised
    this error, so a `RetryIn` or a `Snooze` is one too. *results*: one result for each item of the list, if results are
    wanted; those of failed items count for nothing.
    """

    def __init__(self, errors: Mapping[int, BaseException], *, results: Sequence[Any] | None = None) -> None:
        if not isinstance(errors, Mapping) or not all(
            isinstance(index, int) and index >= 0 and isinstance(error, BaseException)
            for index, error in errors.items()
        ):
            raise ConfigurationError(
                f"BatchFailed takes the errors of items by their index in the list, such as {{3: error}}, not {errors!r}."
            )
        super().__init__(f"{len(errors)} of the items failed: {', '.join(map(str, sorted(errors)))}")
        self.errors = dict(errors)
        self.results = None if results is None else list(results)
