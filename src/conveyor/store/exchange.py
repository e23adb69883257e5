"""One question and its answer on a connection of redis-py, before it is ours to use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from conveyor.store import fault
from conveyor.store.connection import answered, reply_text

if TYPE_CHECKING:
    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection

ANSWER_TIMEOUT = 2.0
"""Seconds an answer may take on a connection of asyncio, which has no time limit of its own."""


def refusal(error: Exception) -> str | None:
    """Return what a server answered while a connection was opened, if repeating does not mend it; else None."""
    from redis import AuthenticationError

    for one in (error, error.__cause__):  # redis-py's asyncio wraps what it meets
        if isinstance(one, AuthenticationError):
            return f"NOAUTH {one}"
        if isinstance(one, Exception) and answered(one) and fault.remedy(text := reply_text(one)) is fault.Remedy.RAISE:
            return text
    return None


def ask(connection: Connection, *command: str) -> Any:
    """Return the reply to one command, None when this user may not ask it; on any other error the connection is closed."""
    from redis import exceptions

    try:
        connection.send_command(*command)
        return connection.read_response()
    except exceptions.NoPermissionError:
        return None
    except BaseException:
        connection.disconnect()
        raise


async def aask(connection: AsyncConnection, *command: str) -> Any:
    """Do the same on a connection of asyncio."""
    from redis import exceptions

    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            await connection.send_command(*command)
            return await connection.read_response()
    except exceptions.NoPermissionError:
        return None
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
