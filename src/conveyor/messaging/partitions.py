"""
Queues in several partitions: the partition of a message, and the number of partitions that all programs agree on.

A key picks its partition by CRC-32, which every process and version computes alike. Messages without a key go to the
partitions in turn; each process begins at a random one.

The number of partitions changes only while the queue is empty, since no order spans the change. The steps are:

1. The queue's own number is set to 0, which stops programs that come.
2. Each partition is closed if it holds nothing, which stops programs that were there.
3. The queue's number is set to the new one, and the partitions are opened with it.

A partition that still holds something ends the change, and everything is as it was. A process that dies in between
leaves the queue closed; the same call completes the change.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from copy import copy
from functools import partial
from itertools import count
from random import randrange
from typing import TypeVar

from conveyor import ids
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.store import inspection, limits, operations
from conveyor.store import partitions as partitioning
from conveyor.store.client.batching import PushTarget
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys, known_queues
from conveyor.store.max_length import UNBOUNDED, MaxLength
from conveyor.store.operations import Entry
from conveyor.store.partitions import PartitionCountMismatch, partition_of
from conveyor.store.script import Argument, Call, CallProgram, adrive, drive

V = TypeVar("V")
MAX_PARTITIONS = 256
"""Most partitions of a queue: each costs a worker an identity, in a cluster also a connection."""
RETRY_PAUSE = 0.05


def likely_first(names: Sequence[str], id: str) -> list[str]:  # noqa: A002
    """Sort queues and partitions: first those that a job with the caller's own *id* lies in."""
    counts: dict[str, int] = {}
    for name in names:
        if (queue := ids.logical(name)) != name:
            counts[queue] = counts.get(queue, 0) + 1
    likely = {ids.partition(queue, partition_of(id, number)) for queue, number in counts.items()}
    return sorted(names, key=lambda name: name not in likely)


def checked_count(partitions: object) -> int:
    """Check a number of partitions and return it. Raises ConfigurationError."""
    if not isinstance(partitions, int) or isinstance(partitions, bool) or not 1 <= partitions <= MAX_PARTITIONS:
        raise ConfigurationError(f"partitions must be a whole number from 1 to {MAX_PARTITIONS}, not {partitions!r}.")
    return partitions


def agree(client: Client, queue: str, partitions: Partitions | None) -> None:
    """Raise E34 when Redis records another number of partitions than the program declares (None: one)."""
    if partitions is not None:
        partitions.agree()
        return
    keys = client.keys(queue)
    number, _ = client.run(partitioning.count(keys))
    if number != 1:
        raise PartitionCountMismatch(keys, str(number))


def _max_length_share(max_length: MaxLength | None, partitions: int) -> MaxLength | None:
    """Return the maximum length of each partition (None: no limit). Raises ConfigurationError."""
    if max_length is not None and max_length < partitions:
        raise ConfigurationError(
            f"max_length={max_length} is less than partitions={partitions}: it is split, and each partition must take "
            "at least one message. Raise it, or declare fewer partitions."
        )
    return None if max_length is None else max_length.part(partitions)


class Partitions:
    """
    The partitions of one queue as one program declares them.

    `keys` are those of the partitions in their order, `queue_keys` those of the queue itself. `max_length` is the limit
    of each partition (None: no limit), an equal share of the queue's.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        number: int,
        max_length: MaxLength | None = None,
        events_kept: int | None = None,
    ) -> None:
        self.client, self.name, self.count = client, name, checked_count(number)
        self.max_length = _max_length_share(max_length, number)
        self.keys = tuple(
            QueueKeys(client.namespace, ids.partition(name, one), partitions=number, events_kept=events_kept)
            for one in range(number)
        )
        self.queue_keys = client.keys(name)
        self._turns = count(randrange(number))  # noqa: S311
        self._number_of = {keys.queue: one for one, keys in enumerate(self.keys)}
        self._has_agreed = self._is_announced = self._is_refused = False

    # -- placing --------------------------------------------------------------------------------------------------

    def next_in_turn(self) -> int:
        """Return the number of the partition whose turn it is; one whose server is away is passed over if another is not."""
        for _ in range(self.count):
            at = next(self._turns) % self.count
            if not self.client.is_away(self.keys[at]):
                break
        return at

    def live(self, numbers: Sequence[int]) -> list[int]:
        """Return those of *numbers* whose servers are not away; all when all are."""
        return [at for at in numbers if not self.client.is_away(self.keys[at])] or list(numbers)

    def pick(self, *, group: str | None = None, unique: str | None = None, id: str | None = None) -> int:  # noqa: A002
        """
        Return the partition of a message: by its group key, else its unique key, else its own id, else in turn.

        Raises ConfigurationError for a group key and a unique key that pick different partitions: the same unique key
        could then live twice.
        """
        if group is not None:
            at = partition_of(group, self.count)
            if unique is not None and unique != group and partition_of(unique, self.count) != at:
                raise ConfigurationError(
                    f"unique={unique!r} beside group={group!r} on queue '{self.name}': the group picks partition {at}, "
                    f"the unique key partition {partition_of(unique, self.count)}, and a key is unique within its partition "
                    "only. Use one key for both, or leave one out. Nothing was stored."
                )
            return at
        key = id if unique is None else unique
        return self.next_in_turn() if key is None else partition_of(key, self.count)

    def place(self, *, group: str | None = None, unique: str | None = None, id: str | None = None) -> int:  # noqa: A002
        """
        Return the partition of a new message, as `pick` does.

        Raises ConfigurationError for an own id beside a unique key too: under another key the same id would lie in
        another partition, and make another job.
        """
        if id is not None and unique is not None and unique != id:
            raise ConfigurationError(
                f"id={id!r} beside unique={unique!r} on queue '{self.name}': its partitions keep the key and the id each "
                "for themselves, and only one of them can pick the partition. Use one text for both, or leave one out. "
                "Nothing was stored."
            )
        return self.pick(group=group, unique=unique, id=id)

    def partition_of(self, entry: Entry, turns: dict[str, int] | None = None) -> str:
        """
        Return the name of the partition that a job is pushed to.

        *turns*: those of a bulk push, by queue. All of its jobs that nothing else places go to one partition, in one call;
        the next bulk push goes to the next. A limit of length is split, so there each job has its turn.
        Raises ConfigurationError as `place`.
        """
        id_ = entry.id if entry.own_id else None
        if len(entry.keys) > 1:
            raise ConfigurationError(
                f"A job for queue '{self.name}' has several keys ({', '.join(key.text for key in entry.keys)}), and only one of "
                "them can pick the partition, within which each is unique. Declare one of Unique, Debounce and Throttle, or "
                "use a queue without partitions. Nothing was enqueued."
            )
        placed = entry.group is not None or entry.placing_key is not None or id_ is not None
        if turns is None or self.max_length is not None or placed:
            return self.keys[self.place(group=entry.group, unique=entry.placing_key, id=id_)].queue
        return self._filled(turns)

    def filled_in_turn(self, turns: dict[str, int]) -> str | None:
        """Return the partition that the plain jobs of a bulk push fill, as in `partition_of`; None: each has its turn."""
        return None if self.max_length is not None else self._filled(turns)

    def _filled(self, turns: dict[str, int]) -> str:
        if self.name not in turns:
            turns[self.name] = self.next_in_turn()
        return self.keys[turns[self.name]].queue

    def without_agreement(self) -> Partitions:
        """Return a copy for pushes that are delivered later: the delivery agrees on the number."""
        other = copy(self)
        other._is_announced = True  # noqa: SLF001
        return other

    # -- agreeing on their number ---------------------------------------------------------------------------------

    def agree(self) -> None:
        """
        Agree with Redis on the number of partitions, once. Raises ConfigurationError (E34).

        While the server that records it is away, that is left to the partitions: each has a copy, and refuses another.
        """
        if not self._has_agreed and not self.client.is_away(self.queue_keys):
            try:
                self.claim()
            except StoreUnavailable:
                if not self.client.note_away(self.queue_keys):
                    raise
            else:
                self._has_agreed = True

    def compare(self) -> None:
        """Compare the number with the one in Redis, once, as `agree` does, and record none: for a queue that may not exist."""
        if not self._has_agreed and not self.client.is_away(self.queue_keys):
            try:
                self._has_agreed = self.client.run(self._compare_call(), retry_for=self._retry_for)
            except PartitionCountMismatch as error:
                if error.recorded != 0:
                    raise
                self.agree()  # waits for the end of the change
            except StoreUnavailable:
                if not self.client.note_away(self.queue_keys):
                    raise

    async def acompare(self) -> None:
        """Awaitable form of `compare`."""
        if not self._has_agreed and not self.client.is_away(self.queue_keys):
            try:
                self._has_agreed = await self.client.arun(self._compare_call(), retry_for=self._retry_for)
            except PartitionCountMismatch as error:
                if error.recorded != 0:
                    raise
                await self.aagree()  # waits for the end of the change
            except StoreUnavailable:
                if not self.client.note_away(self.queue_keys):
                    raise

    def _compare_call(self) -> Call[bool]:
        return partitioning.compare_partitions(self.queue_keys, self.count)

    async def aagree(self) -> None:
        """Awaitable form of `agree`."""
        if not self._has_agreed and not self.client.is_away(self.queue_keys):
            try:
                await self.aclaim()
            except StoreUnavailable:
                if not self.client.note_away(self.queue_keys):
                    raise
            else:
                self._has_agreed = True

    def claim(self) -> None:
        """Agree with Redis on the number; wait for a change of it as long as the client retries."""
        deadline = time.monotonic() + self.client.retry_for
        while True:
            try:
                return drive(self._claim_calls(), partial(self.client.run, retry_for=self._retry_for))
            except PartitionCountMismatch as error:
                if error.recorded != 0 or time.monotonic() >= deadline:
                    raise
                time.sleep(RETRY_PAUSE)

    async def aclaim(self) -> None:
        """Awaitable form of `claim`."""
        deadline = time.monotonic() + self.client.retry_for
        while True:
            try:
                return await adrive(self._claim_calls(), partial(self.client.arun, retry_for=self._retry_for))
            except PartitionCountMismatch as error:
                if error.recorded != 0 or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(RETRY_PAUSE)

    def reclaim(self) -> None:
        """Agree anew after a partition has refused the number: Redis was emptied, or the number was changed."""
        self._is_refused = True
        self.claim()
        self.client.announce_again(*self.keys)

    async def areclaim(self) -> None:
        """Awaitable form of `reclaim`."""
        self._is_refused = True
        await self.aclaim()
        await self.client.aannounce_again(*self.keys)

    @property
    def _retry_for(self) -> float:
        """The seconds a claim is repeated for: short with a buffer, which keeps the pushes, and beside other servers."""
        if not self.client.has_one_endpoint:
            return min(self.client.retry_for, 1.0)
        return self.client.retry_for if self.client.buffer is None else RETRY_PAUSE

    def _claim_calls(self) -> CallProgram[None]:
        whole, *parts = partitioning.claims(self.client.namespace, self.name, self.count)
        first = yield whole
        if not (first or self._has_agreed or self._is_refused):
            return
        self._is_refused = False
        for keys, part in zip(self.keys, parts, strict=True):
            if self.client.is_away(keys):
                continue  # it has its number, or refuses its first push for it
            try:
                yield part
            except StoreUnavailable:
                if not self.client.note_away(keys):
                    raise

    def retry_agreed(self, work: Callable[[], V]) -> V:
        """Run *work*; agree anew and run it again when a partition has another number, or none because the queue was deleted."""
        deadline, refused = time.monotonic() + self.client.retry_for, False
        while True:
            try:
                return work()
            except PartitionCountMismatch as error:
                if refused and (error.recorded or time.monotonic() >= deadline):
                    raise
                self.reclaim()
                refused = True

    async def aretry_agreed(self, work: Callable[[], Awaitable[V]]) -> V:
        """Awaitable form of `retry_agreed`."""
        deadline, refused = time.monotonic() + self.client.retry_for, False
        while True:
            try:
                return await work()
            except PartitionCountMismatch as error:
                if refused and (error.recorded or time.monotonic() >= deadline):
                    raise
                await self.areclaim()
                refused = True

    def run_agreed(self, work: Callable[[], V], keys: QueueKeys | None = None) -> V:
        """
        Run a push after agreeing on the number; once more when a partition has another number.

        When the server of *keys*, the partition that is pushed to, does not answer, the next pushes in turn pass it over.
        """
        if not self._is_announced:
            try:
                self.agree()
                self.client.announce(*self.keys)
                self._is_announced = self._has_agreed
            except StoreUnavailable:
                if self.client.buffer is None:  # else the push is kept, and agrees when it is delivered
                    raise
        try:
            return self.retry_agreed(work)
        except StoreUnavailable:
            if keys is not None:
                self.client.note_away(keys)
            raise

    async def arun_agreed(self, work: Callable[[], Awaitable[V]], keys: QueueKeys | None = None) -> V:
        """Awaitable form of `run_agreed`."""
        if not self._is_announced:
            try:
                await self.aagree()
                await self.client.aannounce(*self.keys)
                self._is_announced = self._has_agreed
            except StoreUnavailable:
                if self.client.buffer is None:
                    raise
        try:
            return await self.aretry_agreed(work)
        except StoreUnavailable:
            if keys is not None:
                self.client.note_away(keys)
            raise

    # -- pushing jobs ---------------------------------------------------------------------------------------------

    def send(self, partition: str, entries: Sequence[Entry], target: PushTarget | None = None) -> list[str]:
        """Push jobs to *partition* through *target* (None: the client) and return their ids."""
        target = target or self.client
        keys, most = self.keys[self._number_of[partition]], self.max_length or UNBOUNDED
        if most.full == "raise" and all(entry.is_plain for entry in entries):
            pairs: list[Argument] = [part for entry in entries for part in (entry.id, entry.rest)]
            self.run_agreed(lambda: target.push_plain(keys, pairs, max_length=most), keys)
            return [entry.id for entry in entries]
        return self.run_agreed(lambda: self.client.push_with_room(target, keys, entries, most), keys)

    def start_send(self, partition: str, pairs: Sequence[Argument]) -> Callable[[], None]:
        """Send plain jobs to *partition*, which has no maximum length; return what completes it, and agrees anew where it must."""
        keys, client = self.keys[self._number_of[partition]], self.client
        begun = [client.start_push_plain(keys, pairs)] if self._is_announced and client.buffer is None else []
        return lambda: self.run_agreed(lambda: begun.pop()() if begun else client.push_plain(keys, pairs), keys)

    async def asend(self, partition: str, entries: Sequence[Entry], target: PushTarget | None = None) -> list[str]:
        """Awaitable form of `send`."""
        target = target or self.client
        keys, most = self.keys[self._number_of[partition]], self.max_length or UNBOUNDED
        return await self.arun_agreed(lambda: self.client.apush_with_room(target, keys, entries, most), keys)


def partition_count(client: Client, queue: str) -> int:
    """Return the number of partitions of *queue* as recorded in Redis; 1 for a queue in one piece."""
    number, change = client.run(partitioning.count(client.keys(queue)))
    return number or int((change or "1").split()[0])


def partition_names(queue: str, number: int) -> list[str]:
    """Return the names of a queue's partitions; the queue's own name when *number* is 1."""
    return [queue] if number == 1 else [ids.partition(queue, one) for one in range(number)]


def repartition(client: Client, queue: str, number: int) -> int:
    """
    Change the number of partitions of *queue*, and return the number it had before.

    Raises ConfigurationError (E35), and changes nothing, when a partition holds a message; leased and dead ones count,
    and spawned jobs that its outbox has not delivered.
    Programs that still declare the old number are refused from then on (E34), running workers and consumers too.
    """
    before = drive(_repartition(client, ids.queue_name(queue), checked_count(number)), client.run)
    known = known_queues(client.namespace)
    for command in _known_queue_changes(queue, before, number):
        client.execute(command[0], known, *command[1:], key=known)
    return before


async def arepartition(client: Client, queue: str, number: int) -> int:
    """Awaitable form of `repartition`."""
    before = await adrive(_repartition(client, ids.queue_name(queue), checked_count(number)), client.arun)
    known = known_queues(client.namespace)
    for command in _known_queue_changes(queue, before, number):
        await client.aexecute(command[0], known, *command[1:], key=known)
    return before


def _known_queue_changes(queue: str, before: int, number: int) -> Generator[tuple[str, ...]]:
    """Yield the commands that change the set of known queues."""
    now, old = partition_names(queue, number), partition_names(queue, before)
    yield "SADD", *now
    if gone := [name for name in old if name not in now]:
        yield "SREM", *gone


def _repartition(client: Client, queue: str, number: int) -> CallProgram[int]:
    queue_keys, token = client.keys(queue), ids.new_identity()
    recorded = yield partitioning.count(queue_keys)
    yield from _refuse_full(client, queue, recorded[0] or 1)
    if recorded[0] == number and not recorded[1]:
        yield from _open_all(client, queue, number, token)
        return number
    done, before = yield partitioning.repartition(queue_keys, "begin", token, number)
    if done != 1:
        raise _not_empty(queue, {queue: before})
    most = max(before, number)
    partitions = [client.keys(ids.partition(queue, one)) for one in range(most)] if most > 1 else []
    full: dict[str, int] = {}
    closed: list[QueueKeys] = []
    for one, keys in enumerate(partitions):
        done, held = yield partitioning.repartition(keys, "close", token, before if one < before else None)
        if done == 1:
            closed.append(keys)
        elif done == 0:
            full[keys.queue] = held
        else:
            full[keys.queue] = -1
    after = before if full else number
    if not full:
        yield from _carry_settings(_places(client, queue, before), _places(client, queue, after))
    done, _ = yield partitioning.repartition(queue_keys, "end", token, after)
    for keys in closed:
        yield partitioning.repartition(keys, "open", token, after)
    if full:
        raise _not_empty(queue, full)
    if done != 1:
        raise ConfigurationError(
            f"Another program is changing the partitions of queue '{queue}' at the same time. Try again.", code="E35"
        )
    return int(before)


def _places(client: Client, queue: str, number: int) -> list[QueueKeys]:
    return [client.keys(name) for name in partition_names(queue, number)]


def _carry_settings(old: Sequence[QueueKeys], new: Sequence[QueueKeys]) -> CallProgram[None]:
    """Give the *new* places of a queue what operators have set at the *old* ones: pauses, groups, and limits, split anew."""
    records: list[limits.LimitRecord] = yield limits.list_limits(old[0])
    groups: list[limits.GroupRecord] = yield limits.list_groups(old[0])
    counts: inspection.QueueCounts = yield inspection.counts(old[0])
    facts: inspection.QueueFacts = yield inspection.queue_causes(old[0], 1)
    set_groups = {one.group: one for one in groups}
    for keys in new:
        yield limits.reset_limit(keys, None, None)
        for record in records:
            if record.override:
                yield limits.set_limit(keys, record.name, record.key or None, _split_anew(record, len(old), len(new)))
        stale: list[limits.GroupRecord] = yield limits.list_groups(keys)
        for name in {one.group for one in stale} | set_groups.keys():
            one = set_groups.get(name)
            yield limits.set_group(keys, name, weight=one.weight if one else 1, paused=one.paused if one else False)
        for task, _ in facts.paused_tasks:
            yield limits.pause_task(keys, task, paused=True)
        if counts.paused:
            yield operations.configure(keys, "paused", "1")


def _split_anew(record: limits.LimitRecord, before: int, after: int) -> str:
    """Return an operator's limit for each of *after* partitions, where each of *before* had its part of it."""
    kind, number, *words = record.override.split(" ")
    key = record.declared.rpartition(" ")[2]
    is_whole = key.startswith("+") or key == "group"  # its key picks the partition
    part = int(number) if is_whole else max(1, int(number) * before // after)
    return " ".join((kind, str(part), *words))


def _refuse_full(client: Client, queue: str, number: int) -> CallProgram[None]:
    """Raise E35 for a queue that is not empty, before any partition is closed."""
    full: dict[str, int] = {}
    undelivered = 0
    for name in partition_names(queue, number):
        counts: inspection.QueueCounts = yield inspection.counts(client.keys(name))
        undelivered += counts.outbox
        if held := len(counts) + counts.leased + counts.dead + counts.outbox:
            full[name] = held
    if full:
        raise _not_empty(queue, full, undelivered)


def refuse_full(client: Client, queue: str) -> None:
    """Raise ConfigurationError (E35) when a partition of *queue* is not empty. Changes nothing."""
    drive(_refuse_full(client, queue, partition_count(client, queue)), client.run)


def _open_all(client: Client, queue: str, number: int, token: str) -> CallProgram[None]:
    """Open partitions that an interrupted change has left closed."""
    for one in range(number if number > 1 else 0):
        keys = client.keys(ids.partition(queue, one))
        recorded = yield partitioning.count(keys)
        if recorded[0] == 0:
            done, _ = yield partitioning.repartition(keys, "close", token, None)
            if done == 1:
                yield partitioning.repartition(keys, "open", token, number)


def _not_empty(queue: str, full: dict[str, int], undelivered: int = 0) -> ConfigurationError:
    held = ", ".join(
        f"{name} ({count:,})" if count >= 0 else f"{name} (changed meanwhile)" for name, count in full.items()
    )
    spawned = f" {undelivered:,} of these are spawned jobs in an outbox, which a worker of the queue delivers."
    return ConfigurationError(
        f"Queue '{queue}' is not empty, so its partitions cannot change: {held}.{spawned if undelivered else ''} "
        "Nothing was changed. Let workers drain "
        f"it, then redrive or purge its dead letters: conveyor queue purge {queue} --dead",
        code="E35",
    )
