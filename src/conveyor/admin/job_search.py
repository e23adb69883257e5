"""The last error and the time of jobs, by which they are chosen, and failures counted by what they have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

import msgspec

from conveyor.admin.views import FailureGroup
from conveyor.ids import public
from conveyor.payload.records import Failure
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store.inspection import JobRow
from conveyor.units import instant

MOST_MESSAGES = 20
"""Messages that are told apart for one error of one task; the rest of its failures are one group."""
OTHER_MESSAGES = "(other messages)"
_SHOWN = 300
"""Characters of a message that groups compare and show."""
# The parts in which two failures of one kind differ: quoted texts, ids in hexadecimal digits, numbers.
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b(?=[a-f-]*\d)[0-9a-f]{2,}(?:-[0-9a-f]+)*\b|\d+", re.IGNORECASE)


def last_failure(row: JobRow, queue: str, decoder: RecordDecoder) -> Failure | None:
    """Return the last error of a job, opened with the keys of *decoder*."""
    failures = row.state.failures_list()
    return decoder.failure(failures[-1], queue, row.id) if failures else None


class _Tally(msgspec.Struct):
    """A group while it is counted; times in ms. `message` and `id` of the newest."""

    count: int
    first: int
    last: int
    message: str
    pattern: str
    id: str


def message_pattern(message: str) -> tuple[str, str]:
    """Return the first line of a message, and the same with "…" for what differs between failures of one kind."""
    line = _first_line(message)
    return line, _VARIABLE.sub("…", line)


def kind_of(frame: str, message: str) -> str:
    """Return what tells failures of one task and class apart: the frame of the user's, else the message without what differs."""
    return frame or message_pattern(message)[1]


def fingerprint_of(queue: str, task: str, type_: str, kind: str) -> str:
    """Return the fingerprint of a failure of a queue, with its `kind_of`: 16 hexadecimal digits."""
    return sha256("\t".join((queue, task, type_, kind)).encode("utf-8", "replace")).hexdigest()[:16]


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
