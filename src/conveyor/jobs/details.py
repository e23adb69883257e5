"""The facts about a job that its handle returns, from what Redis holds of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from conveyor.ids import made_at_ms, public
from conveyor.payload.live_records import Progress
from conveyor.payload.records import RunRecord, Status, read_outcome
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.payload.versions import sealed_name
from conveyor.store.inspection import JobRow
from conveyor.units import instant_or_none


class JobDetails(msgspec.Struct, frozen=True):
    """
    The facts about a job: of one that ended well, for as long as its result is kept.

    `arguments`: by name, as JSON values; None where they are not kept: longer than 2 KiB, sealed with a key that this program
    does not have, or of a job that ended without a kept result. `attempts`: how often it was started. `worker`: `host:pid` of
    the one that holds it, else of the last that ended an attempt. `started`: the last start, of a job that is held the instant
    of its lease, None where that is not kept. `reason`: why it was cancelled. `origin`: the id of the job that this one runs again.
    `progress`, `notes`: what it said of itself.
    """

    id: str
    queue: str
    status: Status
    task: str | None = None
    arguments: Any = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    attempts: int = 0
    worker: str | None = None
    enqueued: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None
    reason: str = ""
    tags: tuple[str, ...] = ()
    origin: str | None = None
    progress: Progress | None = None
    notes: dict[str, Any] = msgspec.field(default_factory=dict)


def live_details(queue: str, row: JobRow, decoder: RecordDecoder) -> JobDetails:
    """Return the facts about a job that is in its queue, or a dead letter of it."""
    envelope, errors = row.envelope, row.state.failures_list()
    leased, name = row.status == "leased", sealed_name(envelope.task, envelope.extra.version)
    return JobDetails(
        public(queue, row.id), queue, row.status, envelope.task,
        _value(decoder.preview(envelope.body, queue, name, row.id, call=True)),
        dict(envelope.extra.headers), row.state.starts + leased,
        _holder(row) if leased else errors[-1].worker if errors else None,
        instant_or_none(made_at_ms(row.id)), instant_or_none(row.leased_ms),
        instant_or_none(int(row.extra)) if row.status == "dead" else None, tags=tuple(envelope.tags),
        progress=decoder.progress(row.state.progress, queue, row.id), notes=decoder.notes(row.state.notes, queue, row.id),
        origin=envelope.extra.origin or None,
    )  # fmt: skip


def ended_details(queue: str, id: str, status: Status, record: bytes, decoder: RecordDecoder) -> JobDetails:  # noqa: A002
    """Return the facts about a job that has left its queue; *record* is its outcome, b"" where none is kept."""
    enqueued = instant_or_none(made_at_ms(id))
    if not record:
        return JobDetails(public(queue, id), queue, status, enqueued=enqueued)
    outcome = read_outcome(record)
    run = outcome.run or RunRecord()
    return JobDetails(
        public(queue, id), queue, status, run.task or None, _value(decoder.arguments(run, queue, id)), dict(run.headers),
        run.attempt, run.worker or None, enqueued, instant_or_none(run.started), instant_or_none(outcome.at), outcome.reason,
        tuple(run.tags), run.origin or None,
        decoder.progress(bytes(outcome.progress), queue, id), decoder.notes(bytes(outcome.notes), queue, id),
    )  # fmt: skip


def _holder(row: JobRow) -> str:
    host, pid = row.about.get("host"), row.about.get("pid")
    return f"{host}:{pid}" if pid else row.extra


def _value(text: str | None) -> Any:
    try:
        return None if text is None else msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None  # a description of what cannot be read here
