"""A worker on a plain list: raw entries run as jobs of a task."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context, current
from conveyor.messaging.retry import Retry
from conveyor.worker.worker import Worker
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import drain, working
from support.waiting import auntil


async def test_raw_entries_run_as_jobs(app: Conveyor, redis: Any) -> None:
    """Members of a document are arguments by name; a document that fits none is the one argument of a task with one."""
    seen: list[Any] = []

    @app.task
    async def by_name(id: int, kind: str = "none") -> None:  # noqa: A002
        seen.append((id, kind))

    @app.task
    async def whole(document: Any) -> None:
        seen.append(document)

    app.plain_list("raw", task=by_name)
    app.plain_list("whole", task=whole)
    redis.script_flush()  # a server that does not know the script yet ends no burst early
    redis.rpush("raw", '{"id": 1}', '{"id": 2, "kind": "x"}')
    redis.rpush("whole", '{"a": [1]}', "[1, 2]", "7")
    await drain(app, concurrency=1)

    assert sorted(map(repr, seen)) == sorted(map(repr, [(1, "none"), (2, "x"), {"a": [1]}, [1, 2], 7]))


@pytest.mark.usefixtures("only_when_woken")
async def test_an_entry_wakes_an_idle_worker(app: Conveyor, redis: Any) -> None:
    """A raw push to an idle worker runs at once, is retried like any job, and none is lost."""
    seen: list[tuple[int, int]] = []

    @app.task(retry=Retry(attempts=3, backoff="5ms"))
    async def flaky(n: int, context: Context = current()) -> None:
        seen.append((n, context.attempt))
        if context.attempt == 1:
            raise ValueError(n)

    app.plain_list("raw", task=flaky)
    async with working(app, queues={"raw": 1.0}) as worker:
        await auntil(lambda: worker.connections.blocked)
        for n in range(3):
            redis.rpush("raw", f'{{"n": {n}}}')
            await auntil(lambda n=n: (n, 2) in seen)
    assert redis.llen("raw") == 0


@pytest.mark.leaves_keys("a dead letter stays")
async def test_an_entry_that_is_no_json_is_a_dead_letter(app: Conveyor, redis: Any) -> None:
    """Bytes that are not JSON are kept as they are, and the next entries run."""
    seen: list[int] = []

    @app.task(retry=1)
    async def one(n: int) -> None:
        seen.append(n)

    listed = app.plain_list("raw", task=one)
    redis.rpush("raw", b"\xff{nonsense", '{"n": 1}')
    await drain(app)

    assert seen == [1]
    dead = await asyncio.to_thread(lambda: list(listed.dead_letters()))
    assert [letter.payload for letter in dead] == [b"\xff{nonsense"]


async def test_a_list_without_a_task_is_refused(app: Conveyor) -> None:
    """A worker told to serve a list that feeds no task says so at once."""
    app.plain_list("raw")

    @app.task
    async def other() -> None: ...

    assert Worker(app).queues == ("default",)
    with pytest.raises(ConfigurationError, match="feeds no task"):
        Worker(app, queues={"raw": 1.0})
