"""Storing values in a queue of several partitions: each message placed, then sent with what goes to the same one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import TypeVar

from conveyor import ident
from conveyor.codec import ValueCodec
from conveyor.errors import ConveyorError, DurabilityNotReached, QueueFull, StoreUnavailable
from conveyor.partition import Partitions
from conveyor.posting import Posting
from conveyor.pusher import Pusher
from conveyor.store.backend import refuse_in_loop
from conveyor.store.durability import after
from conveyor.store.way import Way

T = TypeVar("T")
Part = tuple[int, slice]
"""A partition, and which of the messages go there."""


class Scatter(Pusher[T]):
    """The way into all partitions of a queue; `pushers` are the ways into each."""

    def __init__(self, partitions: Partitions, pushers: Sequence[Pusher[T]], codec: ValueCodec[T]) -> None:
        """Take the partitions, and how each is pushed to."""
        most = None if partitions.most is None else partitions.most * partitions.count
        super().__init__(partitions.backend, partitions.whole, codec, most)
        self._partitions = partitions
        self._pushers = pushers

    def through(self, backend: Way) -> Scatter[T]:
        """Return the same with another way into Redis."""
        other = copy(self)
        other._pushers = [pusher.through(backend) for pusher in self._pushers]  # noqa: SLF001
        if backend.deferred:
            other._partitions = self._partitions.unasked()  # noqa: SLF001
        return other

    def push(self, value: T, options: Posting, group: str | None = None) -> str:
        """Store one value and return its public id."""
        pusher = self._pusher(options, group)
        return self._partitions.keep(lambda: pusher.push(value, options))

    async def apush(self, value: T, options: Posting, group: str | None = None) -> str:
        """Store one value and return its public id."""
        pusher = self._pusher(options, group)
        return await self._partitions.akeep(lambda: pusher.apush(value, options))

    def push_many(self, values: Iterable[T], options: Posting, group: str | None = None) -> list[str]:
        """Store values, spread evenly, in their order within each partition; return their public ids in their order."""
        refuse_in_loop()
        ids: list[str] = []
        for window in self._windows(values, options.head, ids):
            fresh, stored = ident.new_ids(len(window)), list(ids)
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
                    raise after(error, stored) from None
                fresh[part] = pusher._public(bare)  # noqa: SLF001
            ids += fresh
        return ids

    async def apush_many(self, values: Iterable[T], options: Posting, group: str | None = None) -> list[str]:
        """Do the same on this event loop."""
        ids: list[str] = []
        for window in self._windows(values, options.head, ids):
            fresh, stored = ident.new_ids(len(window)), list(ids)
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
                    raise after(error, stored) from None
                fresh[part] = pusher._public(bare)  # noqa: SLF001
            ids += fresh
        return ids

    # -- steps ----------------------------------------------------------------------------------------------------

    def _pusher(self, options: Posting, group: str | None) -> Pusher[T]:
        return self._pushers[self._partitions.pick(group=group, unique=options.unique, id=options.id)]

    def _send_part(self, pusher: Pusher[T], chunk: list[bytes], ids: list[str], options: Posting) -> None:
        self._partitions.keep(lambda: pusher._send(chunk, ids, options))  # noqa: SLF001

    async def _asend_part(self, pusher: Pusher[T], chunk: list[bytes], ids: list[str], options: Posting) -> None:
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
