"""
Removal of large bodies that no job needs any more.

Their job was cancelled, expired or purged, or was never pushed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs import spawn_outbox
from conveyor.jobs.core import core_of
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import read_leniently
from conveyor.payload.versions import sealed_name
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor

PAGE_SIZE = 500
MIN_AGE_MS = 3_600_000
"""Minimum age. A body is written before its job is pushed, so a younger one may belong to a job that is yet to come."""


def sweep(app: Conveyor, older: Duration = "1d", *, dry_run: bool = False) -> int:
    """
    Remove the app's large bodies that are *older* and belong to no job; return how many.

    Dead letters are jobs: their bodies are kept until they are purged. *older* is at least an hour. It must exceed the
    running time of jobs that spawn others, and the time for which a `Buffer` holds jobs back while Redis is away:
    their bodies are written before they are pushed. The store must belong to this namespace of this Redis alone.
    Reads every job once. Raises PayloadError, and removes nothing, when a job refers to a body and the app's keys
    cannot open the reference; ConfigurationError for an app without a store.
    """
    sealing = app.sealing
    if sealing is None or sealing.store is None:
        raise ConfigurationError("sweep() needs an app with a store: Conveyor(large=FileStore(…)).")
    age_ms = milliseconds(older, name="older")
    if age_ms < MIN_AGE_MS:
        raise ConfigurationError(
            f"sweep(older={older!r}) must be at least an hour, because bodies are written before jobs."
        )
    # Before jobs are read, so that bodies of newer jobs are not among them.
    old_blobs = list(sealing.store.old(age_ms / 1000))
    referenced = _referenced_blobs(app, sealing)
    unneeded = [name for name in old_blobs if name not in referenced]
    for name in unneeded if not dry_run else ():
        sealing.store.delete(name)
    return len(unneeded)


def _referenced_blobs(app: Conveyor, sealing: PayloadPipeline) -> set[str]:
    names: set[str] = set()
    for queue, id_, data in _all_jobs(app):
        envelope, _, _ = read_leniently(data, None)
        try:
            name = sealed_name(envelope.task, envelope.extra.version)
            reference = sealing.reference(envelope.body, queue=queue, task=name, id=id_)
        except PayloadError as error:
            raise PayloadError(
                f"Job {queue}:{id_} refers to a large body that cannot be identified. Nothing was removed. {error}",
                code=error.code,
            ) from None
        if reference is not None:
            names.add(reference.name)
    return names


def _all_jobs(app: Conveyor) -> Iterator[tuple[str, str, bytes]]:
    """
    Yield queue, id and envelope of every job.

    Jobs on their way from one queue to another come first.
    """
    queues = app.client.queues()
    for queue in queues:
        # In one read: the list is trimmed at its head meanwhile, so a second page would begin too late.
        for entry in _read(app, "LRANGE", core_of(app).keys(queue).outbox, "0", "-1"):
            target, sent = spawn_outbox.read(entry)
            yield target, sent.id, sent.rest
    for queue in queues:
        jobs, cursor = core_of(app).keys(queue).jobs, b"0"
        while True:
            cursor, page = _read(app, "HSCAN", jobs, cursor, "COUNT", str(PAGE_SIZE))
            for id_, data in zip(page[::2], page[1::2], strict=True):
                yield queue, id_.decode(), data
            if cursor == b"0":
                break


def _read(app: Conveyor, command: str, key: str, *rest: str | bytes) -> Any:
    return app.client.execute(command, key, *rest, key=key)
