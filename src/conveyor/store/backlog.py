"""Pushes that wait for Redis to come back, in memory: in order, and each with the call it may have been sent in already."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from conveyor.store.operations import Entry

MOST_JOBS, MOST_BYTES = 1000, 4_000_000
"""What one call delivers at most."""
_OVERHEAD = 100


@dataclass(slots=True)
class Record:
    """
    One push that waits. Its `lane` and `number` are those of an attempt that may have reached Redis, "" when there
    was none; `at` is when it was accepted (s since the epoch), since delays count from there.
    """

    namespace: str
    queue: str
    entries: list[Entry]
    at: float
    max_length: int = 0
    partitions: int = 1
    lane: str = ""
    number: int = 0
    foreign: str | None = None

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return sum(len(entry.rest) + len(entry.id) + _OVERHEAD for entry in self.entries)

    def due(self, now: float) -> Iterator[Entry]:
        """Yield its entries with what is left of their delays and lives."""
        waited = max(0, int((now - self.at) * 1000))
        for entry in self.entries:
            if entry.delay_ms is None and entry.expires_ms is None:
                yield entry
                continue
            delay = None if entry.delay_ms is None else max(0, entry.delay_ms - waited)
            life = None if entry.expires_ms is None else max(1, entry.expires_ms - waited)
            yield replace(entry, delay_ms=delay, expires_ms=life)

    def goes_with(self, other: Record) -> bool:
        """Tell whether both may travel in one call."""
        return (
            not self.lane and not other.lane and self.queue == other.queue and self.namespace == other.namespace
            and self.foreign == other.foreign and self.max_length == other.max_length and self.partitions == other.partitions
        )  # fmt: skip


@dataclass(slots=True)
class Batch:
    """The records of one call, the first of the backlog, and the lane and number it is sent in, however often."""

    records: list[Record]
    lane: str
    number: int

    def entries(self, now: float) -> list[Entry]:
        """Return all entries, in order."""
        return [entry for record in self.records for entry in record.due(now)]


class Backlog:
    """Records in order. Not for several threads at once: the buffer's lock guards it."""

    def __init__(self, lane: str) -> None:
        """Begin empty; batches go in *lane*."""
        self.records: deque[Record] = deque()
        self.jobs = self.bytes = 0
        self._lane = lane
        self._number = 0
        self._batch: Batch | None = None
        self._most = MOST_JOBS

    def __bool__(self) -> bool:
        return bool(self.records)

    def add(self, record: Record) -> None:
        """Append a record."""
        self._keep(record)
        self.records.append(record)
        self.jobs += len(record.entries)
        self.bytes += record.size

    def batch(self) -> Batch:
        """Return what is to be sent now: the same until `done` or `cut`."""
        if self._batch is None:
            records = self._first()
            if records[0].lane:
                self._batch = Batch(records, records[0].lane, records[0].number)
            else:
                self._number += 1
                batch = Batch(records, self._lane, self._number)
                self._begin(batch)
                self._batch = batch
        return self._batch

    def _first(self) -> list[Record]:
        head = self.records[0]
        taken, jobs, size = [head], len(head.entries), head.size
        for record in islice(self.records, 1, self._most) if not head.lane else ():
            jobs, size = jobs + len(record.entries), size + record.size
            if jobs > self._most or size > MOST_BYTES or not head.goes_with(record):
                break
            taken.append(record)
        return taken

    def cut(self) -> bool:
        """
        Send half as many from now on, since the queue has no room for all; return False when one record is the least.

        The next batch gets a higher number, so a late copy of this one changes nothing.
        """
        if self._batch is None or len(self._batch.records) == 1:
            return False
        self._most = max(1, len(self._batch.records) // 2)
        self._batch = None
        return True

    def done(self) -> list[Record]:
        """Forget the batch, which is delivered, and return its records."""
        assert self._batch is not None
        delivered, self._batch = self._batch.records, None
        self._most = min(MOST_JOBS, self._most * 2)
        for record in delivered:
            self.records.popleft()
            self.jobs -= len(record.entries)
            self.bytes -= record.size
        self._end(len(delivered))
        return delivered

    def close(self) -> None:
        """Let go of what it holds open."""

    # -- what a journal does besides --------------------------------------------------------------------------------

    def _keep(self, record: Record) -> None: ...
    def _begin(self, batch: Batch) -> None: ...
    def _end(self, count: int) -> None: ...


def entries_of(pairs: Sequence[object]) -> list[Entry]:
    """Return id, envelope, id, envelope, … as entries."""
    return [Entry(pairs[at], pairs[at + 1]) for at in range(0, len(pairs), 2)]  # type: ignore[arg-type]
