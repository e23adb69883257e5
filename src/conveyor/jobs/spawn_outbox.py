"""
The outbox of a queue: entries for other queues that were spawned by its jobs, each delivered exactly once.

The turn that settles a job appends its entries to the outbox of its queue. A worker that delivers takes the head of the
outbox as a numbered batch, which stays the same until it is trimmed. It pushes the batch to each receiver in a sequence
that never expires, then trims it by its number. So two workers that deliver, or a repeated step, push each entry once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.store import operations
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.script import Call, Script

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys

TAKE, TRIM = Script("outbox_take"), Script("outbox_trim")


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


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_OutboxHead).decode


def write(queue: str, entry: Entry) -> bytes:
    """Return *entry* for *queue* as an outbox stores it: a line of JSON, then the envelope without marks."""
    head = _OutboxHead(
        queue, entry.id, entry.priority, entry.delay_ms, entry.due_at_ms, entry.expires_ms, entry.unique, entry.own_id,
        entry.front, entry.group, entry.limits, entry.tags,
    )  # fmt: skip
    return _encode(head) + b"\n" + entry.rest


def read(data: bytes) -> tuple[str, Entry]:
    """Return the queue and the entry that `write` was given."""
    line, _, rest = data.partition(b"\n")
    head = _decode(line)
    return head.queue, Entry(
        head.id, rest, head.priority, head.delay_ms, head.due_at_ms, head.expires_ms, head.unique, head.own_id, head.front,
        head.group, head.limits, head.tags,
    )  # fmt: skip


class OutboxBatch:
    """The numbered head of an outbox, by receiving queue; the entries for one queue keep their order."""

    __slots__ = ("number", "parts")

    def __init__(self, number: int, entries: Sequence[bytes]) -> None:
        """Read the entries; raises ConfigurationError (E45) for an entry of another version."""
        self.number = number
        self.parts: dict[str, list[Entry]] = {}
        for data in entries:
            try:
                queue, entry = read(data)
            except msgspec.DecodeError as error:
                raise ConfigurationError(
                    f"The outbox of a queue holds an entry that this version cannot read ({error}). Upgrade this worker.",
                    code="E45",
                ) from error
            self.parts.setdefault(queue, []).append(entry)

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


def deliver(
    source: QueueKeys, target: QueueKeys, number: int, entries: Sequence[Entry], *, written_for: str | None = None
) -> Call[list[str]]:
    """
    Return the call that pushes a part of a batch to *target*, once; raises what a push raises, and StalePush.

    A part that was written for another queue or partition, *written_for*, has a sequence of its own, because *target*
    may have a part of its own.
    """
    sequence = source.queue if written_for is None else f"{source.queue}>{written_for}"
    call = operations.push(target, ProducerSequence(sequence, number - 1, resends_refused=True), entries)
    return replace(call, keys=(target.inbox(sequence), *call.keys[1:]))


def trim(keys: QueueKeys, number: int) -> Call[int]:
    """Return the call that drops a delivered batch; it yields how many entries are left, -1 for a wrong number."""
    return Call(TRIM, (keys.outbox, keys.conf), (str(number),), int)
