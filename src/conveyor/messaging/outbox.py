"""
The outbox of a queue: entries for other queues, each delivered exactly once.

The turn that settles a job appends what it spawned to the outbox of its queue; in a cluster a publish appends the copies for
all subscribers but the first. Who delivers takes the head of the outbox as a numbered batch, which stays the same until it is
trimmed. The batch is pushed to each receiver in a sequence that never expires, then trimmed by its number. So two that
deliver, or a repeated step, push each entry once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec.structs import replace

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.messaging.partitions import Partitions
from conveyor.payload.records import JobKey
from conveyor.store import operations
from conveyor.store import partitions as partitioning
from conveyor.store.max_length import NO_LIMIT
from conveyor.store.operations import Entry, NewQueueIds, ProducerSequence, StalePush
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Call, Script, StepProgram
from conveyor.store.transport import replies

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys

TAKE, TRIM = Script("outbox_take"), Script("outbox_trim")
RETRY_FOR = 5.0
"""Seconds for which a step of a delivery is repeated."""
MOST_TAKEN = 100
"""Entries of one batch, at most, as outbox_take.lua takes them."""


class _OutboxHead(msgspec.Struct, array_like=True):
    queue: str
    id: str
    priority: int
    delay_ms: int | None
    due_at_ms: int | None
    expires_ms: int | None
    unique: str | None
    own_id: bool
    front: bool
    group: str | None = None
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    accepted: bool = False
    """True for what no maximum length refuses any more: its publish was accepted."""
    keys: tuple[str, ...] = ()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_OutboxHead).decode


def write(queue: str, entry: Entry, *, accepted: bool = False) -> bytes:
    """
    Return *entry* for *queue* as an outbox stores it: a line of JSON, then the envelope without marks.

    *accepted*: no maximum length of the queue refuses it.
    """
    head = _OutboxHead(
        queue, entry.id, entry.priority, entry.delay_ms, entry.due_at_ms, entry.expires_ms, entry.unique, entry.own_id,
        entry.front, entry.group, entry.limits, entry.tags, accepted, tuple(key.write() for key in entry.keys),
    )  # fmt: skip
    return _encode(head) + b"\n" + entry.rest


def read(data: bytes) -> tuple[str, Entry]:
    """Return the queue and the entry that `write` was given."""
    queue, entry, _ = _read(data)
    return queue, entry


def _read(data: bytes) -> tuple[str, Entry, bool]:
    line, _, rest = data.partition(b"\n")
    head = _decode(line)
    entry = Entry(
        head.id, rest, head.priority, head.delay_ms, head.due_at_ms, head.expires_ms, head.unique, head.own_id, head.front,
        head.group, head.limits, head.tags, keys=tuple(map(JobKey.read, head.keys)),
    )  # fmt: skip
    return head.queue, entry, head.accepted


class OutboxBatch:
    """
    The numbered head of an outbox, by receiving queue; the entries for one queue keep their order.

    `accepted`: the queues whose maximum length refuses none of them.
    """

    __slots__ = ("accepted", "number", "parts")

    def __init__(self, number: int, entries: Sequence[bytes]) -> None:
        """Read the entries; raises ConfigurationError (E45) for an entry of another version."""
        self.number = number
        self.parts: dict[str, list[Entry]] = {}
        self.accepted: set[str] = set()
        for data in entries:
            try:
                queue, entry, accepted = _read(data)
            except msgspec.DecodeError as error:
                raise ConfigurationError(
                    f"The outbox of a queue holds an entry that this version cannot read ({error}). Upgrade this worker.",
                    code="E45",
                ) from error
            self.parts.setdefault(queue, []).append(entry)
            if accepted:
                self.accepted.add(queue)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(part)} for {queue}" for queue, part in self.parts.items())
        return f"<Batch {self.number}: {counts}>"


def take(keys: QueueKeys, *, replacing: int | str = "", least: int = 0) -> Call[OutboxBatch | None]:
    """
    Return the call that fixes the next batch of the outbox; it yields None when the outbox is empty.

    When the fixed batch has the number *replacing*, it gets a new number of at least *least*.
    """
    return Call(TAKE, (keys.outbox, keys.conf), (str(replacing), str(least)), _read_batch)


def _read_batch(reply: list[Any]) -> OutboxBatch | None:
    return OutboxBatch(reply[0], reply[1:]) if reply else None


def push_part(
    source: QueueKeys, target: QueueKeys, number: int, entries: Sequence[Entry], *, written_for: str | None = None,
    max_length: int = 0,
) -> Call[list[str]]:  # fmt: skip
    """
    Return the call that pushes a part of a batch to *target*, once; raises what a push raises, and StalePush.

    A part that was written for another queue or partition, *written_for*, has a sequence of its own, because *target*
    may have a part of its own.
    """
    sequence = source.queue if written_for is None else f"{source.queue}>{written_for}"
    call = operations.push(
        target, ProducerSequence(sequence, number - 1, resends_refused=True), entries, max_length=max_length
    )
    return replace(call, keys=(target.inbox(sequence), *call.keys[1:]))


def trim(keys: QueueKeys, number: int) -> Call[int]:
    """Return the call that drops a delivered batch; it yields how many entries are left, -1 for a wrong number."""
    return Call(TRIM, (keys.outbox, keys.conf), (str(number),), int)


# -- delivering -----------------------------------------------------------------------------------------------------------


class OutboxRoutes(Protocol):
    """Where the entries for each queue go, as an app knows it."""

    @property
    def client(self) -> Client: ...
    @property
    def partitioned(self) -> Mapping[str, Partitions]: ...
    @property
    def plain_lists(self) -> Mapping[str, Any]: ...
    def keys(self, queue: str) -> QueueKeys: ...


class _StaleDelivery(Exception):
    """A receiver has seen a higher number; *inbox* is the key that holds it."""

    def __init__(self, inbox: str) -> None:
        super().__init__(inbox)
        self.inbox = inbox


class _Part(msgspec.Struct):
    """The part of a batch for one queue or partition; `partitions` are those that its queue has now, None for one piece."""

    source: QueueKeys
    number: int
    queue: str
    entries: list[Entry]
    max_length: int
    partitions: Partitions | None

    def push(self, target: QueueKeys, entries: Sequence[Entry], *, moved: bool) -> Call[list[str]]:
        """Return the call that pushes *entries* of it to *target*, which is not what it was written for when *moved*."""
        return push_part(
            self.source,
            target,
            self.number,
            entries,
            written_for=self.queue if moved else None,
            max_length=self.max_length,
        )


def deliver(directory: OutboxRoutes, keys: QueueKeys, *, retry_for: float = RETRY_FOR) -> StepProgram:
    """
    Deliver one batch of an outbox; return whether there was one. Raises what the pushes raise; then the batch stays.

    *retry_for*: seconds for which each step is repeated.
    """
    client, run = directory.client, partial(_run, directory.client, retry_for)
    batch: OutboxBatch | None = yield run(take(keys))
    if batch is None:
        return False
    failed: ConveyorError | None = None
    for queue, entries in batch.parts.items():
        limit = NO_LIMIT if queue in batch.accepted else 0
        part = _Part(keys, batch.number, queue, entries, limit, directory.partitioned.get(ids.logical(queue)))
        try:
            yield from _deliver_part(directory, part, retry_for)
        except _StaleDelivery as stale:
            # Others have delivered and trimmed this batch, and a newer one. Or a failover took the source back to a
            # number that this receiver has seen: then the same batch gets a higher one.
            get = partial(client.execute, "GET", stale.inbox, key=stale.inbox)
            last_seen = yield get, partial(client.aexecute, "GET", stale.inbox, key=stale.inbox)
            if isinstance(last_seen, bytes):
                least = int(last_seen.partition(b"\n")[0]) + 1
                yield run(take(keys, replacing=batch.number, least=least))
            return True
        except ConveyorError as error:
            failed = error  # the others need not wait for it; the repeat finds theirs done
    if failed is not None:
        raise failed
    yield run(trim(keys, batch.number))
    return True


def _run(client: Client, retry_for: float, call: Call[Any]) -> Any:
    return partial(client.run, call, retry_for=retry_for), partial(client.arun, call, retry_for=retry_for)


def _deliver_part(directory: OutboxRoutes, part: _Part, retry_for: float) -> StepProgram:
    """Push a part of a batch. Where this program does not declare the queue, Redis tells its number of partitions."""
    client, logical = directory.client, ids.logical(part.queue)
    if retry_for < RETRY_FOR and client.is_away(client.keys(part.queue)):
        raise replies.unavailable(str(client.endpoint(client.keys(part.queue))), "it did not answer a moment ago")
    try:
        yield from _push_calls(directory, part, retry_for)
    except PartitionCountMismatch:
        if logical in directory.partitioned or part.queue in directory.plain_lists:
            raise
        number, _ = yield _run(client, retry_for, partitioning.count(client.keys(logical)))
        if number <= 1:
            raise
        part.partitions = Partitions(client, logical, number)
        yield from _push_calls(directory, part, retry_for)


def _push_calls(directory: OutboxRoutes, part: _Part, retry_for: float) -> StepProgram:
    for call in (yield from _calls(directory, part, retry_for)):
        client, partitions = directory.client, part.partitions
        step = _run(client, retry_for, call)
        if partitions is not None:
            step = partial(partitions.run_agreed, step[0]), partial(partitions.arun_agreed, step[1])
        try:
            stored = yield step
        except StalePush:
            raise _StaleDelivery(call.keys[0]) from None
        if isinstance(stored, NewQueueIds):
            new = directory.keys(part.queue if part.queue in directory.plain_lists else ids.logical(part.queue))
            yield partial(client.announce_again, new), partial(client.aannounce_again, new)


def _calls(directory: OutboxRoutes, part: _Part, retry_for: float) -> Generator[Any, Any, list[Call[list[str]]]]:
    """Return the pushes of a part: one, unless it was written for a partition that does not exist (any more, or yet)."""
    client, queue, partitions = directory.client, part.queue, part.partitions
    if partitions is None:
        target = directory.keys(queue if queue in directory.plain_lists else ids.logical(queue))
        yield partial(client.announce, target), partial(client.aannounce, target)
        if target.queue == queue:
            return [part.push(target, part.entries, moved=False)]
        targets = {}
    else:
        targets = {keys.queue: keys for keys in partitions.keys}
    if queue in targets:
        return [part.push(targets[queue], part.entries, moved=False)]
    # A partition that is not used any more may have accepted its part, before the batch was trimmed.
    inbox = directory.keys(queue).inbox(part.source.queue)
    get = partial(client.execute, "GET", inbox, key=inbox, retry_for=retry_for)
    seen = yield get, partial(client.aexecute, "GET", inbox, key=inbox, retry_for=retry_for)
    if isinstance(seen, bytes) and seen.startswith(f"{part.number}\nok".encode()):
        return []
    if partitions is None:
        return [part.push(target, part.entries, moved=True)]
    by_queue: dict[str, list[Entry]] = {}
    for entry in part.entries:
        # By its id where it has no key: a repeat must find the same partition.
        at = partitions.pick(group=entry.group, unique=entry.placing_key, id=entry.id)
        by_queue.setdefault(partitions.keys[at].queue, []).append(entry)
    return [part.push(targets[name], one, moved=True) for name, one in by_queue.items()]
