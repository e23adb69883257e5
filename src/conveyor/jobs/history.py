"""The history of a job: its states, from what Redis holds of it, and what was written down besides."""

from __future__ import annotations

from datetime import datetime

import msgspec

from conveyor.ids import made_at_ms
from conveyor.payload.records import AttemptHistory, Outcome, PastEvent, read_outcome
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store.inspection import JobRow
from conveyor.units import instant_or_none


class HistoryEntry(msgspec.Struct, frozen=True):
    """
    A state that a job came into.

    `state`: pushed, leased, failed, crashed, returned (its worker stopped), snoozed, promoted, updated, redriven, done, dead or
    cancelled. `at`: when; None where only that it
    happened is known, of a job that ended and whose result is not kept.
    `worker`: ``host:pid``. `reason`: the error, or why. `by`: who asked, where that is known. `attempt`: which start it was of.
    """

    state: str
    at: datetime | None
    worker: str = ""
    reason: str = ""
    by: str = ""
    attempt: int = 0


def past_events(
    history: AttemptHistory, decoder: RecordDecoder | None = None, queue: str = "", id: str = "",  # noqa: A002
) -> list[PastEvent]:  # fmt: skip
    """Return what earlier attempts came to, oldest first; with a *decoder* the texts of errors, else their classes alone."""
    events = history.events_list()
    for failure in history.failures_list():
        reason = failure.type
        if decoder is not None:
            failure = decoder.failure(failure, queue, id)
            reason = f"{failure.type}: {failure.message}"
        state = "crashed" if failure.type in {"crashed", "ProcessCrashed"} else "failed"
        if failure.began:
            events.append(PastEvent("leased", failure.began, failure.worker, attempt=failure.attempt))
        events.append(PastEvent(state, failure.at, failure.worker, reason, attempt=failure.attempt))
    return sorted(events, key=lambda event: event.at)


def live_history(queue: str, row: JobRow, decoder: RecordDecoder) -> list[HistoryEntry]:
    """Return the history of a job that is in its queue, or a dead letter of it."""
    events = [*_pushed(row.id), *past_events(row.state, decoder, queue, row.id)]
    if row.status == "leased" and row.leased_ms:
        host, pid = row.about.get("host"), row.about.get("pid")
        worker = f"{host}:{pid}" if pid else row.extra
        events.append(PastEvent("leased", row.leased_ms, worker, attempt=row.state.starts + 1))
    elif row.status == "dead":
        last = events[-1] if events else PastEvent("dead", 0)
        events.append(PastEvent("dead", int(row.extra), last.worker, last.reason, attempt=row.state.starts))
    return [_entry(event) for event in events]


def ended_history(id: str, where: str, record: bytes) -> list[HistoryEntry]:  # noqa: A002
    """Return the history of a job that has left its queue; *where* that of `get_job`, *record* its outcome where one is kept."""
    events = _pushed(id)
    if where != "result":
        events.append(PastEvent("done" if where == "ended" else "cancelled"))
    else:
        outcome: Outcome = read_outcome(record)
        run = outcome.run
        if run is not None:
            events += run.past
            events.append(PastEvent("leased", run.started, run.worker, attempt=run.attempt))
        worker = "" if run is None else run.worker
        reason = outcome.reason
        if outcome.failure is not None:
            reason = reason or outcome.failure.type
        attempt = 0 if run is None else run.attempt
        events.append(PastEvent(outcome.status, outcome.at, worker, reason, outcome.by, attempt))
    return [_entry(event) for event in events]


def _pushed(id_: str) -> list[PastEvent]:
    made = made_at_ms(id_)
    return [] if made is None else [PastEvent("pushed", made)]


def _entry(event: PastEvent) -> HistoryEntry:
    at = instant_or_none(event.at)
    return HistoryEntry(event.state, at, event.worker, event.reason, event.by, event.attempt)
