"""
What goes over a whole queue in bounded batches: purge, redrive, reading the dead letters.

Each is a generator of calls with a value at its end, carried out by `holder.drive` or `holder.adrive`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import Failure
from conveyor.payload.sealed_records import open_failure
from conveyor.store import inspection, operations
from conveyor.store.inspection import JobRow, QueueCounts
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call

BATCH = 500
PAGE = 100

Sweep = Generator[Call[Any], Any, int]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """
    One that was given up: `payload` is the raw bytes of its body, as they were pushed (sealed, when they were).

    `error` says what its last attempt ended with, `attempts` how many began, `failure` is the whole record
    with the traceback. `died_at` has a time zone, `queue` is where it lies: a queue, or a partition of one.
    """

    id: str
    task: str
    error: str
    attempts: int
    died_at: datetime
    payload: bytes
    failure: Failure | None = None
    queue: str = ""


def purge_waiting(keys: QueueKeys) -> Sweep:
    """Remove as many ready and scheduled messages as there are now, from the front; the value is how many were."""
    counts: QueueCounts = yield inspection.counts(keys)
    removed = 0
    for place, there in (("ready", counts.ready), ("due", counts.scheduled)):
        removed += yield from _purge(keys, place, there)
    return removed


def purge_dead(keys: QueueKeys) -> Sweep:
    """Remove as many dead letters as there are now, oldest first; the value is how many were."""
    counts: QueueCounts = yield inspection.counts(keys)
    return (yield from _purge(keys, "dead", counts.dead))


def _purge(keys: QueueKeys, place: str, there: int) -> Sweep:
    gone = 0
    while gone < there:
        taken, removed = yield operations.purge(keys, place, min(BATCH, there - gone))
        gone += removed
        if taken == 0:
            break
    return gone


def redrive(keys: QueueKeys, limit: int | None) -> Sweep:
    """Put back as many dead letters as there are now, at most *limit*, oldest first; the value is how many were."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise ConfigurationError(f"limit must be a whole number of at least 0, not {limit!r}.")
    counts: QueueCounts = yield inspection.counts(keys)
    there, back = counts.dead if limit is None else min(limit, counts.dead), 0
    while back < there:
        moved = yield operations.redrive(keys, limit=min(BATCH, there - back))
        if moved == 0:
            break
        back += moved
    return back


def dead_page(keys: QueueKeys, offset: int, sealing: PayloadPipeline | None = None) -> Call[list[DeadLetter]]:
    """Return the call that reads one page of dead letters, oldest first."""
    page = inspection.list_jobs(keys, "dead-oldest", offset, PAGE)
    return page.then(lambda rows: [_letter(keys.queue, row, sealing) for row in rows])


def _letter(queue: str, row: JobRow, sealing: PayloadPipeline | None) -> DeadLetter:
    failures = row.state.failures_list()
    last = open_failure(sealing, failures[-1], queue, row.id) if failures else None
    error = "" if last is None else f"{last.type}: {last.message}"
    died = datetime.fromtimestamp(int(row.extra) / 1000, UTC)
    return DeadLetter(
        ids.public(queue, row.id), row.envelope.task, error, row.state.starts, died, row.envelope.body, last, queue
    )
