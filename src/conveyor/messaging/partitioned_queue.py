"""A message queue in several partitions: the interface of a queue over one queue per partition."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from msgspec.structs import replace

from conveyor.ids import queue_name, split
from conveyor.messaging.consumer.settling import PartitionSource
from conveyor.messaging.maintenance import DeadLetter, redrive_batch
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.publisher import PartitionedPublisher, Publisher
from conveyor.messaging.queue import Queue, checked_full
from conveyor.store.client.client import Client
from conveyor.store.inspection import QueueCounts, total
from conveyor.store.job_filter import Walk
from conveyor.store.keys import QueueKeys
from conveyor.store.max_length import Full, MaxLength
from conveyor.units import whole_number

T = TypeVar("T")
PAGE = 500


class PartitionQueue(Queue[T]):
    """The queue of one partition. Its name has a form that users cannot give to a queue."""

    def __init__(self, client: Client, keys: QueueKeys, type: Any, **options: Any) -> None:  # noqa: A002
        self._partition_keys = keys
        super().__init__(client, keys.queue, type, **options)

    def _checked_name(self, name: str) -> str:
        return name

    def _keys(self) -> QueueKeys:
        return self._partition_keys


class PartitionedQueue(Queue[T]):
    """
    A queue in several partitions, which may lie on several nodes.

    Messages with the same `group` lie in the same partition, else those with the same `unique` key or `id`; the others
    go round. A `unique` key beside a `group` that places elsewhere is refused, and so is one beside an `id`.
    The id of a message names its partition.
    `push_many` spreads messages evenly, in their order within each partition; with `group` all go to its partition.

    Within a partition all promises of a queue hold; between partitions there is no order, and `consume` lets none
    starve. The maximum length is split: each partition takes all of its part of a bulk push, or nothing of it. Made by
    `Conveyor.queue` with `partitions`.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        partitions: int,
        lease_ms: int,
        max_length: int | None = None,
        full: Full = "raise",
        events: int | None = None,
        **options: Any,
    ) -> None:
        """Declare the queue, with the other *options* of one; nothing is sent. Raises ConfigurationError."""
        whole = None if max_length is None else MaxLength(whole_number("max_length", max_length, 1), checked_full(full))
        self.partitions = Partitions(client, queue_name(name), partitions, whole, events)
        self.parts: tuple[Queue[T], ...] = tuple(
            PartitionQueue(
                client, keys, type, lease_ms=lease_ms, max_length=self.partitions.max_length, full=full, **options
            )
            for keys in self.partitions.keys
        )
        super().__init__(client, name, type, lease_ms=lease_ms, max_length=max_length, full=full, **options)
        for part in self.parts:
            part.limits = self.limits

    def _partition_count(self) -> int:
        return self.partitions.count

    def _make_publisher(self) -> Publisher[T]:
        target = self.client.redis_target(self.durability)
        return PartitionedPublisher(target, self.partitions, self.codec, self._middlewares)

    def _sources(self, transient: bool) -> list[PartitionSource[T]]:
        return [replace(part._source(transient), partitions=self.partitions) for part in self.parts]  # noqa: SLF001

    # -- look and care --------------------------------------------------------------------------------------------

    def stats(self) -> QueueCounts:
        """Count over all partitions: sums, the oldest age, and the most `workers` of a partition."""
        return total([part.stats() for part in self.parts])

    async def astats(self) -> QueueCounts:
        """Awaitable form of `stats`."""
        return total([await part.astats() for part in self.parts])

    def _peek(self) -> QueueCounts:
        return total([part._peek() for part in self.parts])  # noqa: SLF001

    def pause(self) -> None:
        """Stop leasing from all partitions until `resume`; pushes are still accepted."""
        self.partitions.agree()
        for part in self.parts:
            part.pause()

    def resume(self) -> None:
        """End a pause; waiting consumers continue at once."""
        self.partitions.agree()
        for part in self.parts:
            part.resume()

    async def apause(self) -> None:
        """Awaitable form of `pause`."""
        await self.partitions.aagree()
        for part in self.parts:
            await part.apause()

    async def aresume(self) -> None:
        """Awaitable form of `resume`."""
        await self.partitions.aagree()
        for part in self.parts:
            await part.aresume()

    def purge(self, dead: bool = False) -> int:
        """Remove all waiting messages, or the *dead* letters, and return how many."""
        return sum(part.purge(dead) for part in self.parts)

    async def apurge(self, dead: bool = False) -> int:
        """Awaitable form of `purge`."""
        return sum([await part.apurge(dead) for part in self.parts])

    def redrive(self, limit: int | None = None) -> int:
        """Put dead letters back, the oldest of all partitions first, and return how many."""
        if limit is None:
            return sum(part.redrive() for part in self.parts)
        chosen = _ids_by_partition(islice(self.dead_letters(), _limit(limit)))
        return sum(self.client.run(redrive_batch(keys, Walk(ids=ids))) for keys, ids in self._batches(chosen))

    async def aredrive(self, limit: int | None = None) -> int:
        """Awaitable form of `redrive`."""
        if limit is None:
            return sum([await part.aredrive() for part in self.parts])
        letters: list[DeadLetter] = []
        if _limit(limit):
            async for letter in self.adead_letters():
                letters.append(letter)
                if len(letters) == limit:
                    break
        batches = self._batches(_ids_by_partition(letters))
        return sum([await self.client.arun(redrive_batch(keys, Walk(ids=ids))) for keys, ids in batches])

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Yield the dead letters of all partitions, oldest first."""
        return heapq.merge(*(part.dead_letters() for part in self.parts), key=_died)

    async def adead_letters(self) -> AsyncIterator[DeadLetter]:
        """Awaitable form of `dead_letters`."""
        sources = [aiter(part.adead_letters()) for part in self.parts]
        heads = [(await anext(source, None), source) for source in sources]
        while True:
            left = [number for number, (letter, _) in enumerate(heads) if letter is not None]
            if not left:
                return
            first = min(left, key=lambda number: _died(heads[number][0]))
            letter, source = heads[first]
            assert letter is not None
            yield letter
            heads[first] = (await anext(source, None), source)

    def _batches(self, chosen: dict[str, list[str]]) -> Iterator[tuple[QueueKeys, list[str]]]:
        """Yield the ids to put back in one call each; *chosen* maps partitions to ids."""
        for part in self.parts:
            ids = chosen.get(part.name, [])
            for first in range(0, len(ids), PAGE):
                yield part.keys, ids[first : first + PAGE]


def _limit(limit: object) -> int:
    return whole_number("limit", limit, 0)


def _died(letter: DeadLetter | None) -> float:
    assert letter is not None
    return letter.died_at.timestamp()


def _ids_by_partition(letters: Iterable[DeadLetter]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for letter in letters:
        chosen.setdefault(letter.queue, []).append(split(letter.id)[1])
    return chosen
