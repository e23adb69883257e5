"""Very many jobs, all at once or never fetched: rows D6 to D10 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
import redis as redis_py

from conveyor.jobs.app import Conveyor
from conveyor.messaging.retry import Retry
from conveyor.store import inspection
from support.manual_worker import ManualWorker
from support.running_worker import audit, drain
from support.waiting import auntil, until

Rounds = Callable[[int, int], int]
SLOW_US = 100_000


def _note(app: Conveyor) -> Any:
    @app.task(name="note")
    def note(n: int) -> None: ...

    return note


def _push(app: Conveyor, count: int) -> float:
    """Enqueue that many; return how many seconds it took."""
    task, began = app.tasks.get("note") or _note(app), perf_counter()
    for first in range(0, count, 50_000):  # handles of a million would weigh more than what is tested
        app.enqueue_many([task.s(n) for n in range(first, min(first + 50_000, count))])
    return perf_counter() - began


def _cost(app: Conveyor, redis: redis_py.Redis) -> tuple[dict[str, float], float]:
    """Lease and finish 2,000 jobs, look at pages and counts; return commands per job by name, and µs per script."""
    keys, jobs, done = app.client.keys("default"), 2000, ()
    manual = ManualWorker(app)
    redis.config_resetstat()
    for _ in range(jobs // 500):
        turn = manual.turn(500, done=done)
        assert len(turn.ids) == 500
        done = tuple(turn.ids)
    manual.turn(0, done=done)
    for state in ("ready", "scheduled", "dead"):
        app.client.run(inspection.list_jobs(keys, state, 0, 50))
    app.client.run(inspection.counts(keys))
    stats = redis.info("commandstats")
    manual.leave()
    per_job = {name.removeprefix("cmdstat_"): found["calls"] / jobs for name, found in stats.items()}
    return {
        name: calls
        for name, calls in per_job.items()
        if name not in {"info", "config|resetstat", "script|load", "eval"}
    }, (stats["cmdstat_evalsha"]["usec_per_call"])


@pytest.mark.row("D6")
def test_a_job_costs_the_same_at_any_depth(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """With a huge backlog a job costs as many commands as with a small one, none of them walks through it, and it drains."""
    depth = rounds(1_000_000, 50_000)
    _push(app, 2500)
    shallow, shallow_us = _cost(app, redis)
    took = _push(app, depth)
    redis.config_set("slowlog-log-slower-than", SLOW_US)
    redis.slowlog_reset()
    deep, deep_us = _cost(app, redis)
    slow = [entry["command"][:40] for entry in redis.slowlog_get()]
    redis.config_set("slowlog-log-slower-than", 10_000)
    print(
        f"{depth} enqueued in {took:.1f} s; {sum(shallow.values()):.3f} commands a job and {shallow_us:.0f} µs a script"
    )
    print(
        f"with few, {sum(deep.values()):.3f} and {deep_us:.0f} µs with many; memory {redis.info('memory')['used_memory_human']}"
    )
    assert deep == pytest.approx(shallow, abs=0.01)
    assert slow == []
    assert app.client.run(inspection.counts(app.client.keys("default"))).ready == 500 + depth - 2000


@pytest.mark.row("D7")
def test_a_purge_lets_others_work(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """A huge queue is purged in batches while others push: leased and newer jobs stay, and no call waits for the whole purge."""
    depth = rounds(1_000_000, 30_000)
    _push(app, depth)
    manual, queue = ManualWorker(app), app.queue("default")
    held, newer, waits = manual.take(10), [], []
    with Conveyor(app.client.address.url) as other:
        task = _note(other)
        task.enqueue(-1)  # its connection is open; this one is purged with the others
        redis.config_resetstat()
        purging = threading.Thread(target=queue.purge, daemon=True)
        purging.start()
        until(lambda: len(queue) < depth - 10, 30)
        while purging.is_alive():
            began = perf_counter()
            newer.append(task.enqueue(-1).id)
            waits.append(perf_counter() - began)
        purging.join(60)
        assert not purging.is_alive()
    left = app.client.run(inspection.counts(app.client.keys("default")))
    batches = redis.info("commandstats")["cmdstat_evalsha"]["calls"] - len(newer)
    print(f"{depth} purged in {batches} calls; {len(waits)} pushes meanwhile, the slowest {1000 * max(waits):.1f} ms")
    assert batches >= (depth - 10) / 500
    assert len(waits) > 10
    assert (left.ready, left.leased) == (len(newer), 10)
    manual.plainly_done(*held)
    assert app.client.run(inspection.audit(app.client.keys("default"))) == []
    manual.leave()
    queue.purge()


@pytest.mark.row("D8")
async def test_jobs_that_fail_together_come_back_apart(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """When everything fails at once the retries are spread: no part of the time sees three times the mean."""
    jobs = rounds(100_000, 1000)

    @app.task(retry=Retry(attempts=3, backoff="1h"))
    async def fail(n: int) -> None:
        raise ValueError

    for first in range(0, jobs, 50_000):
        await app.aenqueue_many([fail.s(n) for n in range(first, min(first + 50_000, jobs))])
    from conveyor.worker.worker import Worker

    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    due = app.client.keys("default").due
    await auntil(lambda: redis.zcard(due) == jobs, 120)
    worker.stop()
    await asyncio.wait_for(running, 60)
    instants = [score for _, score in redis.zrange(due, 0, -1, withscores=True)]
    width = (max(instants) - min(instants) + 1) / 20
    parts = Counter(int((one - min(instants)) / width) for one in instants)
    print(f"{jobs} retries over {20 * width / 1000:.0f} s, the fullest twentieth has {max(parts.values())}")
    assert len(parts) == 20
    assert max(parts.values()) / (jobs / 20) < 3
    await asyncio.to_thread(app.queue("default").purge)
    await app.aclose()


@pytest.mark.row("D9")
async def test_a_herd_that_is_due_at_one_instant(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """Jobs that are due at the same instant are promoted some hundred at a time, in order, and others are served in between."""
    jobs, ran = rounds(100_000, 5000), list[int]()

    @app.task
    async def note(n: int) -> None:
        ran.append(n)

    for first in range(0, jobs, 50_000):
        await app.aenqueue_many([note.options(delay="1h").s(n) for n in range(first, min(first + 50_000, jobs))])
    keys = app.client.keys("default")
    now = int(redis.time()[0]) * 1000
    for first in range(0, jobs, 5000):
        redis.zadd(keys.due, dict.fromkeys(redis.zrange(keys.due, first, first + 4999), now))
    assert redis.zcount(keys.due, now, now) == jobs
    manual, promoted = await asyncio.to_thread(ManualWorker, app), []
    for _ in range(3):
        await asyncio.to_thread(manual.turn, 0)
        promoted.append(await asyncio.to_thread(redis.llen, keys.ready[0]))
    assert promoted == [200, 400, 600]
    await asyncio.to_thread(manual.leave)  # finishes nothing: it holds nothing
    waits, draining = [], asyncio.create_task(drain(app))
    while not draining.done():
        began = perf_counter()
        await asyncio.to_thread(redis.ping)
        waits.append(perf_counter() - began)
    await draining
    print(f"{jobs} due at once; {len(waits)} pings meanwhile, the slowest {1000 * max(waits):.1f} ms")
    assert Counter(ran) == Counter(range(jobs))
    assert await audit(app) == []
    await app.aclose()


@pytest.mark.row("D10", "I19")
async def test_results_that_nobody_fetches_go(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """Results are kept as long as they were asked for and no longer: then the keys are what they were before."""
    jobs = rounds(10_000, 300)

    @app.task(keep_result="1s")
    async def answer(n: int) -> str:
        return "x" * 100

    await drain(app)
    before = set(redis.scan_iter())
    handles = await app.aenqueue_many([answer.s(n) for n in range(jobs)])
    await drain(app)
    results = list(_results(redis))
    assert len(results) <= len(handles)
    await auntil(lambda: not list(_results(redis)), 30)
    after = {key for key in redis.scan_iter() if redis.ttl(key) == -1}
    assert after - before <= {b"conveyor:{default}:conf", b"conveyor:{default}:recent", b"conveyor:queues"}
    await app.aclose()


def _results(redis: redis_py.Redis) -> Iterator[bytes]:
    return redis.scan_iter(match="*:results:*", count=1000)
