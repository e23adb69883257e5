"""`conveyor bench`: how fast this server is from here, beside what a plain Redis list does in the same run."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options
from conveyor.store.transport.async_connection import AsyncConnection

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor

SINGLE = 500
"""Calls of a kind that are made one after the other, and jobs whose way to an idle worker is timed."""
LEFT_FOR = "5m"
"""Keys of a run that was killed go by themselves after this time."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure: `value` in `unit` ("/s" or "ms"), and the same of a plain list where there is such a thing."""

    name: str
    value: float
    unit: str
    plain: float | None = None

    @property
    def ratio(self) -> float | None:
        """The value divided by that of a plain list."""
        return self.value / self.plain if self.plain else None


@click.command(cls=LeafCommand, example="conveyor bench --jobs 20000")
@click.option(
    "--jobs",
    type=click.IntRange(1000, 10_000_000),
    default=50_000,
    show_default=True,
    help="Jobs to push and to drain.",
)
@click.option(
    "--payload", type=click.IntRange(0, 100_000), default=100, show_default=True, help="Bytes of each argument."
)
@redis_options
def bench(target: Target, out: Output, jobs: int, payload: int) -> None:
    """
    Measure this server from here: pushes, a drain, and the way of a job to an idle worker.

    In a queue of its own, with this process as the only producer and worker. The server's other users feel it while it runs, some
    seconds. `conveyor worker` with several processes drains faster.
    """
    figures = asyncio.run(_measure(target.empty_app(), jobs, "x" * payload))
    if out.as_json:
        out.document(
            "bench", jobs=jobs, payload=payload, figures=[asdict(one) | {"ratio": one.ratio} for one in figures]
        )
        return
    rows = [
        (
            one.name,
            _with_unit(one.value, one.unit),
            _with_unit(one.plain, one.unit),
            f"{one.ratio:.2g} x" if one.ratio else "",
        )
        for one in figures
    ]
    out.table(("FIGURE", "CONVEYOR", "PLAIN LIST", "RATIO"), rows)


def _with_unit(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if unit == "/s" else f"{value:.2f} {unit}"


async def _measure(app: Conveyor, count: int, text: str) -> list[Figure]:
    name = f"bench-{secrets.token_hex(6)}"
    queue = app.queue(name, expires=LEFT_FOR)
    started, ended = 0, asyncio.Event()
    first = last = 0.0
    single = asyncio.Queue[float]()

    @app.task(name="conveyor.bench.count", queue=name, keep_result=0)
    async def count_start(text: str) -> None:
        nonlocal started, first, last
        last = perf_counter()
        first = first or last
        started += 1
        if started == count:
            ended.set()

    @app.task(name="conveyor.bench.time", queue=name, keep_result=0)
    async def time_start(text: str) -> None:
        single.put_nowait(perf_counter())

    async with app:
        await app.aping()  # a server that is away is told as everywhere
        plain = AsyncConnection(app.client.endpoint(queue.keys))
        key = f"{queue.keys.prefix}bench"
        try:
            await plain.execute("DEL", key)  # connects
            trip = await _times(lambda: plain.execute("PING"))
            push_plain = await _times(lambda: plain.execute("RPUSH", key, text))
            take_plain = await _times(lambda: plain.execute("LPOP", key))
        finally:
            await plain.execute("DEL", key)
            plain.close()
        async with app.worker(queues={name: 1}):
            ways = []
            for _ in range(SINGLE):
                sent = perf_counter()
                await time_start.aenqueue(text)
                ways.append(await single.get() - sent)
        push = await _times(lambda: count_start.aenqueue(text))
        await queue.apurge()
        began = perf_counter()
        await app.aenqueue_many(count_start.s(text) for _ in range(count))
        bulk = perf_counter() - began
        async with app.worker(queues={name: 1}):
            await ended.wait()
    return [
        Figure("round trip (PING)", 1000 * median(trip), "ms"),
        Figure("push, one after the other", 1 / median(push), "/s", 1 / median(push_plain)),
        Figure("push, in bulk", count / bulk, "/s", 1 / median(push_plain)),
        Figure("drain", (count - 1) / (last - first), "/s", 1 / median(take_plain)),
        Figure("push to start in an idle worker, p50", 1000 * median(ways), "ms"),
        Figure("push to start in an idle worker, p99", 1000 * sorted(ways)[-1 - len(ways) // 100], "ms"),
    ]


async def _times(call: Callable[[], Awaitable[Any]]) -> list[float]:
    """Return the seconds of `SINGLE` calls, one after the other."""
    times = []
    for _ in range(SINGLE):
        began = perf_counter()
        await call()
        times.append(perf_counter() - began)
    return times
