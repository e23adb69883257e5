"""
The number of partitions of a queue: stored with the queue itself and with each of its partitions.

The number stored with the queue decides. A push or a registration carries the declared number to the partition's copy
and is refused there when they differ, so the check costs no round trip.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from zlib import crc32

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Script
from conveyor.units import quantity

CLAIM_PARTITIONS, REPARTITION, COUNT = (
    Script("claim_partitions"),
    Script("repartition"),
    Script("partitions"),
)


def partition_of(key: str, partitions: int) -> int:
    """Return the partition that *key* picks: a number from 0 to *partitions* - 1."""
    return crc32(key.encode("utf-8", "surrogatepass")) % partitions


class PartitionCountMismatch(ConfigurationError):
    """
    The declared number of partitions is not the one in Redis.

    `recorded` is the number in Redis: 0 while it is being changed, None while none is set.
    """

    code = "E34"

    def __init__(self, keys: QueueKeys, recorded: str) -> None:
        self.queue = ids.logical(keys.queue)
        self.recorded = int(recorded) if recorded else None
        super().__init__(_mismatch_text(self.queue, keys.partitions, self.recorded))


def _mismatch_text(queue: str, declared: int, recorded: int | None) -> str:
    if recorded == 0:
        return (
            f"The number of partitions of queue '{queue}' is being changed right now. Nothing was stored. Try again. If "
            f"this lasts, the program that began the change has died: conveyor queue partition {queue} N completes it."
        )
    number = 1 if recorded is None else recorded
    declare = (
        f"app.queue({queue!r}, partitions={number})" if number > 1 else f"app.queue({queue!r}) without partitions="
    )
    return (
        f"Queue '{queue}' has {quantity(number, 'partition')}, but this program says {declared}. Nothing was stored. "
        f"Declare it as {declare}; or, when all programs say {declared}, drain it and run: conveyor queue partition {queue} "
        f"{declared}"
    )


def claim_partitions(keys: QueueKeys, count: int, *, whole: bool) -> Call[bool]:
    """
    Return the call that records *count* where none is recorded, for the *whole* queue or one partition.

    It yields True when it was recorded now, False when it was already. Raises PartitionCountMismatch for another.
    """
    wanted = QueueKeys("_", keys.queue, partitions=count)
    return Call(
        CLAIM_PARTITIONS, (keys.conf,), (str(count), "queue" if whole else "partition"), partial(_claimed, wanted)
    )


def compare_partitions(keys: QueueKeys, count: int) -> Call[bool]:
    """
    Return the call that compares *count* with the number recorded for the whole queue, and writes nothing.

    It yields False when none is recorded. Raises PartitionCountMismatch for another.
    """
    wanted = QueueKeys("_", keys.queue, partitions=count)
    call = Call(CLAIM_PARTITIONS, (keys.conf,), (str(count), "look"), partial(_claimed, wanted))
    return call.then(lambda unrecorded: not unrecorded)


def claims(namespace: str, queue: str, count: int) -> list[Call[bool]]:
    """
    Return the calls by which a program agrees with Redis on the number, to be made one after the other.

    The queue's own is the first: of two programs that differ, one loses there, before it has touched a partition.
    """
    parts = [QueueKeys(namespace, ids.partition(queue, number)) for number in range(count)]
    whole = claim_partitions(QueueKeys(namespace, queue), count, whole=True)
    return [whole, *(claim_partitions(keys, count, whole=False) for keys in parts)]


def _claimed(keys: QueueKeys, reply: list[Any]) -> bool:
    if reply[0] == -1:
        raise PartitionCountMismatch(keys, reply[1].decode())
    if reply[0] == -2:
        raise PartitionCountMismatch(keys, "0")
    return bool(reply[0])


def count(keys: QueueKeys) -> Call[tuple[int, str]]:
    """Return the call that reads (number, change in progress or ""); the number is 0 during a change, 1 where none is set."""
    return Call(COUNT, (keys.conf,), (), lambda reply: (int(reply[0]), reply[1].decode()))


def repartition(keys: QueueKeys, step: str, token: str, number: int | None) -> Call[tuple[int, int]]:
    """Return the call that makes one step of a change (see repartition.lua); it yields its two numbers."""
    names = (keys.conf, keys.jobs, keys.workers, keys.wake, keys.none, keys.outbox)
    return Call(
        REPARTITION,
        names,
        (step, token, "" if number is None else str(number)),
        lambda reply: (int(reply[0]), int(reply[1])),
    )
