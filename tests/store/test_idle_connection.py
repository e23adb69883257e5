"""A connection that waits for no reply sends the first command at once."""

from __future__ import annotations

import asyncio
from typing import Any

import redis as redis_py

from conveyor.store.client.client import Client
from conveyor.store.transport.async_connection import AsyncConnection
from support.waiting import auntil, until


async def test_the_first_command_leaves_at_once(url: str, redis: redis_py.Redis) -> None:
    """A command leaves with no pass of the event loop where no reply is awaited; others leave together, at the end of the pass."""
    connection = AsyncConnection(Client(url, namespace="c").endpoint("list"))
    await connection.open()
    replies = list[Any]()
    try:
        connection.send(("RPUSH", "list", "a"), replies.append)
        until(lambda: redis.lrange("list", 0, -1) == [b"a"])  # blocks the event loop
        connection.send(("RPUSH", "list", "b"), replies.append)
        connection.send(("RPUSH", "list", "c"), replies.append)
        assert len(connection._out) == 2
        await auntil(lambda: len(replies) == 3)
        assert replies == [1, 2, 3]
        await asyncio.sleep(0)
        assert not connection._out
    finally:
        connection.close()
        redis.delete("list")
