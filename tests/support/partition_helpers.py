"""Helpers of the tests of partitions."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from conveyor.messaging.partitioned_queue import PartitionedQueue
from conveyor.messaging.retry import Retry
from conveyor.store import inspection
from conveyor.store.client.client import Client

FAST = Retry(attempts=3, backoff="10ms", jitter=False)


def spread(backend: Client, count: int = 8, **options: Any) -> PartitionedQueue[Any]:
    """Declare the queue `orders` with so many partitions."""
    return PartitionedQueue(backend, "orders", partitions=count, **{"lease_ms": 2000, "retry": FAST, **options})


def lengths(queue: PartitionedQueue[Any]) -> list[int]:
    """Return how many messages each partition holds."""
    return [len(part) for part in queue.parts]


def audits(queue: PartitionedQueue[Any]) -> list[tuple[str, str]]:
    """Return what the audit of any partition finds wrong."""
    return [wrong for part in queue.parts for wrong in queue.client.run(inspection.audit(part.keys))]


def place_of(public_id: str) -> int:
    """Return the partition that an id names."""
    return int(public_id.partition("/")[2].partition(":")[0])


def ack_all(messages: Iterable[Any]) -> list[Any]:
    """Finish messages; return their bodies."""
    bodies = []
    for message in messages:
        bodies.append(message.body)
        message.ack()
    return bodies


def clear(queue: PartitionedQueue[Any]) -> None:
    """Remove everything that waits or is dead."""
    queue.purge()
    queue.purge(dead=True)


def in_a_loop(queue: PartitionedQueue[Any], work: Coroutine[Any, Any, Any]) -> Any:
    """Run *work* on a loop of its own and close what that loop used."""

    async def whole() -> Any:
        try:
            return await work
        finally:
            await queue.client.aclose()

    return asyncio.run(whole())
