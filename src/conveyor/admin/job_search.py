"""Jobs chosen by their task, their last error and their time, and failures counted by what they have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from conveyor.admin.views import FailureGroup, instant
from conveyor.errors import ConfigurationError
from conveyor.ids import made_at_ms, public
from conveyor.payload.records import Failure
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store.inspection import JobRow

MOST_MESSAGES = 20
"""Messages that are told apart for one error of one task; the rest of its failures are one group."""
OTHER_MESSAGES = "(other messages)"
_SHOWN = 300
"""Characters of a message that groups compare and show."""
# The parts in which two failures of one kind differ: quoted texts, ids in hexadecimal digits, numbers.
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b(?=[a-f-]*\d)[0-9a-f]{2,}(?:-[0-9a-f]+)*\b|\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """
    A choice of jobs.

    *task*: of this task. *error*: whose last error, as "class: message", holds this text, in whatever case. *since*, *older*: whose
    state began not before, or not after: they died, ended, or were leased then, else were enqueued then. A job whose id its caller
    chose does not tell when it was enqueued, and has no such time. Raises ConfigurationError for an instant without a time zone.
    """

    task: str | None = None
    error: str | None = None
    since: datetime | None = None
    older: datetime | None = None

    def __post_init__(self) -> None:
        for name, at in (("since", self.since), ("older", self.older)):
            if at is not None and at.tzinfo is None:
                raise ConfigurationError(f"{name}= needs a time zone: use datetime.now(UTC) or tzinfo=ZoneInfo(…)")

    @property
    def needs_heads(self) -> bool:
        """Whether more than the task counts, so that heads of jobs are read to choose among them."""
        return self.error is not None or self.since is not None or self.older is not None

    def is_over(self, since: datetime | None) -> bool:
        """Tell whether no job that follows one of *since* is wanted, where they come newest first."""
        return self.since is not None and since is not None and since < self.since

    def accepts(self, since: datetime | None, error: str | None) -> bool:
        """Tell whether a job of the wanted task is wanted: *since* when its state lasts, and its last error."""
        if self.error is not None and (error is None or self.error.casefold() not in error.casefold()):
            return False
        if self.since is None and self.older is None:
            return True
        if since is None:
            return False
        return (self.since is None or since >= self.since) and (self.older is None or since <= self.older)


def last_failure(row: JobRow, queue: str, decoder: RecordDecoder) -> Failure | None:
    """Return the last error of a job, opened with the keys of *decoder*."""
    failures = row.state.failures_list()
    return decoder.failure(failures[-1], queue, row.id) if failures else None


def began_at(row: JobRow) -> datetime | None:
    """Return when the state of a job that is kept in its queue began, as `JobInfo.since` says."""
    ms = int(row.extra) if row.status == "dead" and row.extra else row.leased_ms or made_at_ms(row.id)
    return instant(ms) if ms else None


@dataclass(slots=True)
class _Tally:
    """A group while it is counted; times in ms. `message` and `id` of the newest."""

    count: int
    first: int
    last: int
    message: str
    pattern: str
    id: str


class FailureCount:
    """Counts dead letters by queue, task, class and message of their last error. The parts of messages that differ do not count."""

    def __init__(self, decoder: RecordDecoder) -> None:
        self._decoder = decoder
        self._tallies: dict[tuple[str, str, str, str], _Tally] = {}
        self._messages: dict[tuple[str, str, str], int] = {}
        self.counted = 0

    def add(self, name: str, queue: str, rows: Iterable[JobRow]) -> None:
        """Count dead letters of *queue*, which is a partition of queue *name* or the queue itself."""
        for row in rows:
            self.counted += 1
            failure = last_failure(row, queue, self._decoder)
            kind, message = ("", "") if failure is None else (failure.type, _first_line(failure.message))
            pattern, source, at = _VARIABLE.sub("…", message), (name, row.envelope.task, kind), int(row.extra or 0)
            tally = self._tallies.get((*source, pattern))
            if tally is None:
                tally = self._begin(source, message, pattern, at)
            tally.count += 1
            tally.first = min(tally.first, at)
            if tally.pattern != message:
                tally.pattern = pattern if tally.pattern != OTHER_MESSAGES else OTHER_MESSAGES
            if at >= tally.last:
                tally.last, tally.message, tally.id = at, message, public(queue, row.id)

    def _begin(self, source: tuple[str, str, str], message: str, pattern: str, at: int) -> _Tally:
        """Return the group of a message that is new: its own, or that of all others when there are too many."""
        begun = self._messages.get(source, 0)
        if begun >= MOST_MESSAGES:
            message = pattern = OTHER_MESSAGES
        self._messages[source] = begun + 1
        return self._tallies.setdefault((*source, pattern), _Tally(0, at, at, message, message, ""))

    def groups(self) -> list[FailureGroup]:
        """Return the groups, the largest first."""
        groups = [
            FailureGroup(
                queue, task, kind, one.message, one.pattern, one.count, instant(one.first), instant(one.last), one.id
            )
            for (queue, task, kind, _), one in self._tallies.items()
        ]
        return sorted(groups, key=lambda group: (-group.count, group.queue, group.task, group.type))


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:_SHOWN].rstrip()
