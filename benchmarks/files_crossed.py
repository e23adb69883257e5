"""
Count the files of the library that one warm call passes through: `python -m benchmarks.files_crossed`.

A reader who follows a call in the source goes the same way. For each scenario it prints the calls of Python functions
of the library, the distinct files they are in, and how often a call is in another file than the call before it.
The numbers are counts (`sys.setprofile`), so they do not depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import conveyor
from benchmarks.harness import running_server
from conveyor import Conveyor

ROOT = str(Path(conveyor.__file__).parent)
WARM_UP = 30
TRACES = 5
"""Jobs traced in a worker. The least is shown: a renewal of its leases may fall into the time of one."""


class Trace:
    """The calls into the library that the profiler of one thread has counted."""

    def __init__(self) -> None:
        self.calls = 0
        self.changes = 0
        self.files: list[str] = []
        self._last = ""

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(ROOT):
            return
        self.calls += 1
        self.changes += name != self._last and self.calls > 1
        self._last = name
        if name not in self.files:
            self.files.append(name)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch this thread."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)

    def show(self, what: str, *, verbose: bool) -> None:
        """Print the three numbers, and the files in the order in which they were first entered."""
        print(f"{what:<34}{self.calls:>7} calls{len(self.files):>5} files{self.changes:>6} changes of file", flush=True)
        if verbose:
            print("".join(f"    {name.removeprefix(ROOT)[1:]}\n" for name in self.files), end="", flush=True)


def _warm(call: Callable[[], Any]) -> Trace:
    for _ in range(WARM_UP):
        call()
    trace = Trace()
    with trace.on():
        call()
    return trace


def _messages(app: Conveyor) -> Iterator[tuple[str, Trace]]:
    orders = app.queue("orders")
    yield "queue.push", _warm(lambda: orders.push({"id": 1}))
    for message in orders.pull(n=WARM_UP + 1):
        message.ack()

    for _ in range(2 * WARM_UP):
        orders.push({"id": 1})
    consumer = orders.consume()

    def consume() -> None:
        with next(consumer):
            pass

    yield "next(consume()), with message", _warm(consume)
    consumer.close()

    def pull() -> None:
        (message,) = orders.pull()
        message.ack()

    for _ in range(2 * WARM_UP):
        orders.push({"id": 1})
    yield "pull(), ack()", _warm(pull)


def _jobs(app: Conveyor) -> Iterator[tuple[str, Trace]]:
    @app.task(name="add")
    def task(a: int, b: int) -> None: ...

    yield "task.enqueue", _warm(lambda: task.enqueue(1, 2))
    yield "task.options(…).enqueue", _warm(lambda: task.options(priority=3).enqueue(1, 2))


async def _worker(app: Conveyor, *, enqueue_here: bool) -> Trace:
    ran = asyncio.Event()

    @app.task(name="run", queue="warm")
    async def task(a: int, b: int) -> None:
        ran.set()

    traces = []
    async with app.worker(queues={"warm": 1}):

        async def once() -> None:
            ran.clear()
            if enqueue_here:
                await task.aenqueue(1, 2)
            else:  # on a thread that the profiler does not see
                await asyncio.to_thread(task.enqueue, 1, 2)
            await ran.wait()

        for _ in range(WARM_UP):
            await once()
        await _idle(app)
        for _ in range(TRACES):
            traces.append(Trace())
            with traces[-1].on():
                await once()
                await _idle(app)
    return min(traces, key=lambda trace: trace.changes)


async def _idle(app: Conveyor) -> None:
    """Wait until every job is acknowledged, on a thread of its own: the profiler sees the worker's alone."""

    def wait() -> None:
        import redis

        with redis.Redis.from_url(app.client.address.url) as client:
            while client.hlen("bench:{warm}:jobs"):
                threading.Event().wait(0.002)
            threading.Event().wait(0.05)  # the reply of the last turn has been read

    await asyncio.to_thread(wait)


def _run(what: str, awaitable: Callable[[Conveyor], Awaitable[Trace]], url: str, *, verbose: bool) -> None:
    async def main() -> Trace:
        async with Conveyor(url, namespace="bench") as app:
            return await awaitable(app)

    asyncio.run(main()).show(what, verbose=verbose)


def main() -> None:
    """Print a line a scenario; with `--files` also the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.files_crossed", description=__doc__)
    parser.add_argument("--files", action="store_true", help="name the files too")
    verbose = parser.parse_args().files
    with running_server() as (url, _):
        with Conveyor(url, namespace="bench") as app:
            for scenarios in (_messages, _jobs):
                for what, trace in scenarios(app):
                    trace.show(what, verbose=verbose)
        _run("lease, async def, ack", partial(_worker, enqueue_here=False), url, verbose=verbose)
        _run("aenqueue, lease, async def, ack", partial(_worker, enqueue_here=True), url, verbose=verbose)


if __name__ == "__main__":
    main()
