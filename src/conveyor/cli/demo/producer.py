"""
The producers of a demo: jobs, messages and entries of a plain list, at a steady pace.

They record every push that Redis acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import conveyor
from conveyor.cli.demo import task
from conveyor.errors import StoreUnavailable
from conveyor.jobs.job import Job

MESSAGE, READING = "orders (message)", "readings (RPUSH)"
"""The names in the report for messages and readings, which belong to no task."""
_CUSTOMERS = ("ada", "barbara", "dennis", "edsger", "grace", "ken", "margaret", "niklaus")
_SMALL_FACTOR, _LARGE_FACTORS = (
    8_191 * 6_700_417,
    999_999_937 * 999_999_929,
)  # the second takes minutes to factor


@dataclass
class AcknowledgedPushes:
    """The pushes that Redis acknowledged: key → task. A key is added after its call returned."""

    accepted: dict[str, str] = field(default_factory=dict)
    unanswered: int = 0

    def record(self, job: Job[object]) -> None:
        """Record a job."""
        self.accepted[job.id] = job.task or ""


class DemoProducer:
    """A producer of jobs and messages that pushes until it is stopped."""

    def __init__(self, pushes: AcknowledgedPushes) -> None:
        self._pushes = pushes
        self._random = random.Random(7)  # noqa: S311  every demo pushes the same
        self._files = _files()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Push until `stop`; calls in progress are finished."""
        async with asyncio.TaskGroup() as group:
            for pause, push in (
                (0.10, self._statistics), (0.20, self._thumbnail), (0.15, self._charge), (0.8, self._factor),
                (0.40, self._remind), (0.20, self._order),
            ):  # fmt: skip
                group.create_task(self._repeat(pause, push))

    def stop(self) -> None:
        """Stop pushing."""
        self._stop.set()

    async def burst(self, count: int) -> None:
        """Enqueue many thumbnails in one call."""
        with _count_outages(self._pushes):
            jobs = await task.app.aenqueue_many(task.thumbnail.s(number, 160) for number in range(count))
            for job in jobs:
                self._pushes.record(job)

    async def _repeat(self, pause: float, push: Callable[[int], Awaitable[None]]) -> None:
        for number in itertools.count(1):
            with _count_outages(self._pushes):
                await push(number)
            try:
                await asyncio.wait_for(self._stop.wait(), pause * self._random.uniform(0.7, 1.3))
            except TimeoutError:
                continue
            return

    async def _statistics(self, _: int) -> None:
        self._pushes.record(await task.statistics.aenqueue(str(next(self._files))))

    async def _thumbnail(self, number: int) -> None:
        self._pushes.record(await task.thumbnail.aenqueue(number))

    async def _charge(self, number: int) -> None:
        self._pushes.record(await task.charge.aenqueue(number, self._random.randrange(100, 20_000)))

    async def _factor(self, number: int) -> None:
        self._pushes.record(await task.factor.aenqueue(_LARGE_FACTORS if number % 5 == 2 else _SMALL_FACTOR))

    async def _remind(self, number: int) -> None:
        due = datetime.now(UTC) + timedelta(seconds=1.5)
        customer = _CUSTOMERS[number % len(_CUSTOMERS)]
        self._pushes.record(await task.remind.options(at=due).aenqueue(customer, due))

    async def _order(self, number: int) -> None:
        order = task.Order(number, self._random.choice(_CUSTOMERS), self._random.randrange(100, 20_000))
        self._pushes.accepted[await task.orders.apush(order)] = MESSAGE


class ForeignProducer(threading.Thread):
    """A producer of another program: a thread with ``RPUSH`` of JSON by redis-py alone."""

    def __init__(self, url: str, name: str, pushes: AcknowledgedPushes) -> None:
        super().__init__(name="conveyor-demo-foreign-producer", daemon=True)
        self._url, self._list, self._pushes = url, name, pushes
        self._stopped = threading.Event()

    def run(self) -> None:
        """Push until `stop`."""
        from redis import Redis, RedisError

        with Redis.from_url(self._url) as client:
            for number in itertools.count(1):
                values = [20 + (number * step) % 7 / 10 for step in range(1, 9)]
                try:
                    client.rpush(self._list, json.dumps({"id": number, "values": values}))
                    self._pushes.accepted[task.reading_key(number)] = READING
                except RedisError:
                    self._pushes.unanswered += 1
                if self._stopped.wait(0.25):
                    return

    def stop(self) -> None:
        """Stop pushing, and wait for the last reply."""
        self._stopped.set()
        self.join(5)


async def consume_orders() -> None:
    """Consume orders as a program without tasks does, until it is cancelled."""
    revenue: dict[str, int] = {}
    messages = task.orders.aconsume(prefetch=8)
    try:
        async for message in messages:
            async with message as order:
                with task.journal.run(MESSAGE, message.id, message.attempt) as run:
                    revenue[order.customer] = revenue.get(order.customer, 0) + order.cents
                    run.note = (
                        f"order {order.number}: {order.customer} has spent {revenue[order.customer] / 100:,.2f} €"
                    )
    finally:
        await messages.aclose()


class _count_outages:  # noqa: N801  reads as a statement
    """Counts a push that Redis did not confirm, so that the producer continues."""

    def __init__(self, pushes: AcknowledgedPushes) -> None:
        self._pushes = pushes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, StoreUnavailable):
            self._pushes.unanswered += 1
            return True
        return False


def _files() -> Iterator[Path]:
    """Yield the source files of this package, again and again."""
    paths = sorted(Path(conveyor.__file__).parent.rglob("*.py")) + sorted(Path(conveyor.__file__).parent.rglob("*.lua"))
    return itertools.cycle(paths)
