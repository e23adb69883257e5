"""From end to end, on whatever place the suite runs on: `--on cluster -m smoke` and the like."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conveyor import Context, Conveyor, JobFailed, Retry, current
from conveyor.admin.admin import Admin
from conveyor.ids import new_id
from conveyor.payload.records import write_envelope
from conveyor.store.operations import Entry
from support.running_worker import audit, drain, working
from support.waiting import auntil, until_status

pytestmark = pytest.mark.smoke
HERE = Path(__file__).parent
QUEUES = ("default", "left", "right")  # in three slots, on different nodes of a cluster


@pytest.fixture
async def shop(url: str) -> AsyncIterator[Conveyor]:
    """An app with a task of each kind; whatever a test did, its queues are in order and empty at the end."""
    app = Conveyor(url)

    @app.task(name="shop.add", queue="left")
    async def add(a: int, b: int) -> int:
        return a + b

    @app.task(name="shop.fail", queue="right", retry=Retry(attempts=2, backoff="5ms"))
    def fail(until_attempt: int) -> str:
        if current().attempt < until_attempt:
            raise ValueError("not yet")
        return "at last"

    @app.task(name="shop.long")
    async def long() -> None:
        await asyncio.sleep(60)

    @app.task(name="shop.spawn")
    async def spawn(n: int, context: Context = current()) -> list[str]:
        return [context.spawn(add.s(i, i)).id for i in range(n)]

    yield app
    for queue in QUEUES:
        assert await audit(app, queue) == []
        await asyncio.to_thread(app.queue(queue).purge)
    await app.aclose()


@pytest.fixture
def alone(url: str) -> Iterator[Conveyor]:
    """An app without tasks, for blocking calls."""
    with Conveyor(url) as app:
        yield app


def test_messages(alone: Conveyor) -> None:
    """Messages come in their order, priorities first; one that fails comes again, and then is dead and can be redriven."""
    orders = alone.queue("orders", max_attempts=1)
    orders.push_many(range(200))
    orders.push("first", priority=5)
    seen: list[Any] = []
    with closing(orders.consume(prefetch=20)) as messages:
        for message in messages:
            with message as body:
                seen.append(body)
                if body == 7 and message.attempt == 1 and seen.count(7) == 1:
                    raise ValueError("once")
            if len(seen) == 201:
                break
    assert seen == ["first", *range(200)]
    assert [letter.error for letter in orders.dead_letters()] == ["ValueError: once"]
    assert orders.redrive() == 1
    (again,) = orders.pull(wait="60s")
    assert again.body == 7
    again.ack()
    assert (len(orders), orders.stats().dead) == (0, 0)


def test_plain_list(alone: Conveyor, redis: Any) -> None:
    """Entries that another program pushes on a plain list are consumed under leases, and the other way round."""
    tasks = alone.plain_list("my_task_queue")
    redis.rpush("my_task_queue", '{"id": 1}', '{"id": 2}')
    with closing(tasks.consume()) as messages:
        for message, n in zip(messages, (1, 2), strict=False):
            with message as body:
                assert body == {"id": n}
            if n == 2:
                break
    tasks.push({"id": 3})
    assert redis.blpop("my_task_queue", timeout=5)[1] == b'{"id":3}'


async def test_results(shop: Conveyor) -> None:
    """Jobs of three queues run in one worker, their results arrive by push, and bulk keeps its order."""
    add, fail = shop.tasks["shop.add"], shop.tasks["shop.fail"]
    async with working(shop):
        jobs = await shop.aenqueue_many([add.s(n, n) for n in range(300)])
        slow = await fail.aenqueue(2)
        assert [await job.aresult(timeout=60) for job in jobs] == [2 * n for n in range(300)]
        assert await slow.aresult(timeout=60) == "at last"


async def test_dead_jobs_come_back(shop: Conveyor) -> None:
    """A job that fails for good is a dead letter with its error; redriven it runs with a fresh budget."""
    job = await shop.tasks["shop.fail"].aenqueue(3)
    async with working(shop):
        with pytest.raises(JobFailed, match="not yet"):
            await job.aresult(timeout=60)
        assert await job.astatus() == "dead"
        await asyncio.to_thread(Admin(shop.client).redrive, "right")
        assert await job.aresult(timeout=60) == "at last"


async def test_delays_and_unique_ids(shop: Conveyor) -> None:
    """A delayed job runs when it is due, once, however often it is enqueued."""
    add = shop.tasks["shop.add"].options(delay="100ms", id="one")
    first, second = await add.aenqueue(1, 2), await add.aenqueue(3, 4)
    assert (second.id, second.duplicate, await first.astatus()) == (first.id, True, "scheduled")
    async with working(shop):
        assert await shop.job("one").aresult(timeout=60) == 3


async def test_cancelling(shop: Conveyor) -> None:
    """A waiting job that is cancelled never starts, and a running one is stopped."""
    waiting, running = await shop.tasks["shop.add"].aenqueue(1, 1), await shop.tasks["shop.long"].aenqueue()
    assert await waiting.acancel()
    async with working(shop):
        await until_status(running, "leased")
        assert await running.acancel()
        assert await until_status(running, "cancelled", "done", "dead", "scheduled", "ready") == "cancelled"
    assert await waiting.astatus() == "cancelled"


async def test_spawned_jobs_cross_slots(shop: Conveyor) -> None:
    """Jobs that a job spawns into another slot arrive once each."""
    parent = await shop.tasks["shop.spawn"].aenqueue(150)
    await drain(shop)
    ids = await parent.aresult(timeout=60)
    add = shop.tasks["shop.add"]
    assert [await add.job(id_).aresult(timeout=60) for id_ in ids] == [2 * n for n in range(150)]


async def test_dead_workers_are_found(shop: Conveyor, redis: Any) -> None:
    """Jobs of a worker that is gone without a word come back to another one when its lease has ended."""
    from support.manual_worker import ManualWorker

    job = await shop.tasks["shop.add"].aenqueue(20, 22)
    manual = await asyncio.to_thread(ManualWorker, shop, "left")
    assert await asyncio.to_thread(manual.take, 1)
    redis.zadd(manual.keys.workers, {manual.worker: 1000})  # as if its lease had ended long ago
    shop.lease_ms = 600
    async with working(shop):
        assert await job.aresult(timeout=60) == 42
        await auntil(lambda: redis.zscore(manual.keys.workers, manual.worker) is None)


def test_supervised_worker_and_admin(url: str, tmp_path: Path) -> None:
    """`conveyor worker --burst` drains two queues on two nodes, `status` and `doctor` answer, and nothing is left."""
    log = tmp_path / "log"
    environment = {**os.environ, "CONVEYOR_URL": url, "FAMILY_LOG": str(log), "PYTHONPATH": os.pathsep.join(sys.path)}

    def conveyor(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "conveyor", *words]
        return subprocess.run(
            command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    with Conveyor(url, namespace="family") as app:
        app.client.push(
            app.client.keys("parents"), [Entry(new_id(), write_envelope("support.spawning_app.parent", b'{"n":1}'))]
        )
        assert [(one.name, one.ready) for one in Admin(app.client).queues()] == [("parents", 1)]
        done = conveyor("worker", "support.spawning_app:app", "--burst")
        assert (done.returncode, log.read_text().split()[0]) == (0, "1"), done.stderr
        assert [(one.name, one.ready, one.leased) for one in Admin(app.client).queues()] == [
            ("followers", 0, 0),
            ("parents", 0, 0),
        ]
    status = conveyor("status", "--namespace", "family")
    assert status.returncode in {0, 8}, status.stderr
    assert "followers" in status.stdout
