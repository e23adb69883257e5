"""Waiting for a token in a list, on connections of their own, since they block. A token is never a message."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conveyor.store import operations
from conveyor.store.transport import replies
from conveyor.store.transport.async_connection import AsyncConnection
from conveyor.store.transport.connection import Connection

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Endpoint

log = logging.getLogger("conveyor.store")


class WakeupWaiter:
    """A blocking connection that waits for tokens. One thread waits; any thread may interrupt it, or end it."""

    def __init__(self, endpoint: Endpoint, timeout: replies.CallTimeout = replies.NO_TIMEOUT) -> None:
        """Wait at *endpoint*; a reply may be late by half of *timeout*, so that what follows has the other half."""
        self._connection, self._retry_for = Connection(endpoint, timeout), timeout.seconds or 0.0
        self._failures = 0
        self._is_interrupted = False

    def wait(self, key: str, seconds: float) -> bool:
        """Wait for a token in *key* and take it; False when none came, or the connection broke (after a pause)."""
        return self._block(("BLPOP", key, _timeout(seconds)), seconds) is not None

    def wait_any(self, keys: Sequence[str], seconds: float) -> str | None:
        """Wait for a token in any of *keys* and take it; return its key, None as False in `wait`."""
        return _which(self._block(("BLPOP", *keys, _timeout(seconds)), seconds))

    def wait_and_move(self, source: str, target: str, seconds: float) -> bool:
        """Wait for an entry of *source* and move it to the tail of *target*; False as in `wait`. Raises QueueFull."""
        return self._block(("BLMOVE", source, target, "LEFT", "RIGHT", _timeout(seconds)), seconds) is not None

    def close(self) -> None:
        """Close the connection, in the thread that waits on it."""
        self._connection.close()

    def interrupt(self) -> None:
        """Let the call that another thread makes, or is about to make, return as if nothing had come."""
        self._is_interrupted = True
        self._connection.interrupt()

    def end(self) -> None:
        """Interrupt for good: a call that was about to wait does not. The thread that waits closes the connection."""
        self._is_interrupted = True
        self._connection.end()

    def _block(self, command: tuple[str, ...], seconds: float) -> Any:
        from redis import RedisError, ResponseError

        self._connection.begin(self._retry_for)
        try:
            self._connection.open()
            if self._is_interrupted:  # from now on that is seen by the call
                self._connection.close()
                return None
            reply = self._connection.execute(*command, block=max(seconds, 0.001))
        except (RedisError, OSError) as error:
            what = replies.action_for(str(error)) if isinstance(error, ResponseError) else replies.ErrorAction.RECONNECT
            if what is replies.ErrorAction.RAISE:
                raise replies.fatal_error(str(error), str(self._connection.endpoint)) from error
            self._connection.close()
            if self._is_interrupted:
                return None
            if what is replies.ErrorAction.MOVE:
                self._connection.endpoint.note_moved(str(error))
            time.sleep(min(replies.backoff(self._failures), max(seconds, 0.001)))
            self._failures += 1
            return None
        finally:
            self._is_interrupted = False
        self._failures = 0
        return reply


class AsyncWakeupWaiter:
    """Awaitable form of `WakeupWaiter`."""

    def __init__(self, endpoint: Endpoint, timeout: replies.CallTimeout = replies.NO_TIMEOUT) -> None:
        """Wait at *endpoint*, with *timeout* as in `WakeupWaiter`."""
        self._connection, self._timeout = AsyncConnection(endpoint, timeout), timeout
        self._failures = 0

    async def wait(self, key: str, seconds: float) -> bool:
        """Awaitable form of `WakeupWaiter.wait`."""
        return await self._block(("BLPOP", key, _timeout(seconds)), seconds) is not None

    async def wait_any(self, keys: Sequence[str], seconds: float) -> str | None:
        """Awaitable form of `WakeupWaiter.wait_any`."""
        return _which(await self._block(("BLPOP", *keys, _timeout(seconds)), seconds))

    async def wait_and_move(self, source: str, target: str, seconds: float) -> bool:
        """Awaitable form of `WakeupWaiter.wait_and_move`."""
        return await self._block(("BLMOVE", source, target, "LEFT", "RIGHT", _timeout(seconds)), seconds) is not None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    async def _block(self, command: tuple[str, ...], seconds: float) -> Any:
        most = self._connection.endpoint.reply_timeout
        within = replies.usual_times(self._timeout, self._timeout.seconds, most)[1]
        try:
            reply = await self._connection.execute(*command, block=max(seconds, 0.001), within=within)
        except OSError:
            reply = None
        else:
            if not isinstance(reply, Exception):
                self._failures = 0
                return reply
            if self._connection.handle_error_reply(reply) is replies.ErrorAction.RAISE:
                raise replies.fatal_error(str(reply), str(self._connection.endpoint))
        await asyncio.sleep(min(replies.backoff(self._failures), max(seconds, 0.001)))
        self._failures += 1
        return None


def wake(connection: AsyncConnection, key: str) -> None:
    """Put a token into the list *key* for a client that blocks on it; it expires if there is none."""
    # With its text, because nothing would send it after a NOSCRIPT. With two commands a cut between them left the token forever.
    connection.send(operations.wake(key).load(), _ignore)


def _ignore(reply: Any) -> None:
    if isinstance(reply, Exception) and replies.action_for(str(reply)) is replies.ErrorAction.RAISE:
        log.debug("ignored: %s", reply)


def _which(reply: Any) -> str | None:
    return None if reply is None else reply[0].decode()


def _timeout(seconds: float) -> str:
    return f"{max(seconds, 0.001):.3f}"  # 0 would mean no limit
