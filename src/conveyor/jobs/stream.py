"""Reads the partial results of a job."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from conveyor.errors import ConfigurationError, ResultExpired, StoreUnavailable
from conveyor.ids import public
from conveyor.jobs.results import CHECK_AGAIN, Listener, OutageTimer
from conveyor.payload.sealed_records import open_part
from conveyor.store import streams
from conveyor.store.script import Call
from conveyor.store.sleepers import SleepingTask, SleepingThread
from conveyor.store.streams import StoredPart

if TYPE_CHECKING:
    from conveyor.jobs.results import ResultSubscriber
    from conveyor.payload.codec import ValueCodec
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys

_ID = re.compile(r"(\d{1,15})-(\d{1,15})", re.ASCII)


class Part(msgspec.Struct, frozen=True):
    """A partial result: `id` is where to go on (``job.stream(after=part.id)``), `attempt` the one that emitted it, from 1 on."""

    id: str
    value: Any
    attempt: int


def place_of(after: str | None) -> tuple[int, int] | None:
    """Return attempt and number of the id of a part; raises ConfigurationError."""
    if after is None:
        return None
    match = _ID.fullmatch(after) if isinstance(after, str) else None
    if match is None:
        raise ConfigurationError(f"stream(after=…) takes the id of a part, such as '1-7', not {after!r}.")
    return int(match[1]), int(match[2])


class PartReader:
    """One reader of the stream of a job, and its place there."""

    def __init__(
        self, client: Client, subscriber: ResultSubscriber, keys: QueueKeys, id: str, place: tuple[int, int] | None,  # noqa: A002
        *, sealing: PayloadPipeline | None, codec: ValueCodec[Any], not_found: Callable[[], Exception],
    ) -> None:  # fmt: skip
        """
        Args:
            client: the connections of the app.
            subscriber: its one subscription.
            keys: those of the queue.
            id: of the job, without the queue.
            place: the part after which it begins, None: at the first.
            sealing: opens sealed parts.
            codec: decodes values.
            not_found: returns the error that says that the job is not known.
        """
        self._client, self._subscriber, self._keys, self._id, self._place = client, subscriber, keys, id, place
        self._sealing, self._codec, self._not_found = sealing, codec, not_found
        self._outage = OutageTimer()
        self._word = ""
        self._listener: Listener | None = None

    def read(self) -> Generator[Part, None, None]:
        """Yield the parts, each as soon as it is there, until the job has ended."""
        thread = SleepingThread()
        try:
            while True:
                try:
                    stored = self._take(self._client.run(self._call()))
                except StoreUnavailable:
                    self._outage.note_outage()
                    self._word, stored = "open", []
                for one in stored:
                    yield self._open(one)
                if self._word == "ended":
                    return
                if self._word == "more":
                    continue
                if self._listener is None:
                    self._listener = self._subscriber.listen(self._keys, self._id, "p", thread.wake)
                    self._subscriber.subscribe()
                else:
                    thread.sleep(CHECK_AGAIN)
        finally:
            if self._leaves_nobody():
                self._subscriber.stop_watching(self._keys, self._id)

    async def aread(self) -> AsyncGenerator[Part, None]:
        """Awaitable form of `read`."""
        task = SleepingTask()
        try:
            while True:
                try:
                    stored = self._take(await self._client.arun(self._call()))
                except StoreUnavailable:
                    self._outage.note_outage()
                    self._word, stored = "open", []
                for one in stored:
                    yield self._open(one)
                if self._word == "ended":
                    return
                if self._word == "more":
                    continue
                if self._listener is None:
                    self._listener = self._subscriber.listen(self._keys, self._id, "p", task.wake)
                    await self._subscriber.asubscribe()
                else:
                    await task.sleep(CHECK_AGAIN)
        finally:
            if self._leaves_nobody():
                await self._subscriber.astop_watching(self._keys, self._id)

    def _call(self) -> Call[tuple[str, list[StoredPart]]]:
        channel = "" if self._listener is None else self._subscriber.watch_channel
        return streams.read_stream(self._keys, self._id, channel, self._place)

    def _take(self, reply: tuple[str, list[StoredPart]]) -> list[StoredPart]:
        self._outage.note_reply()
        self._word, stored = reply
        if self._word == "gone":
            raise self._not_found()
        return stored

    def _open(self, stored: StoredPart) -> Part:
        queue = self._keys.queue
        attempt, number = self._place or (0, 0)
        if stored.number != (number + 1 if stored.attempt == attempt else 1):
            raise ResultExpired(
                f"Parts of {public(queue, self._id)} before {stored.id} are missing: a stream keeps the newest "
                f"{streams.MOST_PARTS:,} parts, for a day while the job runs. Go on with what there is:  "
                f"job.stream(after='{stored.attempt}-{stored.number - 1}')"
            )
        body = open_part(self._sealing, stored.data, queue, self._id, stored.id, self._codec.max_payload)
        part = Part(stored.id, self._codec.decode(body), stored.attempt)
        self._place = stored.attempt, stored.number
        return part

    def _leaves_nobody(self) -> bool:
        """Stop listening; return whether the registration in Redis is to be removed."""
        listener, self._listener = self._listener, None
        return listener is not None and self._subscriber.unlisten(self._id, listener) and self._word != "ended"
