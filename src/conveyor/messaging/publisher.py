"""
Pushes values to a queue: plans the calls purely, and sends them in few round trips.

A plan is a program whose steps are calls of a push: values are encoded and checked, placed in a partition, and cut into
calls. A blocking and an awaitable driver send them.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

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
from conveyor.messaging.push_options import (
    PreparedPush,
    PushMiddleware,
    amake_entries,
    each_of,
    make_entries,
    pass_through,
    push_scope,
)
from conveyor.payload.codec import ValueCodec
from conveyor.store.client.batching import BULK, PushTarget
from conveyor.store.client.client import Client
from conveyor.store.client.durability import after_partial_push
from conveyor.store.keys import QueueKeys
from conveyor.store.max_length import UNBOUNDED, MaxLength
from conveyor.store.script import adrive, drive

if TYPE_CHECKING:
    from conveyor.messaging.declared_limits import LoadKeyReader, QueueLimits

T = TypeVar("T")
WINDOW = 100_000
"""Messages of an iterator checked before any is sent; most that a bounded queue takes at once."""
CHUNK_BYTES = 8_000_000
"""Bytes sent in one call, so that bulk pushes of large messages let others in."""


class Window(NamedTuple):
    """Messages that are checked together: their envelopes, and the options of each where middlewares have seen them."""

    envelopes: list[bytes]
    options: list[PreparedPush]

    def part(self, which: slice) -> Window:
        """Return some of them."""
        return Window(self.envelopes[which], self.options[which])


class PlannedPush(NamedTuple):
    """One call of a push to one queue or partition. `whole`: all messages are stored, or none."""

    keys: QueueKeys
    ids: Sequence[str]
    envelopes: Sequence[bytes]
    options: PreparedPush
    max_length: MaxLength = UNBOUNDED
    whole: bool = False
    own: Sequence[PreparedPush] = ()
    """The options of each message, where middlewares have seen them; empty: *options* are those of all."""


Plan = Generator[PlannedPush, Sequence[str], list[str]]
"""Yields calls, receives the ids in their replies, and returns the public ids of all messages."""


class Publisher(Generic[T]):
    """Pushes values to one queue, through *middlewares*. `max_length` bounds the queue; None does not."""

    places_by_group: ClassVar[bool] = False
    """True when the group picks the partition."""

    def __init__(
        self, client: Client, target: PushTarget, keys: QueueKeys, codec: ValueCodec[T], max_length: MaxLength | None,
        middlewares: Sequence[PushMiddleware] = (),
    ) -> None:  # fmt: skip
        self._client, self._target = client, target
        self._middlewares = middlewares
        self._keys = keys
        self._codec = codec
        self._max_length = max_length or UNBOUNDED
        self.limits: QueueLimits | None = None
        """The limits that the first push declares; None: the queue has none."""
        self.load_keys: LoadKeyReader | None = None
        """Reads the keys of each message that its options do not tell already."""

    def through(self, target: PushTarget) -> Publisher[T]:
        """Return the same with another push target."""
        other = copy(self)
        other._target = target  # noqa: SLF001
        return other

    def push(self, value: T, options: PreparedPush) -> str:
        """Store one value and return its public id."""
        if self._middlewares:
            with push_scope(self._middlewares):
                planned = self._planned(value, options)
                [id_] = self._send(planned)
        else:
            planned = self._planned(value, options)
            [id_] = self._send(planned)
        return public(planned.keys.queue, id_)

    async def apush(self, value: T, options: PreparedPush) -> str:
        """Awaitable form of `push`."""
        if self._middlewares:
            with push_scope(self._middlewares):
                planned = self._planned(value, options)
                [id_] = await self._asend(planned)
        else:
            planned = self._planned(value, options)
            [id_] = await self._asend(planned)
        return public(planned.keys.queue, id_)

    def _planned(self, value: T, options: PreparedPush) -> PlannedPush:
        """Return the call that stores one value, as the middlewares leave it."""
        if self._middlewares or self.load_keys is not None:
            value, options = self._passed(value, options)
        envelope = options.head + self._codec.encode(value)
        return PlannedPush(self._place(options), (new_id(),), (envelope,), options, self._max_length)

    def push_many(self, values: Iterable[T], options: PreparedPush) -> list[str]:
        """Store values in their order and return their public ids."""
        with push_scope(self._middlewares, many=True):
            return drive(self.plan(values, options), self._send)

    async def apush_many(self, values: Iterable[T], options: PreparedPush) -> list[str]:
        """Awaitable form of `push_many`."""
        with push_scope(self._middlewares, many=True):
            return await adrive(self.plan(values, options), self._asend)

    def plan(self, values: Iterable[T], options: PreparedPush) -> Plan:
        """Plan a push of *values* in their order. An error thrown in is raised with what was stored."""
        keys = self._keys
        ids: list[str] = []
        for window in self._windows(values, options, ids):
            for chunk in _cut(window, self._max_length):
                fresh = new_ids(len(chunk.envelopes))
                try:
                    yield PlannedPush(keys, fresh, chunk.envelopes, options, self._max_length, True, chunk.options)
                except (QueueFull, StoreUnavailable) as error:
                    raise _partly(error, len(ids)) from error
                except DurabilityNotReached as error:
                    raise after_partial_push(error, ids) from None
                ids += _public(keys, fresh)
        return ids

    # -- drivers of one call --------------------------------------------------------------------------------------

    def _send(self, push: PlannedPush) -> Sequence[str]:
        keys, ids, envelopes, options, max_length, whole, own = push
        if self.limits is not None and not self._target.deferred:
            self.limits.ensure(keys)
        if max_length.full == "raise" and (all(one.is_plain for one in own) if own else options.is_plain):
            pairs: list[str | bytes] = [b""] * (2 * len(ids))
            pairs[::2], pairs[1::2] = ids, envelopes
            self._target.push_plain(keys, pairs, max_length=max_length)
            return ids
        entries = make_entries(options, own, ids, envelopes)
        return self._client.push_with_room(self._target, keys, entries, max_length, whole=whole)

    async def _asend(self, push: PlannedPush) -> Sequence[str]:
        keys, ids, envelopes, options, max_length, whole, own = push
        if self.limits is not None and not self._target.deferred:
            await self.limits.aensure(keys)
        if len(ids) == 1 and options.is_plain and not own and not max_length and self._target is self._client:
            if not self._client.is_announced(keys):
                await self._client.aannounce(keys)
            await self._client.put(keys, ids[0], envelopes[0])
            return ids
        entries = await amake_entries(options, own, ids, envelopes)
        return await self._client.apush_with_room(
            self._target, keys, entries, max_length, whole=whole and max_length > 0
        )

    # -- steps ----------------------------------------------------------------------------------------------------

    def _place(self, options: PreparedPush) -> QueueKeys:
        """Return where one message with these options goes."""
        return self._keys

    def _passed(self, value: Any, options: PreparedPush) -> tuple[Any, PreparedPush]:
        """Return a value and its options as the middlewares leave them, with the keys of its limits."""
        return pass_through(self._middlewares, self._keys.queue, value, options, self.load_keys)

    def _windows(self, values: Iterable[T], options: PreparedPush, stored: list[str]) -> Iterator[Window]:
        """Yield messages that are checked together. *stored* are the messages before, for errors."""
        rest = each_of(values)
        if self._max_length.full == "block":
            most = min(WINDOW, self._max_length)
            window = self._encode(islice(rest, most + 1), options, stored)
            while window.envelopes:
                # Accepted whole, unless it is more than the queue ever takes: then in small parts, as room comes.
                size = len(window.envelopes) if not stored and len(window.envelopes) <= most else max(1, most // 4)
                for first in range(0, len(window.envelopes), size):
                    yield window.part(slice(first, first + size))
                window = self._encode(islice(rest, most), options, stored)
            return
        if self._max_length:
            window = self._encode(islice(rest, WINDOW + 1), options, stored)
            if len(window.envelopes) > WINDOW:
                raise ConfigurationError(
                    f"A queue with max_length takes at most {WINDOW:,} messages at a time, since they are accepted "
                    "whole or not at all. Push them in parts. Nothing was stored."
                )
            if window.envelopes:
                yield window
            return
        size = len(values) if isinstance(values, Collection) else WINDOW  # a list is checked whole
        while (window := self._encode(islice(rest, max(size, 1)), options, stored)).envelopes:
            yield window

    def _encode(self, values: Iterable[T], options: PreparedPush, stored: list[str]) -> Window:
        encode, head = self._codec.encode, options.head
        envelopes: list[bytes] = []
        each: list[PreparedPush] = []
        append = envelopes.append
        try:
            if self._middlewares or self.load_keys is not None:
                for value in values:
                    passed, own = self._passed(value, options)
                    if own.group != options.group and self.places_by_group:
                        raise ConfigurationError(
                            "A middleware has set outgoing.group, which push_many to a queue in partitions does not take: the "
                            "group picks the partition of all its messages."
                        )
                    if own.id is not None or own.unique is not None:
                        raise ConfigurationError(
                            "A middleware has set outgoing.id or outgoing.unique, which push_many does not take: each "
                            "belongs to one message."
                        )
                    each.append(own)
                    append(own.head + encode(passed))
            else:
                for value in values:
                    append(head + encode(value))
        except PayloadError as error:
            where = f"Message {len(stored) + len(envelopes):,}: {error}"
            raise _partly(PayloadError(where, code=error.code), len(stored)) from error
        return Window(envelopes, each)


PartitionSlice = tuple[int, slice]
"""A partition, and which of the messages go there."""


class PartitionedPublisher(Publisher[T]):
    """Pushes values to a queue in partitions, each to the one its group, key or turn picks."""

    places_by_group = True

    def __init__(
        self,
        target: PushTarget,
        partitions: Partitions,
        codec: ValueCodec[T],
        middlewares: Sequence[PushMiddleware] = (),
    ) -> None:
        super().__init__(partitions.client, target, partitions.queue_keys, codec, partitions.max_length, middlewares)
        self._partitions = partitions

    def through(self, target: PushTarget) -> PartitionedPublisher[T]:
        """Return the same with another push target."""
        other = copy(self)
        other._target = target  # noqa: SLF001
        if target.deferred:
            other._partitions = self._partitions.without_agreement()  # noqa: SLF001
        return other

    def plan(self, values: Iterable[T], options: PreparedPush) -> Plan:
        """Plan a push of *values*, spread evenly, in their order within each partition."""
        ids: list[str] = []
        for window in self._windows(values, options, ids):
            fresh, stored = new_ids(len(window.envelopes)), list(ids)
            for at, part in self._parts(len(window.envelopes), options.group):
                keys, bare, done = self._partitions.keys[at], fresh[part], 0
                try:
                    for chunk in _cut(window.part(part), self._max_length):
                        sent = bare[done : done + len(chunk.envelopes)]
                        yield PlannedPush(keys, sent, chunk.envelopes, options, self._max_length, True, chunk.options)
                        stored += _public(keys, sent)
                        done += len(sent)
                except (QueueFull, StoreUnavailable) as error:
                    raise _partly_placed(error, at, len(stored)) from error
                except DurabilityNotReached as error:
                    raise after_partial_push(error, stored) from None
                fresh[part] = _public(keys, bare)
            ids += fresh
        return ids

    def _send(self, push: PlannedPush) -> Sequence[str]:
        return self._partitions.run_agreed(lambda: super(PartitionedPublisher, self)._send(push), push.keys)

    async def _asend(self, push: PlannedPush) -> Sequence[str]:
        return await self._partitions.arun_agreed(lambda: super(PartitionedPublisher, self)._asend(push), push.keys)

    def _place(self, options: PreparedPush) -> QueueKeys:
        partitions = self._partitions
        return partitions.keys[partitions.place(group=options.group, unique=options.unique, id=options.id)]

    def _parts(self, length: int, group: str | None) -> Iterator[PartitionSlice]:
        """
        Yield the part of each partition: all messages of a group, or every Nth of *length*.

        Partitions whose servers are away have no part while others answer.
        """
        if group is not None:
            yield self._partitions.pick(group=group), slice(0, length)
            return
        first, all_ = self._partitions.next_in_turn(), self._partitions.count
        in_turn = [(first + step) % all_ for step in range(all_)]
        live = self._partitions.live(in_turn)
        for step, at in enumerate(live[:length]):
            yield at, slice(step, length, len(live))


def _public(keys: QueueKeys, ids: Iterable[str]) -> list[str]:
    """Return the public forms of generated ids."""
    prefix = f"{keys.queue}:"
    return [prefix + id_ for id_ in ids]


def _cut(window: Window, max_length: int) -> Iterator[Window]:
    """Yield messages as they are sent together: all at once to a bounded queue."""
    envelopes = window.envelopes
    if max_length:
        yield window
    elif sum(map(len, envelopes)) <= len(envelopes) * CHUNK_BYTES // BULK:
        for first in range(0, len(envelopes), BULK):
            yield window.part(slice(first, first + BULK))
    else:
        yield from map(window.part, _by_bytes(envelopes))


def _by_bytes(envelopes: list[bytes]) -> Iterator[slice]:
    first = size = 0
    for at, envelope in enumerate(envelopes):
        if at > first and (size + len(envelope) > CHUNK_BYTES or at - first >= BULK):
            yield slice(first, at)
            first, size = at, 0
        size += len(envelope)
    yield slice(first, len(envelopes))


def _partly(error: ConveyorError, stored: int) -> ConveyorError:
    """Return the error of a bulk push that had stored some before."""
    if not stored:
        return error
    rest = f"\nThe first {stored:,} messages were stored, the rest was not."
    return type(error)(_without_nothing(error) + rest, code=error.code)


def _partly_placed(error: ConveyorError, at: int, stored: int) -> ConveyorError:
    """Return the error of a bulk push that partition *at* refused after others took their part."""
    if not stored:
        return error
    return type(error)(
        f"{_without_nothing(error)}\nEach partition takes its part of a bulk push by itself: {stored:,} messages were "
        f"stored before partition {at} refused, the rest was not.",
        code=error.code,
    )


def _without_nothing(error: ConveyorError) -> str:
    """Return the text of *error* without the claim that nothing was stored."""
    return str(error).replace("Nothing was stored.", "").replace("Nothing was enqueued.", "").strip()
