"""
Storing values in a queue: encoded and checked first, then sent in as few round trips as there can be.

Storing values in a queue of several partitions: each message placed, then sent with what goes to the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Generic, TypeVar

from conveyor.errors import (
    ConfigurationError,
    ConveyorError,
    DurabilityNotReached,
    PayloadError,
    QueueFull,
    StoreUnavailable,
)
from conveyor.ids import new_id, new_ids, public
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.push_options import PreparedPush, wrapped_entries
from conveyor.payload.codec import ValueCodec
from conveyor.store.client.batching import BULK, PushTarget
from conveyor.store.client.client import refuse_in_loop
from conveyor.store.client.durability import after_partial_push
from conveyor.store.keys import QueueKeys

T = TypeVar("T")
WINDOW = 100_000
"""Messages of an iterator that are checked before any is sent, and most that a bounded queue takes in one call."""
CHUNK_BYTES = 8_000_000
"""Bytes sent in one call, so that bulk pushes of large messages let others in."""


class Publisher(Generic[T]):
    """The way into one queue. `max_length` bounds it, None does not."""

    def __init__(self, client: PushTarget, keys: QueueKeys, codec: ValueCodec[T], max_length: int | None) -> None:
        """Take where to, how, and how many."""
        self._client = client
        self._keys = keys
        self._codec = codec
        self._most = max_length or 0

    def through(self, client: PushTarget) -> Publisher[T]:
        """Return the same with another way into Redis."""
        other = copy(self)
        other._client = client  # noqa: SLF001
        return other

    def push(self, value: T, options: PreparedPush) -> str:
        """Store one value and return its public id."""
        envelope, id_ = options.head + self._codec.encode(value), new_id()
        if options.is_plain:
            self._client.push_plain(self._keys, (id_, envelope), max_length=self._most)
            return public(self._keys.queue, id_)
        [id_] = self._client.push(self._keys, [options.entry(id_, envelope)], max_length=self._most)
        return public(self._keys.queue, id_)

    async def apush(self, value: T, options: PreparedPush) -> str:
        """Store one value and return its public id."""
        envelope, id_ = options.head + self._codec.encode(value), new_id()
        made = await wrapped_entries(options, [id_], [envelope]) if options.wraps else [options.entry(id_, envelope)]
        [id_] = await self._client.apush(self._keys, made, max_length=self._most)
        return public(self._keys.queue, id_)

    def push_many(self, values: Iterable[T], options: PreparedPush) -> list[str]:
        """Store values in their order and return their public ids."""
        refuse_in_loop()
        ids: list[str] = []
        for chunk in self._chunks(values, options.head, ids):
            fresh = new_ids(len(chunk))
            try:
                self._send(chunk, fresh, options)
            except (QueueFull, StoreUnavailable) as error:
                raise _partly(error, len(ids)) from error
            except DurabilityNotReached as error:
                raise after_partial_push(error, self._public(ids)) from None
            ids += fresh
        return self._public(ids)

    async def apush_many(self, values: Iterable[T], options: PreparedPush) -> list[str]:
        """Store values in their order and return their public ids."""
        ids: list[str] = []
        for chunk in self._chunks(values, options.head, ids):
            fresh = new_ids(len(chunk))
            try:
                await self._asend(chunk, fresh, options)
            except (QueueFull, StoreUnavailable) as error:
                raise _partly(error, len(ids)) from error
            except DurabilityNotReached as error:
                raise after_partial_push(error, self._public(ids)) from None
            ids += fresh
        return self._public(ids)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _public(self, ids: list[str]) -> list[str]:
        place = f"{self._keys.queue}:"
        return [place + id_ for id_ in ids]

    def _send(self, chunk: list[bytes], ids: list[str], options: PreparedPush) -> None:
        if options.is_plain:
            pairs: list[str | bytes] = [b""] * (2 * len(chunk))
            pairs[::2], pairs[1::2] = ids, chunk
            self._client.push_plain(self._keys, pairs, max_length=self._most)
            return
        entries = [options.entry(id_, envelope) for id_, envelope in zip(ids, chunk, strict=True)]
        self._client.push(self._keys, entries, max_length=self._most, whole=True)

    async def _asend(self, chunk: list[bytes], ids: list[str], options: PreparedPush) -> None:
        entries = await wrapped_entries(options, ids, chunk)
        await self._client.apush(self._keys, entries, max_length=self._most, whole=self._most > 0)

    def _chunks(self, values: Iterable[T], head: bytes, stored: list[str]) -> Iterator[list[bytes]]:
        """Yield envelopes as they are sent together; *stored* tells, in errors, how many went before."""
        for window in self._windows(values, head, stored):
            yield from self._cut(window)

    def _cut(self, window: list[bytes]) -> Iterator[list[bytes]]:
        if self._most:
            yield window
        elif sum(map(len, window)) <= len(window) * CHUNK_BYTES // BULK:
            for first in range(0, len(window), BULK):
                yield window[first : first + BULK]
        else:
            yield from _by_bytes(window)

    def _windows(self, values: Iterable[T], head: bytes, stored: list[str]) -> Iterator[list[bytes]]:
        rest = iter(values)
        if self._most:
            window = self._encode(islice(rest, WINDOW + 1), head, stored)
            if len(window) > WINDOW:
                raise ConfigurationError(
                    f"A queue with max_length takes at most {WINDOW:,} messages at a time, since they are accepted "
                    "whole or not at all. Push them in parts. Nothing was stored."
                )
            if window:
                yield window
            return
        size = len(values) if isinstance(values, Collection) else WINDOW  # a list is checked whole
        while window := self._encode(islice(rest, max(size, 1)), head, stored):
            yield window

    def _encode(self, values: Iterable[T], head: bytes, stored: list[str]) -> list[bytes]:
        encode = self._codec.encode
        envelopes: list[bytes] = []
        append = envelopes.append
        try:
            for value in values:
                append(head + encode(value))
        except PayloadError as error:
            where = f"Message {len(stored) + len(envelopes):,}: {error}"
            raise _partly(PayloadError(where, code=error.code), len(stored)) from error
        return envelopes


def _by_bytes(window: list[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for envelope in window:
        if chunk and (size + len(envelope) > CHUNK_BYTES or len(chunk) >= BULK):
            yield chunk
            chunk, size = [], 0
        chunk.append(envelope)
        size += len(envelope)
    yield chunk


def _partly(error: ConveyorError, stored: int) -> ConveyorError:
    """Return the error of a bulk push that had stored some before."""
    if not stored:
        return error
    text = str(error)
    for nothing in ("Nothing was stored.", "Nothing was enqueued."):
        text = text.replace(nothing, "")
    return type(error)(f"{text.strip()}\nThe first {stored:,} messages were stored, the rest was not.", code=error.code)


Part = tuple[int, slice]
"""A partition, and which of the messages go there."""


class PartitionedPublisher(Publisher[T]):
    """The way into all partitions of a queue; `pushers` are the ways into each."""

    def __init__(self, partitions: Partitions, pushers: Sequence[Publisher[T]], codec: ValueCodec[T]) -> None:
        """Take the partitions, and how each is pushed to."""
        most = None if partitions.most is None else partitions.most * partitions.count
        super().__init__(partitions.client, partitions.whole, codec, most)
        self._partitions = partitions
        self._pushers = pushers

    def through(self, client: PushTarget) -> PartitionedPublisher[T]:
        """Return the same with another way into Redis."""
        other = copy(self)
        other._pushers = [pusher.through(client) for pusher in self._pushers]  # noqa: SLF001
        if client.deferred:
            other._partitions = self._partitions.unasked()  # noqa: SLF001
        return other

    def push(self, value: T, options: PreparedPush, group: str | None = None) -> str:
        """Store one value and return its public id."""
        pusher = self._pusher(options, group)
        return self._partitions.keep(lambda: pusher.push(value, options))

    async def apush(self, value: T, options: PreparedPush, group: str | None = None) -> str:
        """Store one value and return its public id."""
        pusher = self._pusher(options, group)
        return await self._partitions.akeep(lambda: pusher.apush(value, options))

    def push_many(self, values: Iterable[T], options: PreparedPush, group: str | None = None) -> list[str]:
        """Store values, spread evenly, in their order within each partition; return their public ids in their order."""
        refuse_in_loop()
        ids: list[str] = []
        for window in self._windows(values, options.head, ids):
            fresh, stored = new_ids(len(window)), list(ids)
            for at, part in self._parts(len(window), group):
                pusher, bare, done = self._pushers[at], fresh[part], 0
                try:
                    for chunk in pusher._cut(window[part]):  # noqa: SLF001
                        self._send_part(pusher, chunk, bare[done : done + len(chunk)], options)
                        stored += pusher._public(bare[done : done + len(chunk)])  # noqa: SLF001
                        done += len(chunk)
                except (QueueFull, StoreUnavailable) as error:
                    raise self._some(error, at, len(stored)) from error
                except DurabilityNotReached as error:
                    raise after_partial_push(error, stored) from None
                fresh[part] = pusher._public(bare)  # noqa: SLF001
            ids += fresh
        return ids

    async def apush_many(self, values: Iterable[T], options: PreparedPush, group: str | None = None) -> list[str]:
        """Do the same on this event loop."""
        ids: list[str] = []
        for window in self._windows(values, options.head, ids):
            fresh, stored = new_ids(len(window)), list(ids)
            for at, part in self._parts(len(window), group):
                pusher, bare, done = self._pushers[at], fresh[part], 0
                try:
                    for chunk in pusher._cut(window[part]):  # noqa: SLF001
                        await self._asend_part(pusher, chunk, bare[done : done + len(chunk)], options)
                        stored += pusher._public(bare[done : done + len(chunk)])  # noqa: SLF001
                        done += len(chunk)
                except (QueueFull, StoreUnavailable) as error:
                    raise self._some(error, at, len(stored)) from error
                except DurabilityNotReached as error:
                    raise after_partial_push(error, stored) from None
                fresh[part] = pusher._public(bare)  # noqa: SLF001
            ids += fresh
        return ids

    # -- steps ----------------------------------------------------------------------------------------------------

    def _pusher(self, options: PreparedPush, group: str | None) -> Publisher[T]:
        return self._pushers[self._partitions.pick(group=group, unique=options.unique, id=options.id)]

    def _send_part(self, pusher: Publisher[T], chunk: list[bytes], ids: list[str], options: PreparedPush) -> None:
        self._partitions.keep(lambda: pusher._send(chunk, ids, options))  # noqa: SLF001

    async def _asend_part(
        self, pusher: Publisher[T], chunk: list[bytes], ids: list[str], options: PreparedPush
    ) -> None:
        await self._partitions.akeep(lambda: pusher._asend(chunk, ids, options))  # noqa: SLF001

    def _parts(self, length: int, group: str | None) -> Iterator[Part]:
        """Yield where which of *length* messages go: all to their group's partition, or every Nth to the same."""
        if group is not None:
            yield self._partitions.pick(group=group), slice(0, length)
            return
        count = self._partitions.count
        first = self._partitions.turn()
        for step in range(min(count, length)):
            yield (first + step) % count, slice(step, length, count)

    def _some(self, error: ConveyorError, at: int, stored: int) -> ConveyorError:
        """Return the error of a bulk push of which other partitions may have taken their part."""
        if not stored:
            return error
        text = str(error).replace("Nothing was enqueued.", "").replace("Nothing was stored.", "").strip()
        return type(error)(
            f"{text}\nEach partition takes its part of a bulk push by itself: {stored:,} messages were stored before "
            f"partition {at} refused, the rest was not.",
            code=error.code,
        )
