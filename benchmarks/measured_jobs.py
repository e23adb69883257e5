"""The jobs that are measured: `conveyor worker benchmarks.measured_jobs:app`. Each has its own queue."""

from __future__ import annotations

import asyncio
import os
import time

from benchmarks.harness import NAMESPACE
from conveyor import Concurrency, Context, Conveyor, Unique, current

app = Conveyor(namespace=NAMESPACE)  # the URL comes from CONVEYOR_URL
if os.environ.get("CONVEYOR_BENCH_TRACED"):
    from conveyor.contrib.opentelemetry import instrument

    instrument(app)


@app.task(queue="async", timeout="30s")
async def noop(number: int, text: str) -> None:
    """Do nothing, on the event loop."""


@app.task(queue="sync", timeout="30s")
def noop_sync(number: int, text: str) -> None:
    """Do nothing, on a thread."""


@app.task(queue="kept", timeout="30s", keep_result="10m")
async def echo(number: int, text: str) -> int:
    """Return a value that is kept."""
    return number


@app.batch_task(queue="batched", timeout="30s", size=500, within="1s")
async def batched(items: list[tuple[int, str]]) -> None:
    """Do nothing for 500 at once."""


@app.task(queue="grouped", timeout="30s", group_by="group")
async def grouped(group: int, text: str) -> None:
    """Do nothing, in order with the others of a group."""


@app.task(queue="strict", timeout="30s", group_by="group")
async def strict(group: int, text: str) -> None:
    """Do nothing, in order with all others."""


@app.task(queue="opened", timeout="30s", group_by="group", limits=[Concurrency(1000, by="group")])
async def opened(group: int, text: str) -> None:
    """Do nothing, in a group of which a thousand run at a time."""


@app.task(queue="limited", timeout="30s", limits=[Concurrency(2000)])
async def limited(number: int, text: str) -> None:
    """Do nothing, under a limit with room."""


@app.task(queue="keyed", timeout="30s", unique=Unique(by=("number",)))
async def keyed(number: int, text: str) -> None:
    """Do nothing, under a unique key."""


@app.task(queue="stamp")
async def stamp(number: int, sent_ns: int) -> None:
    """Note how long ago the job was enqueued."""
    taken = time.monotonic_ns() - sent_ns
    record("stamp", number, taken)


@app.task(queue="depth", timeout="30s")
async def deep(number: int, text: str) -> None:
    """Do nothing, in a queue that is kept deep."""


@app.task(queue="hold")
async def hold(number: int) -> None:
    """Note the start, take 10 ms, note the end."""
    record("start", number, time.monotonic_ns())
    await asyncio.sleep(0.01)
    record("end", number, time.monotonic_ns())


@app.task(queue="due")
async def due(number: int, due_us: int) -> None:
    """Note how long after its instant the job started, in microseconds."""
    record("due", number, time.time_ns() // 1000 - due_us)


@app.task(queue="ticks")
async def tick(number: int, context: Context = current()) -> None:
    """Note how long after the instant of its schedule the job started, in microseconds."""
    assert context.scheduled_for is not None
    record("tick", number, time.time_ns() // 1000 - round(context.scheduled_for.timestamp() * 1e6))


@app.task(queue="burst")
async def burst(number: int) -> None:
    """Last for 50 ms."""
    await asyncio.sleep(0.05)


@app.task(queue="told")
async def idling(seconds: float) -> None:
    """Say nothing for a while."""
    await asyncio.sleep(seconds)


@app.task(queue="told")
async def progressing(seconds: float, context: Context = current()) -> None:
    """Tell a progress 100,000 times a second, and note what a thousand calls took, in nanoseconds."""
    end = time.monotonic() + seconds
    done = 0
    while (began := time.monotonic()) < end:
        at = time.perf_counter_ns()
        for _ in range(1000):
            done += 1
            context.progress(done, 1_000_000)
        record("progress", done, time.perf_counter_ns() - at)
        await asyncio.sleep(max(0.0, began + 0.01 - time.monotonic()))


@app.task(queue="told")
async def emitting(parts: int, context: Context = current()) -> int:
    """Emit so many parts."""
    for number in range(1, parts + 1):
        await context.emit(number)
    return parts


PARTED = (1, 4, 16)
for count in PARTED:
    app.queue(f"parted{count}", partitions=count)


async def _parted(number: int, text: str) -> None:
    """Do nothing, in a queue with partitions."""


parted = {count: app.task(name=f"parted{count}", queue=f"parted{count}", timeout="30s")(_parted) for count in PARTED}


async def _spread(number: int, sent_ns: int) -> None:
    """Note how long ago the job was enqueued, in one of many queues."""
    record("spread", number, time.monotonic_ns() - sent_ns)


MANY = 200
spread = [app.task(name=f"spread{at}", queue=f"spread{at}")(_spread) for at in range(MANY)]


def record(kind: str, number: int, value: int) -> None:
    """Append a line that survives this process: `kind number pid value`."""
    os.write(_file(), f"{kind} {number} {os.getpid()} {value}\n".encode())


_opened: list[int] = []


def _file() -> int:
    if not _opened:
        _opened.append(os.open(os.environ["CONVEYOR_BENCH_RECORD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    return _opened[0]
