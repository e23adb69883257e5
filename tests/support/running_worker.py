"""Helpers of the worker's tests: an app on the server, a worker in this loop, and waiting for conditions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from conveyor.jobs.app import Conveyor
from conveyor.store import inspection
from conveyor.worker.worker import Worker
from support.waiting import auntil


async def drain(app: Conveyor, **options: Any) -> Worker:
    """Run a worker until everything is drained, at most a minute."""
    worker = Worker(app, burst=True, **options)
    await asyncio.wait_for(worker.run(), 60)
    return worker


@asynccontextmanager
async def working(app: Conveyor, **options: Any) -> AsyncIterator[Worker]:
    """Run a worker beside the block, and stop it at its end."""
    worker = Worker(app, **options)
    running = asyncio.create_task(worker.run())
    ready = asyncio.create_task(worker.ready.wait())
    await asyncio.wait([running, ready], return_when=asyncio.FIRST_COMPLETED, timeout=60)
    ready.cancel()
    try:
        if running.done():
            await running
        yield worker
    finally:
        worker.stop()
        await asyncio.wait_for(running, 90)


def join_threads() -> None:
    """Wait for the threads that outlive their worker: what they share with a supervisor may be released after them, not before."""
    for thread in threading.enumerate():
        if thread.name.startswith("conveyor-thread"):
            thread.join(60)


async def counts(app: Conveyor, queue: str = "default") -> inspection.QueueCounts:
    """Return what *queue* holds."""
    return await app.client.arun(inspection.counts(app.client.keys(queue)))


async def until_counts(
    app: Conveyor, condition: Callable[[inspection.QueueCounts], Any], queue: str = "default"
) -> inspection.QueueCounts:
    """Return what *queue* holds as soon as *condition* is true of it."""

    async def reached() -> tuple[inspection.QueueCounts] | None:
        found = await counts(app, queue)
        return (found,) if condition(found) else None  # an empty queue is false

    [found] = await auntil(reached)
    return found


async def audit(app: Conveyor, queue: str = "default") -> list[tuple[str, str]]:
    """Return what the audit of *queue* finds wrong."""
    return await app.client.arun(inspection.audit(app.client.keys(queue)))
