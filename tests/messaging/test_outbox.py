"""Jobs that jobs spawn: they leave with the end of the job, exactly once, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis as redis_py

from conveyor import Context, Conveyor, Retry, current, ids
from conveyor.errors import ConfigurationError, PayloadError
from support.running_worker import drain, working
from support.spawned_jobs import settle
from support.waiting import auntil, until_status

ran: list[Any] = []


@pytest.fixture
async def family(url: str) -> AsyncIterator[Conveyor]:
    """An app whose jobs spawn jobs."""
    app = Conveyor(url)
    ran.clear()

    @app.task(name="family.follower", queue="two")
    async def follower(n: int) -> int:
        ran.append(n)
        return n

    @app.task(name="family.parent", retry=Retry(attempts=2, backoff="1ms"))
    async def parent(n: int, fail: int = 0, context: Context = current()) -> str:
        job = context.spawn(follower.s(n))
        if context.attempt <= fail:
            raise ValueError("after it has spawned")
        return job.id

    @app.task(name="family.thread")
    def thread(n: int) -> None:
        for i in range(n):
            current().spawn(follower.options(priority=i % 2).s(i))

    @app.task(name="family.stuck")
    async def stuck(context: Context = current()) -> None:
        context.spawn(follower.s(0))
        await asyncio.sleep(60)

    @app.task(name="family.early", ack="early")
    async def early() -> None:
        try:
            current().spawn(follower.s(0))
        except ConfigurationError as error:
            ran.append(error.code)

    yield app
    await app.aclose()


def queued(redis: redis_py.Redis, app: Conveyor, queue: str) -> list[str]:
    return [one.decode() for one in redis.lrange(app.client.keys(queue).ready[0], 0, -1)]


async def test_follower_leaves_with_the_success(family: Conveyor, redis: redis_py.Redis) -> None:
    """A spawned job runs after its parent ended well, under the id that `spawn` returned; the outbox is empty then."""
    job = await family.tasks["family.parent"].aenqueue(7)
    await drain(family)

    follower = family.tasks["family.follower"].job(await job.aresult(timeout=60))
    assert follower.queue == "two"
    assert await follower.aresult(timeout=60) == 7
    assert ran == [7]
    assert redis.exists(family.client.keys("default").outbox) == 0


async def test_nothing_leaves_an_attempt_without_success(family: Conveyor, redis: redis_py.Redis) -> None:
    """An attempt that fails, and one that is cancelled, spawns nothing; the attempt that succeeds spawns once."""
    parent, stuck = family.tasks["family.parent"], family.tasks["family.stuck"]
    async with working(family):
        await (await parent.aenqueue(1, fail=1)).aresult(timeout=60)
        dead = await parent.aenqueue(2, fail=9)
        gone = await stuck.aenqueue()
        await until_status(gone, "leased")
        await gone.acancel()
        for job in (dead, gone):
            await until_status(job, "dead", "cancelled")
        await auntil(lambda: ran == [1])
    await drain(family)
    assert ran == [1]
    await asyncio.to_thread(family.queue("default").purge, dead=True)


async def test_a_job_to_come_is_waited_for(family: Conveyor) -> None:
    """Before its parent ends a spawned job is `waiting`, and its result can be awaited; once it has ended it is done for good."""
    coming: list[Any] = []

    @family.task
    async def slow(context: Context = current()) -> None:
        coming.append(context.spawn(family.tasks["family.follower"].s(3)))
        await auntil(lambda: len(coming) == 2)

    await slow.aenqueue()
    async with working(family):
        await auntil(lambda: coming)
        job = coming[0]
        assert await job.astatus() == "waiting"
        with pytest.raises(TimeoutError):
            await job.aresult(timeout=0)
        waiting = asyncio.create_task(job.aresult(timeout=60))
        two = family.client.keys("two")
        await auntil(lambda: family.client.aexecute("HEXISTS", two.waiters, job.id.split(":")[1], key=two.jobs))
        coming.append(None)
        assert await waiting == 3
        assert await family.tasks["family.follower"].job(job.id).astatus() == "done"
    await family.client.aexecute("DEL", two.result(job.id.split(":")[1]), key=two.jobs)
    assert await job.astatus() == "done"


def test_ids_of_spawned_jobs_are_known_by_their_form() -> None:
    """They are generated ids in every respect, and no other generated id is taken for one of them."""
    spawned = [ids.new_spawned_id() for _ in range(300)]
    assert all(ids.is_spawned(one) and ids.is_generated(one) and ids.may_arrive_later(one) for one in spawned)
    assert not any(ids.is_spawned(one) for one in [*ids.new_ids(300), *(ids.new_id() for _ in range(300)), "own"])
    assert len(set(spawned)) == 300
    assert not ids.may_arrive_later("0" * 21 + "1")


async def test_many_keep_their_order(family: Conveyor) -> None:
    """Jobs spawned by a thread arrive in the order they were spawned, with their options, in any number of batches."""
    await family.tasks["family.thread"].aenqueue(450)
    await drain(family, concurrency=1)

    assert ran == [*range(1, 450, 2), *range(0, 450, 2)]


async def test_limits_of_spawning(family: Conveyor) -> None:
    """More than a thousand are refused, so are arguments that do not fit, and a job that is acknowledged before it runs."""
    follower: Any = family.tasks["family.follower"]
    context = Context(job_id="x:1", task="t", queue="x", attempt=1, headers={}, state={}, deadline_hook=None)
    with pytest.raises(PayloadError):
        context.spawn(follower.s("no number"))
    for n in range(1000):
        context.spawn(follower.s(n))
    with pytest.raises(ConfigurationError, match=r"1,000") as caught:
        context.spawn(follower.s(0))
    assert caught.value.code == "E44"

    await family.tasks["family.early"].aenqueue()
    await drain(family)
    assert ran == ["E44"]


async def test_leftovers_are_found(family: Conveyor) -> None:
    """Followers of a worker that died between settling and delivering are delivered by the next worker of that queue."""
    await asyncio.to_thread(settle, family, [("two", n) for n in range(3)])
    async with working(family, queues={"default": 1, "two": 1}):
        await auntil(lambda: ran == [0, 1, 2])
