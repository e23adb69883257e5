"""Large bodies that no job needs any more: of cancelled, expired, purged jobs, and of pushes that never happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conveyor.duration import Duration, milliseconds
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.model import read_whatever
from conveyor.sealing.sealing import Sealing

if TYPE_CHECKING:
    from conveyor.app import Conveyor

LEAST_MS = 3_600_000
"""A body is written before its job is pushed, so a young one may belong to a job that is about to come."""


def sweep(app: Conveyor, older: Duration = "1d", *, dry_run: bool = False) -> int:
    """
    Remove from the app's store what is *older* than that (at least an hour) and belongs to no job; return how many.

    Dead letters are jobs: they keep theirs until they are purged. Reads every job once, and removes nothing when one
    of them refers to a body and cannot be opened with the app's keys: raises PayloadError. ConfigurationError
    without a store.
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


def _needed(app: Conveyor, sealing: Sealing) -> set[str]:
    names: set[str] = set()
    for queue in app.backend.queues():
        jobs, cursor = app.keys(queue).jobs, 0
        while True:
            reply: Any = app.backend.execute("HSCAN", jobs, cursor, "COUNT", 500, key=jobs)
            cursor, page = int(reply[0]), reply[1]
            for id_, data in zip((one.decode() for one in page[::2]), page[1::2], strict=True):
                envelope, _, _ = read_whatever(data, None)
                try:
                    reference = sealing.reference(envelope.body, queue=queue, task=envelope.task, id=id_)
                except PayloadError as error:
                    raise PayloadError(
                        f"Job {queue}:{id_} refers to a large body, and nobody can tell to which. Nothing was removed. "
                        f"{error}",
                        code=error.code,
                    ) from None
                if reference is not None:
                    names.add(reference.name)
            if cursor == 0:
                break
    return names
