"""
What a person asks about queues and jobs, and does to them: the one interface of the command line and the dashboard.

Everything is typed and works on any queue of one client. Calls are blocking; workers never import this module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from conveyor.admin import doctor
from conveyor.admin.queue_directory import QueueDirectory
from conveyor.admin.views import (
    LIVE,
    STATES,
    ActionResult,
    JobInfo,
    QueueInfo,
    WorkerInfo,
    error_info,
    finished_job,
    instant,
    live_job,
    maybe_instant,
)
from conveyor.errors import ConfigurationError, JobNotFound
from conveyor.ids import made_at_ms, public, split
from conveyor.messaging.partitions import refuse_full
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.payload.formats import JSON, FormatRegistry
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import read_outcome
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability
from conveyor.store.inspection import FinishedJob, JobRow
from conveyor.store.keys import QueueKeys

PAGE = 500


@dataclass(frozen=True, slots=True)
class _Found:
    keys: QueueKeys
    id: str
    place: str
    row: JobRow | None
    record: bytes


class Admin:
    """Reads and actions over all queues of one client."""

    def __init__(
        self,
        client: Client,
        *,
        plain_lists: Collection[str] = (),
        sealing: PayloadPipeline | None = None,
        formats: FormatRegistry = JSON,
        asks: Mapping[str, Durability] | None = None,
    ) -> None:
        """
        Take the client, and which queues are plain lists shared with other programs: Redis does not say that.

        *sealing* and *formats* are the app's: with them payloads, errors and results are shown, without them what they are.
        *asks* is what queues ask of every push, for the doctor.
        """
        self.asks = asks or {}
        self._viewer = RecordDecoder(sealing, formats)
        self.client = client
        self.plain_lists = frozenset(plain_lists)
        self._logical = QueueDirectory(client, plain_lists)

    def names(self) -> list[str]:
        """Return the names of all known queues, sorted; one with partitions has one name."""
        return self._logical.names()

    # -- queues ---------------------------------------------------------------------------------------------------

    def queues(self) -> list[QueueInfo]:
        """Return all known queues, by name."""
        return [self._counted(name) for name in self.names()]

    def queue(self, name: str) -> QueueInfo:
        """Return one queue, or one partition of one (``orders/3``); raises QueueNotFound."""
        return self._counted(name)

    def partitions(self, name: str) -> list[QueueInfo]:
        """Return the partitions of a queue, in order; none of one that lies in one piece. Raises QueueNotFound."""
        places = self._logical.places(name)
        return [self._counted(place) for place in places] if len(places) > 1 else []

    def pause(self, name: str) -> None:
        """Let nothing more be taken from the queue; what runs goes on."""
        self._logical.whole(name).pause()

    def resume(self, name: str) -> None:
        """Undo `pause`."""
        self._logical.whole(name).resume()

    def purge(self, name: str, *, dead: bool = False) -> int:
        """
        Remove what is not leased, or the dead letters; return how many.

        Only what was there when it began: newer work survives. One that was interrupted is simply repeated.
        """
        return self._logical.whole(name).purge(dead)

    def refuse_full(self, name: str) -> None:
        """Raise ConfigurationError (E35) when a queue holds something, so that its partitions cannot change."""
        refuse_full(self.client, self._logical.whole(name).name)

    def repartition(self, name: str, partitions: int) -> int:
        """Lay a queue that is empty in that many partitions, and return in how many it lay; raises ConfigurationError."""
        return self._logical.whole(name).repartition(partitions)

    def redrive(self, name: str, *, limit: int | None = None, ids: Sequence[str] = ()) -> int:
        """Put dead letters back, oldest first, or just those of *ids* (public or bare); return how many."""
        queue = self._logical.whole(name)
        if not ids:
            return queue.redrive(limit)
        moved = 0
        for place in self._logical.places(name):
            bare = [id_ for home, id_ in map(split, ids) if home in {None, place}]
            for first in range(0, len(bare), PAGE):
                call = operations.redrive(self._logical.keys(place), ids=bare[first : first + PAGE])
                moved += self.client.run(call)
        return moved

    def workers(self, queue: str | None = None) -> list[WorkerInfo]:
        """Return who takes from a queue, or from any; a worker of three queues, or partitions, is listed three times."""
        return [
            WorkerInfo(
                member.worker, name, str(member.about.get("host", "")), member.about.get("pid"), member.held,
                instant(member.end), member.about,
            )
            for name in self._places(queue)
            for member in self.client.run(inspection.workers(self._keys(name)))
        ]  # fmt: skip

    # -- jobs -----------------------------------------------------------------------------------------------------

    def jobs(
        self,
        queue: str | None = None,
        state: str | None = None,
        *,
        offset: int = 0,
        limit: int = 50,
        task: str | None = None,
    ) -> list[JobInfo]:
        """
        Return jobs of a queue (None: of all) in a state (None: all that live), in the order they would be taken.

        Dead and finished ones come newest first; partitions one after the other. While the queue moves, a page may
        repeat or miss a job.
        """
        if state is not None and state not in STATES:
            raise ConfigurationError(f"There is no state {state!r} to list. Known: {', '.join(STATES)}.")
        found: list[JobInfo] = []
        for name in self._places(queue):
            for one in (state,) if state else LIVE:
                total = self._length(self._keys(name), one)
                if task is None and offset >= total:
                    offset -= total
                    continue
                rows = self._listed(name, one, 0 if task else offset, total)
                chosen = (row for row in rows if task is None or row.task == task)
                if task:
                    while offset and next(chosen, None) is not None:
                        offset -= 1
                else:
                    offset = 0
                found += islice(chosen, limit - len(found))
                if len(found) >= limit:
                    return found
        return found

    def job(self, public_id: str) -> JobInfo:
        """Return all that is known of a job; raises JobNotFound."""
        found = self._find(public_id)
        if found is None:
            raise JobNotFound(
                f"No job {public_id} is known. It never existed, or it ended and what was kept of it has expired."
            )
        if found.row is not None:
            return live_job(found.keys.queue, found.row, self._viewer)
        return self._ended(found)

    def retry(self, ids: Iterable[str]) -> list[ActionResult]:
        """Put dead jobs back with a fresh budget, and start scheduled ones now."""
        return [self._retry(one) for one in ids]

    def cancel(self, ids: Iterable[str]) -> list[ActionResult]:
        """Cancel jobs that have not ended; a running one is asked of its worker."""
        return [self._cancel(one) for one in ids]

    def delete(self, ids: Iterable[str]) -> list[ActionResult]:
        """Remove jobs and dead letters without a trace; a leased one is refused."""
        return [self._delete(one) for one in ids]

    def doctor(self) -> doctor.HealthReport:
        """Examine the server and the queues."""
        return doctor.examine(self.client, self._logical, self.asks)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _keys(self, place: str) -> QueueKeys:
        return self._logical.keys(place)

    def _places(self, queue: str | None) -> list[str]:
        names = self.names() if queue is None else [queue]
        return [place for name in names for place in self._logical.places(name)]

    def _counted(self, name: str) -> QueueInfo:
        places = self._logical.places(name)
        counts = inspection.total([self.client.run(inspection.counts(self._keys(place))) for place in places])
        oldest = counts.oldest_age if counts.ready else None  # what stands first may be a cancelled job's place
        return QueueInfo(
            name, counts.ready, counts.scheduled, counts.waiting, counts.leased, counts.dead, counts.workers,
            oldest, counts.paused, counts.max_length, len(places),
        )  # fmt: skip

    def _length(self, keys: QueueKeys, state: str) -> int:
        """Return how many entries a state has in Redis, cancelled ones that still stand in line included."""
        if state == "done":
            return _number(self.client.execute("LLEN", keys.recent, key=keys.recent))
        counts = self.client.run(inspection.counts(keys))
        stubs = _number(self.client.execute("HGET", keys.conf, "stubs", key=keys.conf) or 0) if state == "ready" else 0
        return int(getattr(counts, state)) + stubs

    def _listed(self, queue: str, state: str, offset: int, total: int) -> Iterator[JobInfo]:
        keys = self._keys(queue)
        for first in range(offset, total, PAGE):
            if state == "done":
                page = self.client.run(inspection.finished(keys, first, PAGE))
                yield from (finished_job(queue, entry) for entry in page if entry.status != "dead")
            else:
                yield from (
                    live_job(queue, row, self._viewer, MAX_PAYLOAD)  # a page of bombs stays small
                    for row in self.client.run(inspection.list_jobs(keys, state, first, PAGE))
                )

    def _find(self, public_id: str) -> _Found | None:
        queue, id_ = split(public_id)
        trace: _Found | None = None
        for name in [queue] if queue else self._logical.all_places(id_):
            keys = self._keys(name)
            place, row, record = self.client.run(inspection.get_job(keys, id_))
            found = _Found(keys, id_, place, row, record)
            if place != "none":
                return found
            entry = self._remembered(found)
            # A dead letter that is only remembered was deleted or purged.
            if record or (entry is not None and entry.status != "dead"):
                trace = found
        return trace

    def _remembered(self, found: _Found) -> FinishedJob | None:
        for first in (0, PAGE):  # the list is cut at a thousand
            page = self.client.run(inspection.finished(found.keys, first, PAGE))
            entry = next((entry for entry in page if entry.id == found.id), None)
            if entry is not None or len(page) < PAGE:
                return entry
        return None

    def _ended(self, found: _Found) -> JobInfo:
        entry = self._remembered(found)
        base: dict[str, Any] = {
            "id": public(found.keys.queue, found.id),
            "queue": found.keys.queue,
            "enqueued": maybe_instant(made_at_ms(found.id)),
            "task": entry.task if entry else None,
            "ended": instant(entry.at) if entry else None,
            "ran_ms": entry.ran_ms if entry else None,
        }
        if found.place == "result":
            outcome = read_outcome(found.record)
            base["ended"] = maybe_instant(outcome.at) or base["ended"]
            failure, queue = outcome.failure, found.keys.queue
            errors = [error_info(self._viewer.failure(failure, queue, found.id))] if failure else []
            result = self._viewer.result(outcome, queue, found.id) if outcome.status == "done" else None
            return JobInfo(**base, status=outcome.status, errors=errors, result=result, reason=outcome.reason)
        if found.place == "cancelled":
            return JobInfo(**base, status="cancelled")
        status: Any = entry.status if entry else "done"
        return JobInfo(**base, status=status, reason="" if entry else "it ended; no more is kept of it")

    def _retry(self, one: str) -> ActionResult:
        found = self._find(one)
        if found is None:
            return ActionResult(one, "not found")
        if found.place == "dead" and self.client.run(operations.redrive(found.keys, ids=[found.id])):
            return ActionResult(one, "retried", f"back in {found.keys.queue} with a fresh budget")
        if found.place == "scheduled" and self.client.run(operations.promote(found.keys, found.id)):
            return ActionResult(one, "retried", "starts now, not when it was due")
        return ActionResult(one, "refused", f"it is {_word(found)}, and only dead and scheduled jobs can be retried")

    def _cancel(self, one: str) -> ActionResult:
        found = self._find(one)
        if found is None:
            return ActionResult(one, "not found")
        reply = self.client.run(operations.cancel(found.keys, found.id))
        if reply == 1:
            return ActionResult(one, "cancelled")
        if reply == 2:
            return ActionResult(one, "asked", "it runs; its worker was asked to stop it")
        return ActionResult(one, "refused", f"it is {_word(found)}, so it has ended")

    def _delete(self, one: str) -> ActionResult:
        found = self._find(one)
        if found is None:
            return ActionResult(one, "not found")
        reply = self.client.run(operations.cancel(found.keys, found.id, delete=True))
        if reply == 1:
            return ActionResult(one, "deleted")
        if reply == -1:
            return ActionResult(one, "refused", "a worker holds it; cancel it first")
        return ActionResult(one, "refused", f"it is {_word(found)}; nothing of it is in the queue")


def _word(found: _Found) -> str:
    if found.place == "result":
        return read_outcome(found.record).status
    return "done" if found.place == "none" else found.place


def _number(reply: object) -> int:
    return int(reply)  # type: ignore[call-overload,no-any-return]
