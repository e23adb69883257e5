"""
Queues that lie in several partitions: which one a message belongs in, and the number all programs must agree on.

A key picks its partition by CRC-32, which every process and version computes alike. A message without a key goes
round: to the next partition at each push, beginning at a random one in each process.

Changing in how many partitions a queue lies: only while it is empty, since no order spans the change.

The queue's own number is set to 0 first, which stops programs that come; then each partition is shut where it holds
nothing, which stops those that were there. Then the queue's number is the new one, and the partitions are opened with it.
A partition that still holds something ends it, and all is as it was. Who dies in between leaves the queue shut, and
the same call completes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from copy import copy
from functools import partial
from itertools import count
from random import randrange
from typing import Any, TypeVar
from zlib import crc32

from conveyor import ids
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.messaging.consumer.settling import adrive, drive
from conveyor.store import inspection
from conveyor.store import partitions as partitioning
from conveyor.store.client.batching import PushTarget
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys, known_queues
from conveyor.store.operations import Entry
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Argument, Call

V = TypeVar("V")
MOST = 256
"""Partitions of one queue at most: a worker has an identity, and in a cluster a blocked connection, for each."""
_LOOK = 0.05


def place(key: str, partitions: int) -> int:
    """Return the partition, from 0, that *key* picks of so many."""
    return crc32(key.encode("utf-8", "surrogatepass")) % partitions


def likely_first(names: Sequence[str], id: str) -> list[str]:  # noqa: A002
    """Return known queues and partitions, those first in which a caller's own *id* picks its place."""
    counts: dict[str, int] = {}
    for name in names:
        if (queue := ids.logical(name)) != name:
            counts[queue] = counts.get(queue, 0) + 1
    likely = {ids.partition(queue, place(id, number)) for queue, number in counts.items()}
    return sorted(names, key=lambda name: name not in likely)


def checked(partitions: object) -> int:
    """Return a usable number of partitions; raises ConfigurationError."""
    if not isinstance(partitions, int) or isinstance(partitions, bool) or not 1 <= partitions <= MOST:
        raise ConfigurationError(f"partitions must be a whole number from 1 to {MOST}, not {partitions!r}.")
    return partitions


def agree(client: Client, queue: str, partitions: Partitions | None) -> None:
    """Refuse a queue whose number of partitions on record is not the program's, None when that declares none (E34)."""
    if partitions is not None:
        partitions.agree()
        return
    keys = client.keys(queue)
    number, _ = client.run(partitioning.count(keys))
    if number != 1:
        raise PartitionCountMismatch(keys, str(number))


def share(max_length: int | None, partitions: int) -> int | None:
    """Return the part of a maximum length that falls to each partition; raises ConfigurationError."""
    if max_length is not None and max_length < partitions:
        raise ConfigurationError(
            f"max_length={max_length} is less than partitions={partitions}: it is split, and each partition must take "
            "at least one message. Raise it, or declare fewer partitions."
        )
    return None if max_length is None else max_length // partitions


class Partitions:
    """The partitions of one queue as one program declares them; `keys` are theirs, in order."""

    def __init__(self, client: Client, name: str, number: int, max_length: int | None = None) -> None:
        """Take the queue's name, the number of its partitions, and the maximum length of the whole. Nothing is sent."""
        self.client, self.name, self.count = client, name, checked(number)
        self.most = share(max_length, number)
        self.keys = tuple(
            QueueKeys(client.namespace, ids.partition(name, one), partitions=number) for one in range(number)
        )
        self.whole = client.keys(name)
        self._round = count(randrange(number))  # noqa: S311
        self._numbers = {keys.queue: one for one, keys in enumerate(self.keys)}
        self._claimed = self._known = False

    # -- placing --------------------------------------------------------------------------------------------------

    def turn(self) -> int:
        """Return the partition whose turn it is."""
        return next(self._round) % self.count

    def pick(self, *, group: str | None = None, unique: str | None = None, id: str | None = None) -> int:  # noqa: A002
        """
        Return where a message goes: the group key decides, else the unique key, else the caller's id, else its turn.

        Raises ConfigurationError for a unique key beside a group key that places elsewhere: two of them could live.
        """
        if group is not None:
            at = place(group, self.count)
            if unique is not None and unique != group and place(unique, self.count) != at:
                raise ConfigurationError(
                    f"unique={unique!r} beside group={group!r} on queue '{self.name}': the group picks partition {at}, "
                    f"the unique key partition {place(unique, self.count)}, and a key is unique within its partition "
                    "only. Use one key for both, or leave one out. Nothing was stored."
                )
            return at
        key = id if unique is None else unique
        return self.turn() if key is None else place(key, self.count)

    def placed(self, entry: Entry) -> str:
        """Return the name of the partition that a job goes to."""
        return self.keys[self.pick(unique=entry.unique, id=entry.id if entry.own_id else None)].queue

    def unasked(self) -> Partitions:
        """Return the same for pushes that do not go to Redis now: who delivers them agrees on the number."""
        other = copy(self)
        other._known = True  # noqa: SLF001
        return other

    # -- agreeing on their number ---------------------------------------------------------------------------------

    def agree(self) -> None:
        """See once that Redis has our number, or let it have it; raises ConfigurationError (E34)."""
        if not self._claimed:
            self.claim()
            self._claimed = True

    async def aagree(self) -> None:
        """Do the same on this event loop."""
        if not self._claimed:
            await self.aclaim()
            self._claimed = True

    def claim(self, patience: float | None = None) -> None:
        """Agree with Redis on the number; a change under way is waited for, for *patience* seconds."""
        deadline = time.monotonic() + (self.client.patience if patience is None else patience)
        while True:
            try:
                return drive(self._claiming(), partial(self.client.run, patience=self._patience))
            except PartitionCountMismatch as error:
                if error.found != 0 or time.monotonic() >= deadline:
                    raise
                time.sleep(_LOOK)

    async def aclaim(self, patience: float | None = None) -> None:
        """Do the same on this event loop."""
        deadline = time.monotonic() + (self.client.patience if patience is None else patience)
        while True:
            try:
                return await adrive(self._claiming(), partial(self.client.arun, patience=self._patience))
            except PartitionCountMismatch as error:
                if error.found != 0 or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_LOOK)

    @property
    def _patience(self) -> float:
        """How long a claim is repeated for: where pushes are kept when Redis is away, it is not waited for."""
        return self.client.patience if self.client.buffer is None else _LOOK

    def _claiming(self) -> Generator[Call[Any], Any, None]:
        whole, *parts = partitioning.claims(self.client.namespace, self.name, self.count)
        first = yield whole
        if first or self._claimed:
            for part in parts:  # noqa: UP028  replies are sent in
                yield part

    def keep(self, work: Callable[[], V]) -> V:
        """Push by *work*, again after agreeing anew when a partition knew another number: Redis was emptied, or it changed."""
        if not self._known:
            try:
                self.agree()
                self.client.announce(*self.keys)
                self._known = True
            except StoreUnavailable:
                if self.client.buffer is None:  # else the push is kept, and agrees when it is delivered
                    raise
        try:
            return work()
        except PartitionCountMismatch:
            self.claim()
            return work()

    async def akeep(self, work: Callable[[], Awaitable[V]]) -> V:
        """Do the same on this event loop."""
        if not self._known:
            try:
                await self.aagree()
                await self.client.aannounce(*self.keys)
                self._known = True
            except StoreUnavailable:
                if self.client.buffer is None:
                    raise
        try:
            return await work()
        except PartitionCountMismatch:
            await self.aclaim()
            return await work()

    # -- pushing jobs ---------------------------------------------------------------------------------------------

    def send(self, partition: str, entries: Sequence[Entry], way: PushTarget | None = None) -> list[str]:
        """Push jobs that were placed in *partition*, by the *way* in that was asked for; return an id for each."""
        way = way or self.client
        keys, most = self.keys[self._numbers[partition]], self.most or 0
        if all(entry.is_plain for entry in entries):
            pairs: list[Argument] = [part for entry in entries for part in (entry.id, entry.rest)]
            self.keep(lambda: way.push_plain(keys, pairs, max_length=most))
            return [entry.id for entry in entries]
        return self.keep(lambda: way.push(keys, entries, max_length=most))

    async def asend(self, partition: str, entries: Sequence[Entry], way: PushTarget | None = None) -> list[str]:
        """Do the same on this event loop."""
        way = way or self.client
        keys, most = self.keys[self._numbers[partition]], self.most or 0
        return await self.akeep(lambda: way.apush(keys, entries, max_length=most))


Steps = Generator[Call[Any], Any, int]


def number_of(client: Client, queue: str) -> int:
    """Return in how many partitions *queue* lies (1 when it lies in one piece), as recorded in Redis."""
    number, change = client.run(partitioning.count(client.keys(queue)))
    return number or int((change or "1").split()[0])


def partition_names(queue: str, number: int) -> list[str]:
    """Return the names of the places of a queue that lies in *number* partitions."""
    return [queue] if number == 1 else [ids.partition(queue, one) for one in range(number)]


def repartition(client: Client, queue: str, number: int) -> int:
    """
    Lay *queue* in *number* partitions, and return in how many it lay before.

    Raises ConfigurationError (E35), and changes nothing, when a partition is not empty: leased and dead ones count.
    Programs that still declare the old number are refused from then on (E34), running workers and consumers too.
    """
    before = drive(_change(client, ids.queue_name(queue), checked(number)), client.run)
    known = known_queues(client.namespace)
    for command in _renamed(queue, before, number):
        client.execute(command[0], known, *command[1:], key=known)
    return before


async def arepartition(client: Client, queue: str, number: int) -> int:
    """Do the same on this event loop."""
    before = await adrive(_change(client, ids.queue_name(queue), checked(number)), client.arun)
    known = known_queues(client.namespace)
    for command in _renamed(queue, before, number):
        await client.aexecute(command[0], known, *command[1:], key=known)
    return before


def _renamed(queue: str, before: int, number: int) -> Generator[tuple[str, ...]]:
    """Yield how the set of known queues changes."""
    now, old = partition_names(queue, number), partition_names(queue, before)
    yield "SADD", *now
    if gone := [name for name in old if name not in now]:
        yield "SREM", *gone


def _change(client: Client, queue: str, number: int) -> Steps:
    whole, token = client.keys(queue), ids.new_identity()
    there = yield partitioning.count(whole)
    yield from _refuse_full(client, queue, there[0] or 1)
    if there[0] == number and not there[1]:
        yield from _mend(client, queue, number, token)
        return number
    done, before = yield partitioning.repartition(whole, "begin", token, number)
    if done != 1:
        raise _full(queue, {queue: before})
    most = max(before, number)
    places = [client.keys(ids.partition(queue, one)) for one in range(most)] if most > 1 else []
    full: dict[str, int] = {}
    shut: list[QueueKeys] = []
    for one, keys in enumerate(places):
        done, found = yield partitioning.repartition(keys, "close", token, before if one < before else None)
        if done == 1:
            shut.append(keys)
        elif done == 0:
            full[keys.queue] = found
        else:
            full[keys.queue] = -1
    after = before if full else number
    done, _ = yield partitioning.repartition(whole, "end", token, after)
    for keys in shut:
        yield partitioning.repartition(keys, "open", token, after)
    if full:
        raise _full(queue, full)
    if done != 1:
        raise ConfigurationError(
            f"Somebody else is changing the partitions of queue '{queue}' too. Look, and try again.", code="E35"
        )
    return int(before)


def _refuse_full(client: Client, queue: str, number: int) -> Generator[Call[Any], Any, None]:
    """Raise the error of a queue that obviously cannot change, before it is shut even for a moment."""
    full: dict[str, int] = {}
    for name in partition_names(queue, number):
        found: inspection.QueueCounts = yield inspection.counts(client.keys(name))
        if held := len(found) + found.leased + found.dead:
            full[name] = held
    if full:
        raise _full(queue, full)


def refuse_full(client: Client, queue: str) -> None:
    """Raise ConfigurationError (E35) when the partitions of *queue* hold something; changes nothing."""
    drive(_refuse_full(client, queue, number_of(client, queue)), client.run)


def _mend(client: Client, queue: str, number: int, token: str) -> Generator[Call[Any], Any, None]:
    """Open what a change that was completed but for this has left shut."""
    for one in range(number if number > 1 else 0):
        keys = client.keys(ids.partition(queue, one))
        found = yield partitioning.count(keys)
        if found[0] == 0:
            done, _ = yield partitioning.repartition(keys, "close", token, None)
            if done == 1:
                yield partitioning.repartition(keys, "open", token, number)


def _full(queue: str, full: dict[str, int]) -> ConfigurationError:
    held = ", ".join(
        f"{name} ({count:,})" if count >= 0 else f"{name} (changed meanwhile)" for name, count in full.items()
    )
    return ConfigurationError(
        f"Queue '{queue}' is not empty, so its partitions cannot change: {held}. Nothing was changed. Let workers drain "
        f"it, then redrive or purge its dead letters: conveyor queue purge {queue} --dead",
        code="E35",
    )
