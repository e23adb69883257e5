"""A push is on its way when its connection ends; its repeat meets a full queue, and later there is room."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor.errors import QueueFull
from conveyor.messaging.plain_list import PlainList
from conveyor.messaging.queue import Queue
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.plain_list import LIST_PUSH
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection

PUSHES = {script.sha for script in (operations.PUSH, operations.PUSH_PLAIN, LIST_PUSH)}


class Way:
    """
    Ends the connection with the first push on its way: the server has its bytes, and reads them when `arrive` says.

    `early` lets the copy arrive between the refusal of the repeat and what is sent next.
    """

    def __init__(self, monkeypatch, redis, *, early=None):
        self.redis, self.early = redis, early
        self.copy, self.sent = None, []
        real, areal = Connection.execute, AsyncConnection.execute

        def execute(connection, *command, block=0.0):
            if self.lose(command):
                connection.close()
                raise TransportError("cut")
            return real(connection, *command, block=block)

        async def aexecute(wire, *command, **times):
            if self.lose(command):
                wire.drop(ConnectionLost("cut"))
                raise ConnectionLost("cut")
            return await areal(wire, *command, **times)

        monkeypatch.setattr(Connection, "execute", execute)
        monkeypatch.setattr(AsyncConnection, "execute", aexecute)

    def lose(self, command):
        if command[0] != "EVALSHA":
            return False
        self.sent.append(command)
        if command[1] in PUSHES and self.copy is None:
            self.copy = command
            return True
        if command[1] == operations.WITHDRAW.sha and self.early is not None:
            self.early()
            self.arrive()
        return False

    def arrive(self):
        return self.redis.execute_command(*self.copy)


async def push(queue, body, awaitable, **options):
    return await queue.apush(body, **options) if awaitable else await asyncio.to_thread(queue.push, body, **options)


@pytest.fixture
async def queue(url):
    backend = Client(url, retry_for=5)
    queue = Queue(backend, "mail", lease_ms=2000, max_length=1)
    await queue.apush("first")
    yield queue
    await queue.apurge()
    await backend.aclose()


@pytest.mark.row("C16")
@pytest.mark.parametrize("awaitable", [False, True], ids=["blocking", "awaitable"])
@pytest.mark.parametrize("options", [{}, {"id": "withdrawn"}, {"priority": 3}], ids=["plain", "own id", "priority"])
async def test_what_was_refused_stays_refused(queue, redis, monkeypatch, awaitable, options):
    """QueueFull means that nothing was stored and nothing will be, though a copy of the push arrives when there is room."""
    way = Way(monkeypatch, redis)
    with pytest.raises(QueueFull):
        await push(queue, "refused", awaitable, **options)
    assert await queue.apurge() == 1

    way.arrive()

    assert await queue.alen() == 0
    assert way.sent.count(way.copy) == 2  # it was lost once, and repeated
    await push(queue, "next", awaitable)
    assert await queue.alen() == 1


@pytest.mark.row("C16")
@pytest.mark.parametrize("awaitable", [False, True], ids=["blocking", "awaitable"])
@pytest.mark.parametrize("options", [{}, {"id": "mine"}], ids=["plain", "own id"])
async def test_a_copy_that_was_accepted_is_no_refusal(queue, redis, monkeypatch, awaitable, options):
    """When the copy finds room before the refusal is told, the push has succeeded, once."""

    def make_room():
        redis.delete(queue.keys.ready[0])
        redis.delete(queue.keys.jobs)

    way = Way(monkeypatch, redis, early=make_room)

    id_ = await push(queue, "accepted", awaitable, **options)

    way.early = None
    assert way.copy in way.sent
    messages = await queue.apull(5)
    assert [(message.id, message.body) for message in messages] == [(id_, "accepted")]
    await messages[0].aack()


@pytest.mark.row("C11", "C16")
@pytest.mark.standalone_only("sets the memory limit of one server")
@pytest.mark.parametrize("kind", [Queue, PlainList])
async def test_the_same_on_a_server_that_is_full(url, redis, monkeypatch, kind):
    """A server at its maxmemory refuses the repeat, and with room again the copy too."""
    backend = Client(url, retry_for=5)
    queue = kind(backend, "raw", lease_ms=2000)
    await queue.apush("first")
    way = Way(monkeypatch, redis)
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueFull, match="maxmemory"):
            await queue.apush("refused")
    finally:
        redis.config_set("maxmemory", 0)

    way.arrive()

    assert await queue.alen() == 1
    await queue.apurge()
    if kind is PlainList:
        redis.delete("raw")
    await backend.aclose()


@pytest.mark.row("C16")
async def test_a_refusal_without_doubt_costs_nothing_more(queue, monkeypatch, redis):
    """A producer that the first answer refuses sends nothing more."""
    way = Way(monkeypatch, redis)
    way.copy = ()

    with pytest.raises(QueueFull):
        await queue.apush("refused")

    assert len(way.sent) == 1
