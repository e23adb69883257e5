"""
Waiting for the ends of what runs, when a worker stops.

When a worker that stops when everything is drained may stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conveyor.worker.attempt import Attempt
    from conveyor.worker.leasing.queue_consumer import QueueConsumer


class DrainMonitor:
    """What a stopping worker still waits for, and whether it is in a hurry."""

    def __init__(self) -> None:
        """Begin without haste."""
        self.stuck: list[Attempt] = []  # on threads that outlive their time limit: not waited for
        self._ended = asyncio.Event()
        self._hurry = asyncio.Event()

    def note_end(self) -> None:
        """Say that an attempt ended."""
        self._ended.set()

    def hurry(self) -> None:
        """Wait no more."""
        self._hurry.set()

    async def wait(self, consumers: Sequence[QueueConsumer], seconds: float, *, hurry: bool = True) -> None:
        """Wait until nothing runs that will end by itself, but not longer; *hurry* tells whether `hurry` cuts it short."""
        deadline = monotonic() + seconds
        while any(attempt not in self.stuck for attempt in running(consumers)):
            left = deadline - monotonic()
            if left <= 0 or (hurry and self._hurry.is_set()):
                return
            self._ended.clear()
            waits = [asyncio.ensure_future(self._ended.wait()), asyncio.ensure_future(self._hurry.wait())]
            await asyncio.wait(waits[: 2 if hurry else 1], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()


def running(consumers: Sequence[QueueConsumer], *, early: bool = True) -> Iterator[Attempt]:
    """Yield what has not ended: of the jobs we hold and, with *early*, of those that Redis knows no more."""
    for consumer in consumers:
        yield from consumer.running(early=early)


class BurstMonitor:
    """Watches the queues run empty."""

    def __init__(self, *, until: float = 0.0) -> None:
        """*until*: the instant (monotonic) before which a predecessor's retries are not due, and it is not over."""
        self.until = until
        self._emptied_at = -1

    def is_over(self, consumers: Sequence[QueueConsumer], ended: int) -> bool:
        """
        Tell whether all queues were found empty twice; after the first time they are asked again.

        What our last job sent to another queue came after that one was asked. *ended* is how many jobs have ended: no
        job may come between the two.
        """
        if monotonic() < self.until or not all(one.drained for one in consumers):
            return False
        if self._emptied_at == ended:
            return True
        self._emptied_at = ended
        for one in consumers:
            one.has_more = True
            one.schedule()
        return False
