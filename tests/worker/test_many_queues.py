"""A worker of many queues: what a job, and a queue with nothing to do, cost."""

from __future__ import annotations

import asyncio
import sys
from time import monotonic
from typing import Any

import pytest

from conveyor.jobs.app import Conveyor
from conveyor.worker.leasing import queue_consumer, wakeup
from conveyor.worker.leasing.wakeup import MOST_QUEUES
from conveyor.worker.worker import Worker
from support.running_worker import working
from support.time_limits import LATER, PATIENCE
from support.waiting import auntil


async def nothing() -> None:
    """Do nothing."""


def _tasks(app: Conveyor, queues: int) -> list[Any]:
    return [app.task(name=f"nothing{n}", queue=f"q{n}")(nothing) for n in range(queues)]


def _commands(redis: Any) -> dict[str, int]:
    return {name: int(found["calls"]) for name, found in redis.info("commandstats").items()}


async def _cost_of_a_job(
    url: str, redis: Any, queues: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float, float]:
    """Return the function calls in this process, the turns and the blocking calls that a job costs: pushed, run and awaited."""
    app, jobs, calls, turns = Conveyor(url), 40, 0, 0
    send_turn = queue_consumer.QueueConsumer._send_turn

    def send_counted(consumer: queue_consumer.QueueConsumer, want: int) -> None:
        nonlocal turns
        last = consumer.number
        send_turn(consumer, want)
        turns += consumer.number > last

    monkeypatch.setattr(queue_consumer.QueueConsumer, "_send_turn", send_counted)
    tasks = _tasks(app, queues)

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    async with working(app) as worker:

        def waits() -> tuple[int, int]:
            return turns, worker.connections.blocked

        for task in tasks:
            await (await task.aenqueue()).aresult(timeout=60)
        await auntil(lambda: not any(one.busy or one.has_more for one in worker.consumers))
        # Where a turn leased a job by itself, the token of it still leads to another.
        waiting = -(-queues // MOST_QUEUES)
        await auntil(lambda: redis.info("clients")["blocked_clients"] == waiting)
        await auntil(lambda: not any(one.busy or one.has_more for one in worker.consumers))
        turns_before, blocked = waits()
        sys.setprofile(count)
        try:
            for n in range(jobs):
                await (await tasks[n * 7 % queues].aenqueue()).aresult(timeout=60)
        finally:
            sys.setprofile(None)
        turns_after, blocked_after = waits()
    await app.aclose()
    monkeypatch.setattr(queue_consumer.QueueConsumer, "_send_turn", send_turn)
    return calls / jobs, (turns_after - turns_before) / jobs, (blocked_after - blocked) / jobs


@pytest.mark.row("D24")
@pytest.mark.standalone_only("a cluster has a blocking call for each slot")
@pytest.mark.usefixtures("only_when_woken")  # what is done four times a second costs a job more where it takes longer
async def test_a_job_costs_the_same_with_many_queues(url: str, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 130 queues a job costs the turns and blocking calls of a worker of one queue, and about as many function calls."""
    monkeypatch.setattr(wakeup, "BUSY", LATER)  # a worker that works for so long waits beside its work
    few_calls, few_turns, few_blocked = await _cost_of_a_job(url, redis, 1, monkeypatch)
    calls, turns, blocked = await _cost_of_a_job(url, redis, 130, monkeypatch)
    print(f"1 queue: {few_calls:.0f} calls, {few_turns} turns, {few_blocked}; 130: {calls:.0f}, {turns}, {blocked}")

    assert calls <= 1.5 * few_calls
    assert turns <= few_turns + 0.2
    assert blocked <= few_blocked + 0.2


@pytest.mark.standalone_only("a cluster has a blocking call for each slot")
@pytest.mark.usefixtures("only_when_woken")
async def test_a_blocking_call_names_few_queues(url: str, redis: Any) -> None:
    """The wake-up lists of many queues are spread over blocking calls of at most 32 queues, and every queue is heard."""
    app = Conveyor(url)
    tasks = _tasks(app, 2 * MOST_QUEUES + 1)
    async with working(app):
        await auntil(lambda: redis.info("clients")["blocked_clients"] == 3)
        for task in tasks:
            await (await task.aenqueue()).aresult(timeout=PATIENCE)
    await app.aclose()


@pytest.mark.row("D25")
@pytest.mark.standalone_only("counts every command the server gets, those of a replica and of sentinels too")
async def test_idle_workers_of_many_queues_send_next_to_nothing(
    url: str, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six idle workers of 20 queues cost little more than one command for each queue and worker in each of their pauses."""
    monkeypatch.setattr(queue_consumer, "IDLE", 1.0)  # with a lease that no busy machine lets end
    app = Conveyor(url, lease="60s")
    _tasks(app, 20)
    workers = [Worker(app) for _ in range(6)]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    for worker in workers:
        await asyncio.wait_for(worker.ready.wait(), 60)
    consumers = [one for worker in workers for one in worker.consumers]
    idle = [one.idle_turns for worker in workers for one in worker.connections._by_endpoint.values()]
    # The first turns look for dead workers, and the first idle turn of each worker is that of all its queues.
    await auntil(lambda: all(one._count for one in idle) and not any(one.busy or one.has_more for one in consumers))
    identities = [one.identity for one in consumers]

    began, before = monotonic(), _commands(redis)
    await asyncio.sleep(4)  # the law is about time that passes
    after, pauses = _commands(redis), monotonic() - began + 1
    sent = {name: count - before.get(name, 0) for name, count in after.items() if name != "cmdstat_info"}
    print(sent)
    still = [one.identity for one in consumers]
    for worker in workers:
        worker.stop()
    await asyncio.gather(*running)
    await app.aclose()

    assert identities == still  # nobody was taken for dead
    assert 20 * len(workers) <= sent["cmdstat_zadd"] <= 20 * len(workers) * pauses
    assert sum(sent.values()) <= 20 * len(workers) * pauses * 1.9


@pytest.mark.row("D21")
@pytest.mark.usefixtures("only_when_woken")
async def test_a_token_that_comes_during_a_turn(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is taken while a turn that came too early for its job is under way leads to another turn at once."""
    app = Conveyor(url)
    [task] = _tasks(app, 1)
    async with working(app) as worker:
        [consumer] = worker.consumers
        await auntil(lambda: worker.connections.blocked and not consumer.busy)
        send, held = consumer.connection.send, list[tuple[Any, Any]]()

        def send_and_hold(command: Any, answer: Any, **options: Any) -> None:
            send(command, lambda reply: held.append((answer, reply)), **options)

        monkeypatch.setattr(consumer.connection, "send", send_and_hold)
        consumer.on_token()
        await auntil(lambda: held)  # carried out, and the worker does not know it yet
        monkeypatch.undo()
        taken, on_token = asyncio.Event(), consumer.on_token
        monkeypatch.setattr(consumer, "on_token", lambda: (on_token(), taken.set()))
        job = await task.aenqueue()
        await asyncio.wait_for(taken.wait(), 60)
        for answer, reply in held:
            answer(reply)
        await job.aresult(timeout=PATIENCE)
    await app.aclose()


@pytest.mark.row("D25")
@pytest.mark.standalone_only("changes the users of one server")
async def test_workers_without_the_right_to_idle_turns_go_on(url: str, redis: Any) -> None:
    """A worker whose user loses the right to what an idle turn needs while it runs renews by turns."""
    redis.acl_setuser("old", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all"])
    app = Conveyor(url.replace("://", "://old:x@", 1), lease="900ms")
    try:
        [task] = _tasks(app, 1)
        async with working(app) as worker:
            [consumer] = worker.consumers
            redis.execute_command("ACL", "SETUSER", "old", "-mget")
            identity, numbers = consumer.identity, set[int]()
            await auntil(lambda: numbers.add(consumer.number) or len(numbers) > 4)  # more than a lease
            assert consumer.identity == identity
            await (await task.aenqueue()).aresult(timeout=60)
    finally:
        await app.aclose()
        redis.acl_deluser("old")
