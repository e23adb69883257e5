"""Reads the events of a queue, over all of its partitions, from any place on."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from conveyor import ids
from conveyor.errors import ConfigurationError, JobFailed, StoreUnavailable
from conveyor.events import (
    EventsMissed,
    JobCancelledEvent,
    JobDead,
    JobDone,
    JobEnqueued,
    JobEvent,
    JobPromoted,
    JobRedriven,
    JobRetried,
    JobReturned,
    JobStarted,
    JobUpdated,
)
from conveyor.jobs.results import CHECK_AGAIN, EVENT_READER, OutageTimer
from conveyor.store import partitions as partitioning
from conveyor.store.queue_events import TO_COME, EventPage, StoredEvent, read_events
from conveyor.store.sleepers import SleepingTask, SleepingThread
from conveyor.store.transport.endpoint import in_thread
from conveyor.units import instant

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.jobs.results import Listener
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call

NOW = "now"
_PLACE = re.compile(r"(\d{1,15}-\d{1,15})?(\+(\d{1,15}-\d{1,15})?)*", re.ASCII)


class EventReader:
    """
    One reader of the events of a queue, and its place there.

    The id of an event is the place of the reader behind it: the ids of the last events of all partitions, with a ``+`` between.
    """

    def __init__(self, core: AppCore, queue: str, after: str | None) -> None:
        if after is not None and after != NOW and (not isinstance(after, str) or not _PLACE.fullmatch(after)):
            raise ConfigurationError(f"events(after=…) takes the id of an event, or 'now', not {after!r:.80}.")
        self._core, self._client, self._subscriber = core, core.client, core.result_subscriber
        self._queue, self._after = ids.queue_name(queue), after
        self._outage = OutageTimer()
        self._parts: list[QueueKeys] = []
        self._places: list[str] = []
        self._listeners: list[Listener] = []

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> Generator[JobEvent, None, None]:
        """Yield the events, each as soon as it is there."""
        thread = SleepingThread()
        try:
            self._open(thread.wake)
            self._subscriber.subscribe()
            while True:
                events, more = self._read()
                yield from events
                if not more:
                    thread.sleep(CHECK_AGAIN)
        finally:
            self._close()

    async def aread(self) -> AsyncGenerator[JobEvent, None]:
        """Awaitable form of `read`."""
        task = SleepingTask()
        try:
            await in_thread(partial(self._open, task.wake))
            await self._subscriber.asubscribe()
            while True:
                events, more = await in_thread(self._read)
                for one in events:
                    yield one
                if not more:
                    await task.sleep(CHECK_AGAIN)
        finally:
            self._close()

    def _open(self, wake: Callable[[], object]) -> None:
        """Find the partitions, and listen to them. Raises ConfigurationError for a queue that keeps no events."""
        declared = self._core.keys(self._queue)
        number, _ = self._client.run(partitioning.count(declared))
        known = self._core.partitioned.get(self._queue)
        if known is not None and number in {0, 1}:
            number = known.count
        names = [self._queue] if number <= 1 else [ids.partition(self._queue, one) for one in range(number)]
        self._parts = [self._core.keys(name) for name in names]
        self._client.announce(*(keys for keys in self._parts if keys.events_kept is not None))
        places = [] if self._after in {None, NOW} else str(self._after).split("+")
        # A partition that came later begins at its first event.
        fill = TO_COME if self._after == NOW else ""
        self._places = [*places[: len(names)], *[fill] * (len(names) - len(places))]
        self._listeners = [
            self._subscriber.listen(keys, f"\t{keys.prefix}", EVENT_READER, wake) for keys in self._parts
        ]

    def _close(self) -> None:
        for keys, listener in zip(self._parts, self._listeners, strict=False):
            self._subscriber.unlisten(f"\t{keys.prefix}", listener)
        self._listeners = []

    def _call(self, at: int) -> Call[EventPage]:
        return read_events(self._parts[at], self._subscriber.channel, self._places[at])

    def _read(self) -> tuple[list[JobEvent], bool]:
        """Read a page of each partition; return the events in the order of their instants, and whether more follow at once."""
        if not self._subscriber.is_subscribed:
            raise ConfigurationError("The app was closed while events were read. Go on with app.events(…, after=…).")
        found: list[tuple[int, StoredEvent | None]] = []
        more = False
        for at in range(len(self._parts)):
            try:
                page = self._client.run(self._call(at))
            except StoreUnavailable:
                self._outage.note_outage()
                continue
            self._outage.note_reply()
            if not page.kept:
                raise ConfigurationError(
                    f"Queue '{self._queue}' keeps no events. Where its jobs are enqueued or run, declare it with "
                    f"app.queue({self._queue!r}, events=10_000)."
                )
            more = more or page.more
            if page.missed:
                found.append((at, None))
            found += [(at, one) for one in page.events]
            if not page.events:
                self._places[at] = page.place
        return list(self._in_order(found)), more

    def _in_order(self, found: list[tuple[int, StoredEvent | None]]) -> Iterator[JobEvent]:
        found.sort(key=lambda one: -1 if one[1] is None else int(one[1].id.partition("-")[0]))
        for at, stored in found:
            if stored is None:
                yield EventsMissed("", "", self._queue, 0, id=self._place())
                continue
            self._places[at] = stored.id
            made = _make(self._parts[at].queue, self._queue, stored, self._place())
            if made is not None:
                yield made

    def _place(self) -> str:
        return "+".join(self._places)


def _make(part: str, queue: str, stored: StoredEvent, place: str) -> JobEvent | None:
    """Return the event that is stored; None: one of a later version."""
    fields = stored.fields
    kind = _KINDS.get(fields.get("e", ""))
    if kind is None:
        return None
    job_id = ids.public(part, fields.get("j", ""))
    at = instant(int(stored.id.partition("-")[0]))
    attempt = int(fields.get("a", "1"))
    special = {name: read(job_id, fields) for name, read in _FIELDS.get(kind, {}).items()}
    return kind(
        job_id,
        fields.get("t", ""),
        queue,
        attempt,
        id=place,
        at=at,
        worker=fields.get("w", ""),
        **special,
    )


def _text(name: str) -> Callable[[str, dict[str, str]], str]:
    return lambda _, fields: fields.get(name, "")


def _seconds(_: str, fields: dict[str, str]) -> float:
    return int(fields.get("ms") or 0) / 1000


def _due(_: str, fields: dict[str, str]) -> datetime | None:
    return instant(int(fields["at"])) if fields.get("at") else None


def _error(job_id: str, fields: dict[str, str]) -> JobFailed | None:
    return JobFailed(job_id, fields["type"], fields.get("text", ""), "") if fields.get("type") else None


_KINDS: dict[str, type[JobEvent]] = {
    kind.name: kind
    for kind in (
        JobEnqueued, JobStarted, JobDone, JobRetried, JobReturned, JobDead, JobCancelledEvent, JobPromoted, JobUpdated,
        JobRedriven,
    )
}  # fmt: skip
_FIELDS: dict[type[JobEvent], dict[str, Callable[[str, dict[str, str]], object]]] = {
    JobEnqueued: {"due": _due},
    JobDone: {"duration": _seconds},
    JobRetried: {"delay": _seconds, "error": _error},
    JobReturned: {"reason": _text("why"), "delay": _seconds},
    JobDead: {"reason": _text("why"), "error": _error},
    JobCancelledEvent: {"reason": _text("why"), "by": _text("by")},
    JobPromoted: {"by": _text("by")},
    JobUpdated: {"by": _text("by"), "due": _due},
    JobRedriven: {"by": _text("by")},
}
