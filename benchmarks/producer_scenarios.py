"""Conveyor as a producer sees it: enqueueing, latency, results, memory; and a worker with nothing to do."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.harness import TEXT, Bench, Worker, commands_sent, percentile, rates, wait_for
from benchmarks.job_notes import Record


def enqueue(bench: Bench) -> None:
    """Enqueue one at a time, from 100 coroutines, and in bulk; push messages in bulk."""
    from benchmarks.measured_jobs import app, noop

    def each(count: int) -> None:
        for number in range(count):
            noop.enqueue(number, TEXT)

    bench.flush()
    bench.note_rounds("ours enqueue /s", rates(each, bench.size(30_000)))
    bench.flush()
    bench.note("ours aenqueue /s", asyncio.run(_concurrently(bench.size(60_000))))
    bench.flush()
    many = bench.size(300_000)
    bench.note_rounds(
        "ours enqueue_many /s", rates(lambda n: app.enqueue_many(noop.s(i, TEXT) for i in range(n)), many)
    )
    bench.flush()
    queue = app.queue("messages")
    bench.note_rounds(
        "ours push_many /s", rates(lambda n: queue.push_many({"id": i, "text": TEXT} for i in range(n)), many)
    )
    bench.flush()


async def _concurrently(count: int, callers: int = 100) -> float:
    from benchmarks.measured_jobs import app, noop

    async def caller(first: int, last: int) -> None:
        for number in range(first, last):
            await noop.aenqueue(number, TEXT)

    await asyncio.gather(*(noop.aenqueue(number, TEXT) for number in range(callers)))  # connects
    each = count // callers
    start = time.perf_counter()
    await asyncio.gather(*(caller(first, first + each) for first in range(0, each * callers, each)))
    seconds = time.perf_counter() - start
    await app.aclose()
    return each * callers / seconds


def latency(bench: Bench) -> None:
    """Time from enqueue to the start of the function in an idle worker, one each 20 ms; and enqueue to result; awaited too."""
    from benchmarks.measured_jobs import app, echo, stamp

    bench.flush()
    count = bench.size(500)
    record = Record(bench.record_path)
    with Worker(bench, "-q", "stamp", "-q", "kept") as worker:
        echo.enqueue(0, TEXT).result(timeout="30s")  # it has started
        worker.check()
        begin = time.monotonic()
        for number in range(count):
            time.sleep(max(0, begin + number * 0.02 - time.monotonic()))
            stamp.enqueue(number, time.monotonic_ns())
        delays: list[float] = []

        def all_seen() -> bool:
            delays.extend(line.value / 1e6 for line in record.read())
            return len(delays) >= count

        wait_for(all_seen, "all stamps", within=30)
        bench.note("ours idle-to-start p50 ms", percentile(delays, 50))
        bench.note("ours idle-to-start p99 ms", percentile(delays, 99))

        async def enqueue_each() -> list[float]:
            trips = []
            await stamp.aenqueue(0, time.monotonic_ns())  # connects
            begin = time.monotonic()
            for number in range(count):
                await asyncio.sleep(max(0, begin + number * 0.02 - time.monotonic()))
                await stamp.aenqueue(number, time.monotonic_ns())
            for number in range(count):
                start = time.perf_counter()
                assert await (await echo.aenqueue(number, TEXT)).aresult(timeout="10s") == number
                trips.append((time.perf_counter() - start) * 1e3)
            await app.aclose()
            return trips

        delays.clear()
        awaited = asyncio.run(enqueue_each())
        wait_for(all_seen, "all stamps", within=30)
        bench.note("ours awaited idle-to-start p50 ms", percentile(delays, 50))
        bench.note("ours awaited enqueue-to-result p50 ms", percentile(awaited, 50))

        trips = []
        for number in range(count):
            start = time.perf_counter()
            assert echo.enqueue(number, TEXT).result(timeout="10s") == number
            trips.append((time.perf_counter() - start) * 1e3)
        bench.note("ours enqueue-to-result p50 ms", percentile(trips, 50))
    bench.flush()


def many_queues(bench: Bench) -> None:
    """
    Time from enqueue to the start of the function, one job each 4 ms, in a worker of one queue and in one of 200.

    The jobs go round the queues.
    """
    from benchmarks.measured_jobs import MANY, spread

    count = bench.size(1000)
    record = Record(bench.record_path)
    for queues in (1, MANY):
        bench.flush()
        flags = [flag for at in range(queues) for flag in ("-q", f"spread{at}")]
        with Worker(bench, *flags, "--processes", "1") as worker:
            _start_each(spread[:queues], record, worker)
            begin, delays = time.monotonic(), list[float]()
            for number in range(count):
                time.sleep(max(0, begin + number * 0.004 - time.monotonic()))
                spread[number * 7919 % queues].enqueue(number, time.monotonic_ns())

            def all_seen(delays: list[float] = delays) -> bool:
                delays.extend(line.value / 1e6 for line in record.read())
                return len(delays) >= count

            wait_for(all_seen, "all stamps", within=30)
            bench.note(f"ours {queues} queues idle-to-start p50 ms", percentile(delays, 50))
            bench.note(f"ours {queues} queues idle-to-start max ms", max(delays))
    bench.flush()


def _start_each(tasks: list[Any], record: Record, worker: Worker) -> None:
    """Run a job of each task, so that the worker has started and knows all queues."""
    for task in tasks:
        task.enqueue(0, time.monotonic_ns())
    seen = 0

    def all_started() -> bool:
        nonlocal seen
        worker.check()
        seen += len(list(record.read()))
        return seen >= len(tasks)

    wait_for(all_started, "a job of each queue", within=30)
    time.sleep(1)


def memory(bench: Bench) -> None:
    """Bytes that the server uses per queued job with a 100-byte argument."""
    from benchmarks.measured_jobs import app, noop

    bench.flush()
    count = bench.size(100_000)
    app.enqueue_many([noop.s(0, TEXT)])  # what is there once per queue and connection
    with bench.client() as client:
        before = client.info("memory")["used_memory"]
        app.enqueue_many(noop.s(number, TEXT) for number in range(count))
        after = client.info("memory")["used_memory"]
    bench.note("ours bytes per queued job", (after - before) / count)
    bench.flush()


def idle(bench: Bench) -> None:
    """Commands a second, and CPU, of a worker with one process and nothing to do."""
    from benchmarks.measured_jobs import echo

    bench.flush()
    seconds = 5 if bench.quick else 20
    with Worker(bench, "-q", "kept", "--processes", "1") as worker, bench.client() as client:
        echo.enqueue(0, TEXT).result(timeout="30s")
        worker.check()
        _settle(worker)
        sent, used, begin = commands_sent(client), worker.cpu(), time.monotonic()
        time.sleep(seconds)  # what is measured is that nothing happens
        taken = time.monotonic() - begin
        bench.note("ours idle commands /s", (commands_sent(client) - sent) / taken)
        bench.note("ours idle CPU %", (worker.cpu() - used) / taken * 100)
    bench.flush()


def _settle(worker: Worker) -> None:
    """Wait until the worker has used no CPU for a second, at most ten."""
    for _ in range(10):
        before = worker.cpu()
        time.sleep(1)
        if worker.cpu() - before < 0.02:
            return
