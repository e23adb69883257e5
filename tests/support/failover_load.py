"""A producer and a worker side by side while servers fail, and the account of every job. No pytest in here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from conveyor.jobs.app import Conveyor
from conveyor.store import inspection
from conveyor.worker.worker import Worker
from support.running_worker import working
from support.waiting import auntil


@dataclass
class FailoverLoad:
    """A load with its account: accepted jobs, how often each ran, and the errors that the producer saw."""

    url: str
    queue: str = "mail"
    pace: float = 0.002
    """Seconds between two pushes."""
    accepted: list[int] = field(default_factory=list)
    at: dict[int, float] = field(default_factory=dict)
    """When each was accepted (`time.monotonic`)."""
    ran: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    last: float = 0.0
    """When a job ran last (`time.monotonic`)."""

    def __post_init__(self) -> None:
        self.app = Conveyor(self.url, lease="5s")
        self._stop = threading.Event()
        self._n = 0

        @self.app.task(queue=self.queue, name="note")
        async def note(n: int) -> None:
            self.ran[n] += 1
            self.last = time.monotonic()

    def produce(self) -> None:
        """Enqueue numbers until `end` is called; for a thread of its own."""
        with Conveyor(self.url) as producer:
            task = producer.task(queue=self.queue, name="note")(_nothing)
            while not self._stop.wait(self.pace):
                self._n += 1
                try:
                    task.enqueue(self._n)
                except Exception as error:
                    self.errors.append(repr(error))
                else:
                    self.at[self._n] = time.monotonic()
                    self.accepted.append(self._n)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[Worker]:
        """Work and produce beside the block; at its end stop producing and wait until all that was accepted has run."""
        async with working(self.app) as worker:
            thread = threading.Thread(target=self.produce)
            thread.start()
            try:
                await auntil(lambda: len(self.ran) > 20)
                yield worker
            finally:
                self._stop.set()
                await asyncio.to_thread(thread.join)
            with suppress(AssertionError):  # what is missing for good is for the test to say
                await auntil(lambda: self.missing == [])
            await auntil(lambda: self.is_drained(worker), 60)

    @staticmethod
    def is_drained(worker: Worker) -> bool:
        """True when the worker has nothing left to do."""
        return all(consumer.drained for consumer in worker.consumers)

    async def until_goes_on(self, seconds: float = 60.0) -> float:
        """Wait until a job runs that was accepted from now on; return how long that took (s)."""
        began, count = time.monotonic(), len(self.accepted)
        await auntil(
            lambda: len(self.accepted) > count and self.accepted[-1] in self.ran and self.last > began, seconds
        )
        return time.monotonic() - began

    @property
    def missing(self) -> list[int]:
        """The accepted jobs that never ran."""
        return [n for n in self.accepted if n not in self.ran]

    def lost(self, kills: list[tuple[float, float]]) -> list[int]:
        """
        Return what never ran, less what was accepted as its server was killed: replicas may not have had it.

        *kills* are (before, after the other had taken over), by `time.monotonic`; replicas have what was accepted before.
        """
        return [n for n in self.missing if not any(a <= self.at[n] <= b for a, b in kills)]

    @property
    def doubled(self) -> list[int]:
        """The jobs that ran more than once."""
        return [n for n, count in self.ran.items() if count > 1]

    async def audit(self) -> list[tuple[str, str]]:
        """Return what the audit of the queue finds wrong."""
        return await self.app.client.arun(inspection.audit(self.app.client.keys(self.queue)))


async def _nothing(n: int) -> None:
    """Only its name and signature matter to a producer."""
