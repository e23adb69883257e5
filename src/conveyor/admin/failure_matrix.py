"""Failures by what they have in common and by time: one row for each kind of failure, one column for each step of a range."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from datetime import datetime

import msgspec

from conveyor.admin.history import RANGES, SECONDS_OF
from conveyor.admin.job_search import OTHER_MESSAGES, fingerprint_of, kind_of, last_failure, message_pattern
from conveyor.admin.tracebacks import frames_of
from conveyor.ids import public
from conveyor.payload.failures import frame_text
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store.inspection import JobRow
from conveyor.units import instant

MOST_GROUPS = 200
_STEPS = {"1h": 60, "6h": 600, "24h": 1800, "7d": 4 * 3600, "30d": 24 * 3600}
"""Seconds of a column."""
MATRIX_RANGES = tuple(_STEPS)
_PLAIN = re.compile(r"[\w.:/-]+")
"""Names that stand in a filter as they are."""


class FailureRow(msgspec.Struct, frozen=True):
    """
    Dead letters of one queue that failed alike: the task, the class of the error and the innermost frame of the user's own code.

    Where no such frame is recorded, the message without what differs stands in its place; then `frame` is that of the newest of
    them, None where that is not known either. `message`: of the newest. `cells`: how many died in each step. `filter`: chooses
    them.
    """

    fingerprint: str
    task: str
    queue: str
    type: str
    frame: str | None
    message: str
    count: int
    first: datetime
    last: datetime
    cells: list[int]
    id: str
    filter: str


class FailureMatrix(msgspec.Struct, frozen=True):
    """The rows, the largest first, of *read* out of *total* dead letters: the newest. Columns begin at `times` (epoch)."""

    range: str
    step: int
    times: list[int]
    groups: list[FailureRow]
    read: int
    total: int
    footer: str | None


class _Kind(msgspec.Struct):
    message: str
    frame: str
    id: str
    part: str
    first: int
    last: int
    cells: Counter[int] = msgspec.field(default_factory=Counter)


class FailureTable:
    """Counts dead letters by kind and step."""

    def __init__(self, range_: str, now_ms: int, decoder: RecordDecoder) -> None:
        self.range, self.step = range_, _STEPS[range_]
        unit, length = RANGES[range_]
        columns = length * SECONDS_OF[unit] // self.step
        self._last = now_ms // 1000 // self.step
        self._first = self._last - columns + 1
        self._decoder = decoder
        self._kinds: dict[tuple[str, str, str, str], _Kind] = {}
        self.read = 0

    @property
    def begins_ms(self) -> int:
        """When the range begins."""
        return self._first * self.step * 1000

    def add(self, queue: str, part: str, rows: Iterable[JobRow]) -> bool:
        """Count dead letters of *part*, a partition of *queue* or itself, the newest first; return whether older ones may count."""
        for row in rows:
            at = int(row.extra or 0)
            if at < self.begins_ms:
                return False
            self.read += 1
            failure = last_failure(row, part, self._decoder)
            type_, text, frame = ("", "", "") if failure is None else (failure.type, failure.message, failure.frame)
            message, kind = message_pattern(text)[0], kind_of(frame, text)
            found = self._kinds.get((queue, row.envelope.task, type_, kind))
            if found is None and len(self._kinds) >= MOST_GROUPS:
                message, kind, frame = OTHER_MESSAGES, OTHER_MESSAGES, ""
                found = self._kinds.get((queue, row.envelope.task, type_, kind))
            if found is None:
                found = _Kind(message, frame, public(part, row.id), part, at, at)
                self._kinds[queue, row.envelope.task, type_, kind] = found
            if at > found.last:
                found.message, found.id, found.part = message, public(part, row.id), part
            found.first, found.last = min(found.first, at), max(found.last, at)
            found.cells[at // 1000 // self.step] += 1
        return True

    def samples(self) -> list[tuple[str, str]]:
        """Return (queue or partition, public id) of the newest of each of the largest rows whose records have no frame."""
        largest = sorted(self._kinds.values(), key=lambda one: -one.cells.total())[:50]
        return [(one.part, one.id) for one in largest if not one.frame]

    def matrix(self, tracebacks: dict[str, str], total: int, *, cut: bool) -> FailureMatrix:
        """Return the table; *tracebacks*: of the samples by their public ids. *cut*: whether dead letters were left out."""
        rows = [
            FailureRow(
                fingerprint_of(queue, task, type_, kind), task, queue, type_,
                one.frame or _own_frame(tracebacks.get(one.id, "")), one.message, one.cells.total(), instant(one.first),
                instant(one.last), [one.cells[number] for number in range(self._first, self._last + 1)], one.id,
                _filter(queue, task, type_, kind),
            )
            for (queue, task, type_, kind), one in self._kinds.items()
        ]  # fmt: skip
        rows.sort(key=lambda row: (-row.count, row.queue, row.task, row.type))
        times = [number * self.step for number in range(self._first, self._last + 1)]
        footer = f"The newest {self.read:,} of {total:,} dead letters were read." if cut else None
        return FailureMatrix(self.range, self.step, times, rows, self.read, total, footer)


def _own_frame(traceback: str) -> str | None:
    """Return the innermost frame of the user's own code, as ``app/mail.py:42 send``."""
    own = [frame for frame in frames_of(traceback) if frame.own]
    if not own:
        return None
    return frame_text(own[-1].file, own[-1].line, own[-1].function)


def _filter(queue: str, task: str, type_: str, kind: str) -> str:
    """Return the filter that chooses the dead letters of a row; where rows were too many, those of the task and the class."""
    terms = ["state:dead", f"queue:{queue}"]
    if _PLAIN.fullmatch(task):  # the fingerprint stands for the task as well: this makes it quicker
        terms.append(f"task:{task}")
    if kind != OTHER_MESSAGES:
        terms.append(f"fingerprint:{fingerprint_of(queue, task, type_, kind)}")
    elif type_:
        terms.append(f'error:"{type_}: "')
    return " ".join(terms)
