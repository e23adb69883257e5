"""The connection dies at every step of a scenario, before a command left or before its reply was read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor import Context, Conveyor, JobFailed, Retry, current
from conveyor.errors import StoreUnavailable
from conveyor.ids import split
from conveyor.store import inspection, operations
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection
from support.client_worker import ClientWorker
from support.running_worker import audit, counts
from support.waiting import auntil, until

QUICK = Retry(attempts=2, backoff="1ms", jitter=False)


class Cut:
    """Breaks a connection at the n-th command, whoever sends it; `sent` tells whether the server still carries it out."""

    def __init__(self, at: int, *, sent: bool) -> None:
        """Count from 1; 0 breaks nothing."""
        self.at, self.sent, self.count = at, sent, 0
        self.what = ""

    def falls(self, command: tuple[Any, ...]) -> bool:
        """Count one command; tell whether this is the one."""
        self.count += 1
        if self.count == self.at:
            self.what = str(command[0])
        return self.count == self.at

    @contextmanager
    def everywhere(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Lie in wait on blocking connections and on wires."""
        cut, sendall, receive, wired = self, Connection._send, Connection._receive, AsyncConnection.send
        doomed: set[Connection] = set()

        def send(connection: Connection, commands: Sequence[tuple[Any, ...]]) -> int:
            if any(map(cut.falls, list(commands))):
                if not cut.sent:
                    connection.close()
                    raise TransportError("cut")
                doomed.add(connection)
            return sendall(connection, commands)

        def answered(connection: Connection, number: int, block: float) -> Any:
            reply = receive(connection, number, block)
            if connection in doomed:
                doomed.discard(connection)
                connection.close()
                raise TransportError("cut")
            return reply

        def wire_send(wire: AsyncConnection, command: tuple[Any, ...], answer: Any, **options: Any) -> None:
            def lose() -> None:
                wire.drop(ConnectionLost("cut"))
                answer(ConnectionLost("cut"))

            if not cut.falls(command):
                wired(wire, command, answer, **options)
            elif cut.sent:
                wired(wire, command, lambda _: asyncio.get_running_loop().call_soon(lose), **options)
            else:
                lose()

        with monkeypatch.context() as patch:
            patch.setattr(Connection, "_send", send)
            patch.setattr(Connection, "_receive", answered)
            patch.setattr(AsyncConnection, "send", wire_send)
            yield


# -- a producer and a worker on one loop ------------------------------------------------------------------------------


async def work(app: Conveyor) -> Any:
    """Enqueue in each way, run, fail, die, snooze nothing, cancel what waits and what runs; return all that was seen."""
    runs: list[str] = []

    @app.task(retry=QUICK)
    async def add(n: int, context: Context = current()) -> int:
        runs.append(f"{n}.{context.attempt}")
        if n == 1 and context.attempt == 1:
            raise ValueError("once")
        if n == 2:
            raise KeyError("always")
        return n

    @app.task(retry=QUICK)
    def plain(n: int) -> int:
        runs.append(f"{n}.plain")
        return n

    @app.task
    async def endless() -> None:
        runs.append("endless")
        await asyncio.sleep(60)

    jobs = await asyncio.gather(*(add.aenqueue(n) for n in range(3)))
    jobs += [await add.options(id="own", unique="key", delay="5ms", priority=3).aenqueue(3)]
    jobs += await app.aenqueue_many([plain.s(4), add.s(5)])
    waiting = await add.options(delay="1h").aenqueue(6)
    assert await waiting.acancel() in {"removed", ""}  # "": an answer that was lost said so before
    async with app.worker(concurrency=3, grace="5s"):
        results = await asyncio.gather(*(job.aresult(timeout=60) for job in jobs), return_exceptions=True)
        long = await endless.aenqueue()
        await auntil(lambda: "endless" in runs)
        await long.acancel()
        ended = await asyncio.gather(long.aresult(timeout=60), return_exceptions=True)
    assert await audit(app) == []
    found = await counts(app)
    words = [type(one).__name__ if isinstance(one, Exception) else one for one in (*results, *ended)]
    assert isinstance(results[2], JobFailed)
    assert results[2].type == "KeyError"
    left = (found.ready, found.leased, found.scheduled, found.dead, found.workers)
    return sorted(runs), words, left, await waiting.astatus()


@pytest.mark.row("A2")
@pytest.mark.leaves_keys("the dead letter of the last round")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
async def test_producer_and_worker(url: str, redis: Any, monkeypatch: pytest.MonkeyPatch, sent: bool) -> None:
    """Wherever the connection of a producer or a worker breaks: the same runs, the same outcomes, nothing left."""
    expected: Any = None
    at = most = 0
    while at <= most:
        redis.flushall()
        cut = Cut(at, sent=sent)
        app = Conveyor(url, lease="2s")
        with cut.everywhere(monkeypatch):
            seen = await work(app)
        await app.aclose()
        expected = expected or seen
        assert seen == expected, f"cut at command {at}, {cut.what}"
        most = max(most, cut.count) if at else cut.count
        at += 1
    print(f"{at} cuts")
    assert at > 20


# -- blocking calls -----------------------------------------------------------------------------------------------------


def care(app: Conveyor) -> Any:
    """Push, pull, end and extend messages in every way, then redrive, purge and cancel; return all that was seen."""
    queue = app.queue("mail", lease="30s", max_attempts=3)
    ids = [queue.push(0), *queue.push_many(range(1, 5)), queue.push(5, id="own", unique="k", delay="1ms")]
    seen = []
    for message in queue.pull(4):
        seen.append((message.body, message.attempt))
        if message.body == 0:
            message.ack()
        elif message.body == 1:
            message.dead("no")
        elif message.body == 2:
            message.extend("5m")
            message.ack()
        else:
            message.nack(delay="1ms")

    def pull_some() -> bool:
        for message in queue.pull(5, wait="1s"):
            seen.append((message.body, message.attempt))
            message.ack()
        return len(seen) >= 7

    until(pull_some, what="seven messages")
    letters = [letter.error for letter in queue.dead_letters()]
    queue.redrive()
    for message in queue.pull(1):
        seen.append((message.body, message.attempt))
        message.dead("again")
    queue.purge(dead=True)
    queue.push_many(range(10, 13))
    last = queue.push(13)
    assert app.job(last).cancel() in {"removed", ""}
    status = app.job(last).status()
    queue.purge()
    tasks = app.plain_list("raw")
    tasks.push(20)
    tasks.push_many([21, 22])

    def pull_raw() -> bool:
        try:
            pulled = tasks.pull(3)
        except StoreUnavailable:
            return False  # taking raw entries in is not repeated: a repeat would take more of them. None is lost
        for message in pulled:
            seen.append((message.body, message.attempt))
            message.ack()
        return len(seen) >= 11

    until(pull_raw, what="eleven messages")
    client = app.client
    assert [client.run(inspection.audit(client.keys(name))) for name in ("mail",)] == [[]]
    stats = queue.stats()
    return (
        sorted(seen),
        letters,
        len(ids),
        status,
        (stats.ready, stats.scheduled, stats.leased, stats.dead, stats.workers),
    )


def results(app: Conveyor) -> Any:
    """Wait for a result that a manual worker writes, return a dead worker's job, and promote a scheduled one."""

    @app.task(name="shop.send")
    def send() -> int:
        return 1

    job, later = send.enqueue(), send.options(delay="1h").enqueue()
    with pytest.raises(TimeoutError):
        job.result(timeout=0.001)
    first = ClientWorker(app.client, "default")
    taken = first.take()
    app.client.run(operations.heartbeat(first.keys, first.identity, 5000))
    app.client.run(operations.reap(first.keys, first.identity))
    second = ClientWorker(app.client, "default")
    assert second.take() == taken == [job.id]
    second.succeed(job.id, b"1")
    app.client.run(operations.promote(second.keys, split(later.id)[1]))
    assert second.take() == [later.id]
    second.fail(later.id)
    app.client.run(operations.reap(second.keys, second.identity, crashed=False))
    value, status = job.result(timeout=60), later.status()
    assert app.client.run(inspection.audit(second.keys)) == []
    return value, status


@pytest.mark.row("A2")
@pytest.mark.leaves_keys("what the last round leaves")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
@pytest.mark.parametrize("scenario", [care, results])
def test_blocking_calls(
    url: str, redis: Any, monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Conveyor], Any], sent: bool
) -> None:
    """Wherever the connection of a blocking caller breaks: the same messages, each once, the same end, nothing left."""
    expected: Any = None
    at = most = 0
    while at <= most:
        redis.flushall()
        cut = Cut(at, sent=sent)
        with cut.everywhere(monkeypatch), Conveyor(url) as app:
            seen = scenario(app)
        expected = expected or seen
        assert seen == expected, f"cut at command {at}, {cut.what}"
        most = max(most, cut.count) if at else cut.count
        at += 1
    print(f"{at} cuts")
    assert at > 10
