"""Large bodies that no job needs any more: of cancelled, expired, purged jobs, and of pushes that never happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs import spawn_outbox
from conveyor.jobs.core import core_of
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import read_whatever
from conveyor.payload.versions import sealed_name
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor

PAGE = 500
LEAST_MS = 3_600_000
"""A body is written before its job is pushed, so a young one may belong to a job that is about to come."""


def sweep(app: Conveyor, older: Duration = "1d", *, dry_run: bool = False) -> int:
    """
    Remove from the app's store what is *older* than that (at least an hour) and belongs to no job; return how many.

    Dead letters are jobs: they keep theirs until they are purged. *older* must exceed what jobs run that spawn
    others, and what a `Buffer` holds back while Redis is away: their bodies are written before they are pushed. The
    store must be of this namespace of this Redis alone. Reads every job once, and removes nothing when one of
    them refers to a body and cannot be opened with the app's keys: raises PayloadError. ConfigurationError without a
    store.
    """
    sealing = app.sealing
    if sealing is None or sealing.store is None:
        raise ConfigurationError("sweep() needs an app with a store: Conveyor(large=FileStore(…)).")
    age_ms = milliseconds(older, name="older")
    if age_ms < LEAST_MS:
        raise ConfigurationError(f"sweep(older={older!r}): the least is an hour, since bodies are written before jobs.")
    found = list(sealing.store.old(age_ms / 1000))  # before looking at jobs: what comes later is none of these
    needed = _needed(app, sealing)
    gone = [name for name in found if name not in needed]
    for name in gone if not dry_run else ():
        sealing.store.delete(name)
    return len(gone)


def _needed(app: Conveyor, sealing: PayloadPipeline) -> set[str]:
    names: set[str] = set()
    for queue, id_, data in _everything(app):
        envelope, _, _ = read_whatever(data, None)
        try:
            name = sealed_name(envelope.task, envelope.extra.version)
            reference = sealing.reference(envelope.body, queue=queue, task=name, id=id_)
        except PayloadError as error:
            raise PayloadError(
                f"Job {queue}:{id_} refers to a large body, and nobody can tell to which. Nothing was removed. {error}",
                code=error.code,
            ) from None
        if reference is not None:
            names.add(reference.name)
    return names


def _everything(app: Conveyor) -> Iterator[tuple[str, str, bytes]]:
    """Yield queue, id and envelope of every job, those on their way from one queue to another first."""
    queues = app.client.queues()
    for queue in queues:
        # In one go: it is trimmed at its head meanwhile, so a second page would begin too late.
        for entry in _read(app, "LRANGE", core_of(app).keys(queue).outbox, 0, -1):
            target, sent = spawn_outbox.read(entry)
            yield target, sent.id, sent.rest
    for queue in queues:
        jobs, cursor = core_of(app).keys(queue).jobs, b"0"
        while True:
            cursor, page = _read(app, "HSCAN", jobs, cursor, "COUNT", PAGE)
            for id_, data in zip(page[::2], page[1::2], strict=True):
                yield queue, id_.decode(), data
            if cursor == b"0":
                break


def _read(app: Conveyor, command: str, key: str, *rest: int | str | bytes) -> Any:
    return app.client.execute(command, key, *rest, key=key)
