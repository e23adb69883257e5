"""Tags: jobs and messages are found, counted, cancelled and put back by them, and no tag outlives its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
import redis as redis_py

from conveyor import current
from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from support.running_worker import drain


@pytest.fixture
async def loop_app(url: str) -> AsyncIterator[Conveyor]:
    """An app on the emptied server, closed in the loop of its test."""
    app = Conveyor(url)
    yield app
    await app.aclose()


def tag_keys(redis: redis_py.Redis) -> dict[str, list[str]]:
    """Return each tag that has a key, and the ids in it."""
    keys: Iterable[bytes] = redis.keys("*:tag:*")
    return {key.decode().partition(":tag:")[2]: [id_.decode() for id_ in redis.zrange(key, 0, -1)] for key in keys}


async def seen(app: Conveyor, **options: Any) -> set[str]:
    return {job.id async for job in app.ajobs(**options)}


async def test_tags_reach_the_job_and_end_with_it(loop_app: Conveyor, redis: redis_py.Redis) -> None:
    """Tags of the task and of the call reach the job, are shown as long as it is known, and their keys end with the job."""
    app, met = loop_app, []

    @app.task(tags=["mail"])
    async def send(user: int) -> int:
        met.append(list(current().tags))
        return user

    job = await send.options(tags=["order:4711", "mail", "grüße"]).aenqueue(7)
    assert (await job.ainfo()).tags == ("mail", "order:4711", "grüße")
    assert tag_keys(redis) == {key: [job.id.partition(":")[2]] for key in ("mail", "order:4711", "grüße")}

    await drain(app)

    assert met == [["mail", "order:4711", "grüße"]]
    assert (await job.ainfo()).tags == ("mail", "order:4711", "grüße")
    assert tag_keys(redis) == {}


def test_messages_have_tags(app: Conveyor, redis: redis_py.Redis) -> None:
    """A message brings its tags, alone or pushed with many, and they end when it is acknowledged or purged."""
    orders = app.queue("orders", int)
    first = orders.push(1, tags=["a"])
    orders.push_many([2, 3], tags=["a", "b"])
    [message] = orders.pull()
    assert (message.id, message.tags) == (first, ["a"])
    message.ack()
    assert {tag: len(ids) for tag, ids in tag_keys(redis).items()} == {"a": 2, "b": 2}
    assert app.count_jobs(tag="a") == 2
    assert orders.purge() == 2
    assert tag_keys(redis) == {}


@pytest.mark.parametrize(
    "tags", ["order:1", ["a\tb"], ["a\n"], [""], ["x" * 201], [f"t{n}" for n in range(17)], [4711], 5, ["\ud800"]]
)
def test_bad_tags_are_refused_before_anything_is_stored(app: Conveyor, redis: redis_py.Redis, tags: Any) -> None:
    """A text alone, control characters, an empty or a long tag, too many, and what is no text raise; nothing is stored."""

    @app.task
    def send() -> None: ...

    for refused in (
        lambda: send.options(tags=tags).enqueue(),
        lambda: app.enqueue_many([send.options(tags=tags).s()]),
        lambda: app.queue("orders").push(1, tags=tags),
        lambda: app.queue("orders").push_many([1], tags=tags),
        lambda: app.task(tags=tags),
    ):
        with pytest.raises(ConfigurationError, match="tag"):
            refused()
    assert redis.keys() == []


@pytest.mark.leaves_keys("a dead letter stays")
async def test_dead_letters_keep_their_tags(loop_app: Conveyor, redis: redis_py.Redis) -> None:
    """A dead letter is found by its tags, also when it was put back and died again, until it is deleted."""
    app = loop_app

    @app.task(retry=1)
    async def fail() -> None:
        raise ValueError("no account")

    job = await fail.options(tags=["order:1"]).aenqueue()
    await drain(app)
    assert await seen(app, tag="order:1", state="dead") == {job.id}
    assert await app.aredrive("default", tag="order:1") == 1
    assert await seen(app, tag="order:1", state="ready") == {job.id}
    await drain(app)
    assert await app.acount_jobs(tag="order:1", error="No ACCOUNT") == 1
    await asyncio.to_thread(app.queue("default").purge, True)
    assert await app.acount_jobs(tag="order:1") == 0
    assert tag_keys(redis) == {}
