"""The stop of a worker, and its acks: running jobs are neither cut off nor run twice without need."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from time import perf_counter
from typing import Any

import pytest

from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context, current
from conveyor.worker.execution import threads
from conveyor.worker.leasing.capacity import Capacity
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.worker import Worker
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import counts, drain, working
from support.waiting import auntil
from testbed.server_process import Server


@pytest.mark.row("A10")
@pytest.mark.parametrize("kind", ["loop", "thread"])
async def test_a_stop_amid_a_lease_starts_nothing(app: Conveyor, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Jobs that a turn brings after the stop go back in order and unseen: started, they would be cut off and run again."""
    seen: list[tuple[int, int]] = []

    @app.task(name="loop")
    async def on_the_loop(n: int, context: Context = current()) -> None:
        seen.append((n, context.attempt))
        await asyncio.sleep(0.01)

    @app.task(name="thread")
    def on_a_thread(n: int, context: Context = current()) -> None:
        seen.append((n, context.attempt))
        time.sleep(0.01)

    start = QueueConsumer._send_turn

    def started_and_stopped(consumer: QueueConsumer, want: int) -> None:
        start(consumer, want)
        if want:
            worker.stop()

    await app.aenqueue_many(app.tasks[kind].s(n) for n in range(10))
    worker = Worker(app, concurrency=3, grace=10)
    with monkeypatch.context() as patch:
        patch.setattr(QueueConsumer, "_send_turn", started_and_stopped)
        await asyncio.wait_for(worker.run(), 60)
    assert seen == []
    found = await counts(app)
    assert (found.ready, found.leased, found.workers) == (10, 0, 0)
    await drain(app, concurrency=1, threads=1)

    assert seen == [(n, 1) for n in range(10)]


@pytest.mark.row("A10")
@pytest.mark.parametrize("stop", ["hand_back", "cancel"])
async def test_a_thread_and_the_loop_claim_a_job_once(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """
    A function that a thread starts just when the loop hands it back or cancels it runs once, and has one outcome.

    The loop acts while the thread reads the clock, which is the first thing that it does once the job is its own.
    """
    ran: list[tuple[int, int]] = []
    claimed, acted = threading.Event(), threading.Event()

    @app.task
    def count(n: int, context: Context = current()) -> int:
        ran.append((n, context.attempt))
        return n

    def clock() -> float:
        if not claimed.is_set():
            claimed.set()
            assert acted.wait(10)
        return perf_counter()

    monkeypatch.setattr(threads, "perf_counter", clock)
    job = await count.aenqueue(1)
    async with working(app) as worker:
        await auntil(claimed.is_set)
        [consumer] = worker.consumers
        [attempt] = consumer.held.values()
        if stop == "cancel":
            worker.executor.stop(attempt, "cancel")
        else:
            consumer.hand_back()
        report = list(consumer.report.others)
        acted.set()
        await auntil(lambda: attempt.ended)

    assert report == []
    assert await job.aresult(timeout=60) == 1
    await drain(app)
    assert ran == [(1, 1)]


async def test_leaving_the_block_after_a_stop_does_not_hurry(app: Conveyor) -> None:
    """A worker inside a program that was stopped, and whose block then ends, still gives what runs its grace."""
    started, ended = asyncio.Event(), []

    @app.task
    async def slow() -> None:
        started.set()
        await asyncio.sleep(0.2)
        ended.append(1)

    await slow.aenqueue()
    async with app.worker(grace=10) as worker:
        await asyncio.wait_for(started.wait(), 60)
        worker.stop()

    assert ended == [1]
    assert (await counts(app)).ready == 0


@pytest.mark.row("A141")
@pytest.mark.leaves_keys("the job that no worker took stays")
@pytest.mark.parametrize("moment", ["lifespan", "registration", "first lease", "twice"])
async def test_a_start_that_is_cancelled_leaves_no_worker(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """`async with app.worker()` that is cancelled while it starts leaves no task, no registration and no thread behind."""
    reached, ran = asyncio.Event(), []

    @app.task
    async def note() -> None:
        ran.append(1)

    async def stay() -> None:
        reached.set()
        await asyncio.sleep(60)

    @app.lifespan
    async def resource() -> AsyncIterator[None]:
        if moment in {"lifespan", "twice"}:
            try:
                await stay()
            finally:
                if moment == "twice":
                    await asyncio.sleep(0.05)
        yield

    if moment == "registration":

        async def wait(consumer: QueueConsumer) -> None:
            await register(consumer)
            await stay()

        register = QueueConsumer.register
        monkeypatch.setattr(QueueConsumer, "register", wait)
    if moment == "first lease":
        monkeypatch.setattr(QueueConsumer, "begin", lambda *_: reached.set())

    async def enter() -> None:
        async with app.worker():
            await asyncio.sleep(60)

    await note.aenqueue()
    before, threads_before = asyncio.all_tasks(), threading.active_count()
    entering = asyncio.create_task(enter())
    await asyncio.wait_for(reached.wait(), 60)
    for _ in range(2 if moment == "twice" else 1):
        entering.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(entering, 60)

    await auntil(lambda: asyncio.all_tasks() <= before)
    await auntil(lambda: threading.active_count() <= threads_before)
    found = await counts(app)
    assert (found.ready, found.leased, found.workers) == (1, 0, 0)
    assert ran == []


@pytest.mark.row("A141")
async def test_a_time_limit_around_a_start_without_redis(start_server: Callable[..., Server]) -> None:
    """A start that waits for Redis ends with the time limit around it, and does not begin when Redis comes back."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    app, ran = Conveyor(server.url), []
    app.client.retry_for = 0.05  # no longer for the eviction policy, which is asked for first

    @app.task
    async def note() -> None:
        ran.append(1)

    await note.aenqueue()
    before = asyncio.all_tasks()
    server.kill()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), app.worker():
            pass
    left = asyncio.all_tasks() - before
    server.start()
    app.client.retry_for = 10.0

    assert {task.get_name() for task in left if "conveyor-worker" in task.get_name()} == set()
    found = await counts(app)
    assert (found.ready, found.leased, found.workers) == (1, 0, 0)
    assert ran == []
    await drain(app)
    assert ran == [1]
    await app.aclose()


@pytest.mark.standalone_only("MONITOR shows one server")
async def test_a_late_ack_and_the_result_are_one_step(app: Conveyor, redis: Any) -> None:
    """The script that takes a job off stores its result, too: there is no moment between the two, for anybody."""

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    job = await double.aenqueue(4)
    id_, keys = job.id.rpartition(":")[2], app.client.keys("default")
    steps: list[list[str]] = [[]]
    with redis.monitor() as monitor:
        await drain(app)
        redis.ping()
        while (seen := await asyncio.to_thread(monitor.next_command))["command"] != "PING":
            if seen["client_type"] != "lua":
                steps.append([])
            steps[-1].append(seen["command"])
    [taken] = [step for step in steps if f"HDEL {keys.jobs} {id_}" in step]

    assert any(command.startswith(f"HSET {keys.result_window(id_)} {id_} ") for command in taken)
    assert await job.aresult(timeout=60) == 8


@pytest.mark.parametrize("kind", ["loop", "thread"])
@pytest.mark.parametrize("end", ["burst", "stop"])
async def test_an_early_ack_is_not_cut_off(app: Conveyor, monkeypatch: pytest.MonkeyPatch, kind: str, end: str) -> None:
    """A job that Redis knows no more is waited for at the end of a burst, and has its grace at a stop, begun or not."""
    started, go_on = asyncio.Event(), threading.Event()
    loop, ended = asyncio.get_running_loop(), []

    @app.task(name="async", ack="early")
    async def waits() -> None:
        started.set()
        while not go_on.is_set():
            await asyncio.sleep(0.005)
        ended.append(1)

    @app.task(name="plain", ack="early")
    def blocks() -> None:
        loop.call_soon_threadsafe(started.set)
        go_on.wait()
        ended.append(1)

    monkeypatch.setattr(Capacity, "ahead", lambda *_: 10)  # so that it takes more than it can start
    task = waits if kind == "loop" else blocks
    await app.aenqueue_many(task.s() for _ in range(5))
    worker = Worker(app, burst=end == "burst", concurrency=2, threads=2, grace=20)
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(started.wait(), 60)
    await auntil(lambda: sum(len(one.early_acks.acknowledged) for one in worker.consumers) == 5)
    if end == "stop":
        worker.stop()
    go_on.set()
    await asyncio.wait_for(running, 60)

    assert len(ended) == 5
    assert (await counts(app)).ready == 0
