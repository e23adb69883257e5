"""
Operations on a whole queue in bounded batches: purge, redrive, reading the dead letters.

Each is a program of calls whose value is a count, carried out by `drive` or `adrive` (`store/script.py`).
"""

from __future__ import annotations

import logging
from datetime import datetime

import msgspec
from msgspec.structs import replace

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.ids import clean
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import Failure
from conveyor.payload.sealed_records import open_failure
from conveyor.store import inspection, operations
from conveyor.store.inspection import JobRow, QueueCounts
from conveyor.store.job_filter import UNLIMITED, JobFilter, Walk
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Redriven
from conveyor.store.script import Call, CallProgram
from conveyor.units import instant

logger = logging.getLogger("conveyor.queue")
BATCH = 500
PAGE = 100


class DeadLetter(msgspec.Struct, frozen=True):
    """
    A message or job that was given up.

    `payload` is the raw bytes of its body as pushed (sealed, if they were). `error` is the error of its last attempt,
    `attempts` the number of attempts that began, `failure` the whole record with the traceback. `died_at` has a time
    zone. `queue` is the queue or partition it lies in.
    """

    id: str
    task: str
    error: str
    attempts: int
    died_at: datetime
    payload: bytes
    failure: Failure | None = None
    queue: str = ""


def purge_waiting(keys: QueueKeys) -> CallProgram[int]:
    """Remove the ready and scheduled messages there are now, from the front; count them."""
    counts: QueueCounts = yield inspection.counts(keys)
    removed = 0
    # First those that wait for others: they take their places when those are removed.
    for where, count in (
        ("rerun", counts.waiting), ("ready", counts.ready + counts.waiting), ("due", counts.scheduled),
    ):  # fmt: skip
        removed += yield from _purge(keys, where, count)
    return removed


def purge_dead(keys: QueueKeys) -> CallProgram[int]:
    """Remove the dead letters there are now, oldest first; count them."""
    counts: QueueCounts = yield inspection.counts(keys)
    return (yield from _purge(keys, "dead", counts.dead))


def _purge(keys: QueueKeys, where: str, count: int) -> CallProgram[int]:
    removed = 0
    while removed < count:
        taken, gone = yield operations.purge(keys, where, min(BATCH, count - removed))
        removed += gone
        if taken == 0:
            break
    return removed


def redrive(keys: QueueKeys, limit: int | None) -> CallProgram[int]:
    """Put back the dead letters there are now, at most *limit* (None: all), oldest first; count them."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise ConfigurationError(f"limit must be a whole number of at least 0, not {limit!r}.")
    back, walk = 0, Walk(states=("dead",))
    while limit is None or back < limit:
        most = UNLIMITED if limit is None else limit - back
        moved = yield redrive_batch(keys, replace(walk, most=most))
        back += moved
        if moved.step.ended:
            break
        if not walk.cursor and walk.wanted.older is None:  # those that die from now on stay
            walk = replace(walk, wanted=JobFilter(older=instant(moved.step.now)))
        walk = replace(walk, cursor=moved.step.cursor)
    return back


def redrive_batch(keys: QueueKeys, walk: Walk) -> Call[Redriven]:
    """Return the call that puts back the dead letters that one step of *walk* finds, and logs those that stay dead."""
    return operations.redrive_some(keys, walk).then(lambda redriven: note_kept(keys, redriven))


def note_kept(keys: QueueKeys, redriven: Redriven) -> Redriven:
    """Log the dead letters that stay dead, because another job holds their unique key now."""
    if redriven.kept:
        pairs = ", ".join(
            clean(f"{ids.public(keys.queue, one)} (held by {holder})") for one, holder in redriven.kept[:3]
        )
        logger.warning(
            "Queue %s: %d dead letters stay dead, because other jobs hold their unique keys now: %s%s. "
            "Redrive again when those have ended.",
            keys.queue, len(redriven.kept), pairs, ", …" if len(redriven.kept) > 3 else "",
        )  # fmt: skip
    return redriven


def dead_page(
    keys: QueueKeys, offset: int, sealing: PayloadPipeline | None = None
) -> Call[tuple[list[DeadLetter], int]]:
    """Return the call that reads a page of dead letters, oldest first; it yields them and the offset behind them, at the end 0."""
    call = inspection.list_jobs(keys, "dead-oldest", offset, PAGE)
    return call.then(
        lambda page: (
            [_letter(keys.queue, row, sealing) for row in page.rows],
            offset + page.entries if page.entries else 0,
        )
    )


def _letter(queue: str, row: JobRow, sealing: PayloadPipeline | None) -> DeadLetter:
    failures = row.state.failures_list()
    last = open_failure(sealing, failures[-1], queue, row.id) if failures else None
    error = "" if last is None else f"{last.type}: {last.message}"
    died = instant(int(row.extra))
    return DeadLetter(
        ids.public(queue, row.id), row.envelope.task, error, row.state.starts, died, row.envelope.body, last, queue
    )
