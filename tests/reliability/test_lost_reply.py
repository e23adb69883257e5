"""The connection dies at every step of a scenario, before the command left or before its reply was read."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, closing

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor.messaging.plain_list import PlainList
from conveyor.messaging.queue import Queue
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection


class Fault:
    """Breaks the connection at the n-th command: `sent` tells whether the server still carries it out."""

    def __init__(self, monkeypatch, at, *, sent):
        self.at, self.sent, self.count = at, sent, 0
        self.real = Connection.execute
        fault = self

        def execute(connection, *command, block=0.0):
            fault.count += command[0] != "SADD"  # making a queue known is no step of its messages
            if command[0] == "SADD" or fault.count != fault.at:
                return fault.real(connection, *command, block=block)
            if fault.sent:
                fault.real(connection, *command, block=block)
            connection.close()
            raise TransportError("cut")

        monkeypatch.setattr(Connection, "execute", execute)


def run_queue(url):
    backend = Client(url, retry_for=5)
    queue = Queue(backend, "mail", lease_ms=2000)
    queue.push(0)
    queue.push_many(range(1, 5))
    queue.push(5, priority=1)
    seen = _consume(queue, 6)
    assert backend.run(inspection.audit(queue.keys)) == []
    stats = queue.stats()
    backend.close()
    return seen, (stats.ready, stats.leased, stats.dead)


def run_list(url):
    backend = Client(url, retry_for=5)
    tasks = PlainList(backend, "raw", lease_ms=2000)
    tasks.push(0)
    tasks.push_many(range(1, 6))
    seen = _consume(tasks, 6)
    stats = tasks.stats()
    backend.close()
    return seen, (stats.ready, stats.leased, stats.dead)


def _consume(queue, count):
    seen = []
    watchdog = threading.Timer(4, lambda: queue.push("lost"))
    watchdog.start()
    with closing(queue.consume(prefetch=2)) as messages:
        for message in messages:
            assert message.body != "lost", f"only {seen} came"
            if message.body == 3:
                message.ack()
                seen.append((3, message.attempt))
            else:
                with message as body:
                    seen.append((body, message.attempt))
            if len(seen) == count:
                break
    watchdog.cancel()
    return seen


class AsyncFault(Fault):
    """The same on a wire."""

    def __init__(self, monkeypatch, at, *, sent):
        self.at, self.sent, self.count = at, sent, 0
        real, fault = AsyncConnection.execute, self

        async def execute(wire, *command, **times):
            fault.count += command[0] != "SADD"
            if command[0] == "SADD" or fault.count != fault.at:
                return await real(wire, *command, **times)
            if fault.sent:
                await real(wire, *command, **times)
            wire.drop(ConnectionLost("cut"))
            raise ConnectionLost("cut")

        monkeypatch.setattr(AsyncConnection, "execute", execute)


async def arun_queue(url, make):
    backend = Client(url, retry_for=5)
    queue = make(backend)
    await queue.apush(0)
    await queue.apush_many(range(1, 6))
    seen = []
    async with asyncio.timeout(60), aclosing(queue.aconsume(prefetch=2)) as messages:
        async for message in messages:
            if message.body == 3:
                await message.aack()
                seen.append((3, message.attempt))
            else:
                async with message as body:
                    seen.append((body, message.attempt))
            if len(seen) == 6:
                break
    stats = await queue.astats()
    await backend.aclose()
    return seen, (stats.ready, stats.leased, stats.dead)


@pytest.mark.row("A2", "C16")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
@pytest.mark.parametrize("kind", [Queue, PlainList])
async def test_the_same_on_a_loop(url, redis, monkeypatch, kind, sent):
    """Awaitable pushes, turns and ends survive a cut at every step in the same way."""
    steps = 1
    at = 0
    while at < steps:
        redis.flushall()
        with monkeypatch.context() as patch:
            fault = AsyncFault(patch, at, sent=sent)
            seen, left = await arun_queue(url, lambda backend: kind(backend, "raw", lease_ms=2000))
            steps = max(steps, fault.count)
        assert seen == [(body, 1) for body in range(6)], f"cut at command {at}"
        assert left == (0, 0, 0), f"cut at command {at}"
        at += 1
    assert at > 8


@pytest.mark.row("A2", "C16", "I4")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
@pytest.mark.parametrize(("scenario", "order"), [(run_queue, [5, 0, 1, 2, 3, 4]), (run_list, [0, 1, 2, 3, 4, 5])])
def test_once_each_and_nothing_left(url, redis, monkeypatch, scenario, order, sent):
    """Wherever the connection breaks, every message is handed out once, in order, with its first attempt."""
    steps = 1
    at = 0
    while at < steps:
        redis.flushall()
        with monkeypatch.context() as patch:
            fault = Fault(patch, at, sent=sent)
            seen, left = scenario(url)
            steps = max(steps, fault.count)
        assert seen == [(body, 1) for body in order], f"cut at command {at}"
        assert left == (0, 0, 0), f"cut at command {at}"
        at += 1
    assert at > 8
