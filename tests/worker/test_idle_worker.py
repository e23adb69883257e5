"""A worker with nothing to do: it blocks, and hears of a job at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import hiredis
import pytest

from conveyor.jobs.app import Conveyor
from support.running_worker import drain, until, working
from support.time_limits import AT_ONCE


@pytest.fixture
async def app(url: str) -> Any:
    """An app on the emptied server."""
    app = Conveyor(url)
    yield app
    await app.aclose()


async def test_an_idle_worker_is_woken_at_once(app: Conveyor) -> None:
    """A job pushed to an idle worker starts without waiting for any clock."""

    @app.task
    async def when() -> float:
        return time.monotonic()

    async with working(app) as worker:
        for _ in range(5):
            await until(lambda: worker.connections.blocked and not worker.consumers[0].busy)
            start = time.monotonic()
            job = await when.aenqueue()
            assert await job.aresult(timeout=5) - start < AT_ONCE


@pytest.mark.row("D27")
@pytest.mark.parametrize("queues", [1, 4])
async def test_nothing_stands_between_a_token_and_its_job(
    app: Conveyor, queues: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn that follows a token was made while the worker waited, and its job starts before the worker waits again."""
    waits: list[int] = []

    async def count() -> None:
        waits.append(worker.connections.blocked)

    tasks = [app.task(name=f"count{n}", queue=f"q{n}")(count) for n in range(queues)]
    async with working(app) as worker:
        consumers = worker.consumers

        async def settled() -> int:
            await until(lambda: not any(one.busy or one.has_more for one in consumers))
            await asyncio.sleep(0.15)  # the listener blocks, after a tenth of a second at the latest
            return worker.connections.blocked

        blocked = await settled()
        sent: list[tuple[Any, bytes | None]] = []
        for consumer in consumers:
            send = consumer.connection.send

            def sending(command: Any, answer: Any, _send: Any = send, **options: Any) -> None:
                sent.append((command, options.get("packed")))
                _send(command, answer, **options)

            monkeypatch.setattr(consumer.connection, "send", sending)
            waits.clear()
            await tasks[consumers.index(consumer)].aenqueue()
            await until(lambda: waits)
            command, packed = next(one for one in sent if consumer.keys.jobs in one[0])
            assert packed == hiredis.pack_command(command)
            assert waits[-1] == blocked
            blocked = await settled()
            monkeypatch.undo()
            sent.clear()


@pytest.mark.standalone_only("counts every command the server gets, those of a replica and of sentinels too")
@pytest.mark.parametrize("queues", [1, 4])
async def test_an_idle_worker_sends_next_to_nothing(app: Conveyor, redis: Any, queues: int) -> None:
    """An idle worker blocks, also when it has worked: in two seconds it sends at most two commands for each of its queues."""

    async def nothing() -> None: ...

    tasks = [app.task(name=f"nothing{n}", queue=f"q{n}")(nothing) for n in range(queues)]
    async with working(app) as worker:
        for task in tasks:
            await (await task.aenqueue()).aresult(timeout=20)
        await until(lambda: worker.connections.blocked)
        await asyncio.sleep(0.1)  # let the first turns pass
        before = redis.info("stats")["total_commands_processed"]
        await asyncio.sleep(2)  # the law is about time that passes
        sent = redis.info("stats")["total_commands_processed"] - before - 1

    assert sent <= 2 * queues


async def test_a_burst_ends_when_no_queue_has_work(app: Conveyor) -> None:
    """A job that the last job of a burst enqueues in a queue found empty before is run as well, each of 30 times."""
    ran: list[int] = []

    @app.task(queue="other")
    async def follower(n: int) -> None:
        ran.append(n)

    @app.task
    async def leader(n: int) -> None:
        await follower.aenqueue(n)

    for n in range(30):
        await leader.aenqueue(n)
        await drain(app)
        assert ran == list(range(n + 1))
