"""A worker with nothing to do: it blocks, and hears of a job at once."""

from __future__ import annotations

import asyncio
import math
from time import monotonic
from typing import Any

import hiredis
import pytest

from conveyor.jobs.app import Conveyor
from conveyor.store.operations import TurnReport
from conveyor.worker import usage
from conveyor.worker.leasing import wakeup
from conveyor.worker.worker import Worker
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import drain, working
from support.time_limits import LATER, PATIENCE
from support.waiting import auntil


@pytest.mark.usefixtures("only_when_woken")
async def test_an_idle_worker_is_woken_at_once(app: Conveyor) -> None:
    """A job pushed to an idle worker starts without waiting for any clock."""

    @app.task
    async def echo(n: int) -> int:
        return n

    async with working(app) as worker:
        for n in range(5):
            await auntil(lambda: worker.connections.blocked and not worker.consumers[0].busy)
            job = await echo.aenqueue(n)
            assert await job.aresult(timeout=PATIENCE) == n


def _waits_prepared(worker: Worker) -> bool:
    """Tell whether a worker waits for every queue, with the turn that a token leads to made for each."""
    return all(
        not (one.busy or one.has_more)
        and one.wake_list in (worker.connections._listeners[one]._listening or ())
        and one._prepared is not None
        and one._prepared.fits(one.identity, one._capacity.room(one), TurnReport())
        for one in worker.consumers
    )


@pytest.mark.row("D27")
@pytest.mark.usefixtures("only_when_woken")
@pytest.mark.parametrize("queues", [1, 4])
async def test_nothing_stands_between_a_token_and_its_job(
    app: Conveyor, queues: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn that follows a token was made while the worker waited, and its job starts before the worker waits again."""
    monkeypatch.setattr(wakeup, "BUSY", LATER)  # a worker that works for so long waits beside its work
    waits: list[int] = []

    async def count() -> None:
        waits.append(worker.connections.blocked)

    tasks = [app.task(name=f"count{n}", queue=f"q{n}")(count) for n in range(queues)]
    async with working(app) as worker:
        sent: list[tuple[Any, bytes | None]] = []
        for consumer in worker.consumers:
            await auntil(lambda: _waits_prepared(worker))
            blocked = worker.connections.blocked
            # A turn that looks for dead workers says so, and is made when it is sent.
            consumer._reaper.due_at = math.inf
            send = consumer.connection.send

            def sending(command: Any, answer: Any, _send: Any = send, **options: Any) -> None:
                sent.append((command, options.get("packed")))
                _send(command, answer, **options)

            with monkeypatch.context() as patch:
                patch.setattr(consumer.connection, "send", sending)
                await tasks[worker.consumers.index(consumer)].aenqueue()
                await auntil(lambda: waits)
            command, packed = next(one for one in sent if consumer.keys.jobs in one[0])
            assert packed == hiredis.pack_command(command)
            assert waits == [blocked]
            waits.clear()
            sent.clear()


async def test_a_turn_is_made_for_an_idle_worker(app: Conveyor) -> None:
    """The turn that a token leads to fits an idle worker, though another queue worked while it was made."""
    gate, begun = asyncio.Event(), asyncio.Event()

    @app.task(queue="busy")
    async def hold() -> None:
        begun.set()
        await gate.wait()

    @app.task(queue="quick")
    async def nothing() -> None: ...

    async with working(app) as worker:
        await hold.aenqueue()
        await asyncio.wait_for(begun.wait(), 60)
        await (await nothing.aenqueue()).aresult(timeout=PATIENCE)
        gate.set()
        await auntil(lambda: _waits_prepared(worker))


@pytest.mark.standalone_only("a cluster has a blocking call for each slot")
@pytest.mark.parametrize("queues", [1, 4])
async def test_an_idle_worker_sends_next_to_nothing(
    app: Conveyor, redis: Any, queues: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    An idle worker blocks, also when it has worked: it sends idle turns alone, each for all queues, at most one in half a pause.

    It goes on to measure its memory and processor use meanwhile, and tells nothing that has not changed.
    """
    monkeypatch.setattr(wakeup, "BLOCK", LATER)  # a call that ends is made again
    monkeypatch.setattr(usage, "WINDOW", 0.1)
    monkeypatch.setattr(usage, "LEAST_LAG", math.inf)  # what a busy machine has a worker tell
    looks: list[int] = []

    def steady(self: usage.ProcessUsage) -> tuple[int, dict[int | str, float]]:
        looks.append(1)
        return 2**26, {"self": 1.0}

    monkeypatch.setattr(usage.ProcessUsage, "_measure", steady)
    sent: list[str] = []

    async def nothing() -> None: ...

    tasks = [app.task(name=f"nothing{n}", queue=f"q{n}")(nothing) for n in range(queues)]
    async with working(app) as worker:
        [endpoint] = worker.connections._by_endpoint.values()
        [listener] = endpoint.listeners
        for task in tasks:
            await (await task.aenqueue()).aresult(timeout=PATIENCE)
        # A job that a turn leased by itself has left its token: the worker waits, and is about to take it. When the server
        # says that it waits, it has taken all.
        await auntil(lambda: _waits_prepared(worker) and redis.info("clients")["blocked_clients"] == 1)
        for connection in (endpoint.connection, listener._connection):

            def sending(command: Any, answer: Any, _send: Any = connection.send, **options: Any) -> None:
                sent.append(command[0])
                _send(command, answer, **options)

            monkeypatch.setattr(connection, "send", sending)
        began, turns = monotonic(), endpoint.idle_turns._count
        looks.clear()
        await asyncio.sleep(2)  # the law is about time that passes
        turns = endpoint.idle_turns._count - turns
        commands = [name for name in sent if name != "EVAL"]  # which loads the script where the server has lost it
        passed = monotonic() - began

    assert commands == ["EVALSHA"] * turns
    assert turns <= passed / (worker.consumers[0].pause / 2) + 1
    assert len(looks) > 1


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
