"""Decides when a worker may end: a stopping one when its jobs have ended, a burst when its queues are drained."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conveyor.worker.attempt import Attempt
    from conveyor.worker.leasing.queue_consumer import QueueConsumer

RECYCLE = 75
"""Exit code of a child that asks to be replaced: a thread does not end, or a recycle limit is used up."""
STOPPED = 76
"""Exit code of a child that a person's command has stopped: it is not started again."""


class DrainMonitor:
    """Waits for the running jobs of a stopping worker."""

    def __init__(self) -> None:
        self.stuck: list[Attempt] = []
        """Attempts on threads that outlive their time limit: they are not waited for."""
        self._ended = asyncio.Event()
        self._hurry = asyncio.Event()

    def note_end(self) -> None:
        """Note that an attempt ended."""
        self._ended.set()

    def hurry(self) -> None:
        """Wait no longer."""
        self._hurry.set()

    async def wait(self, consumers: Sequence[QueueConsumer], seconds: float, *, hurry: bool = True) -> None:
        """
        Wait until nothing runs that will end by itself, at most *seconds*.

        *hurry* tells whether `hurry` cuts the wait short.
        """
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
    """Yield the attempts that have not ended; with *early* also those whose jobs Redis no longer has."""
    for consumer in consumers:
        yield from consumer.running(early=early)


class BurstMonitor:
    """Decides when a burst is over."""

    def __init__(self, *, until: float = 0.0) -> None:
        """
        Args:
            until: monotonic time before which the burst cannot end, because retries of the previous process are still due.
        """
        self.until = until
        self._emptied_at = -1

    def is_over(self, consumers: Sequence[QueueConsumer], ended: int) -> bool:
        """
        Tell whether all queues were found empty twice. After the first time they are asked again.

        *ended* is how many jobs have ended so far: none may end between the two times.
        """
        if monotonic() < self.until or not all(one.drained for one in consumers):
            return False
        # Twice: what the last job sent to another queue may have come after that one was asked.
        if self._emptied_at == ended:
            return True
        self._emptied_at = ended
        for one in consumers:
            one.has_more = True
            one.schedule()
        return False
