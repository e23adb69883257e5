"""Where the commands for some keys go: one server, the master of the moment, or whoever owns a slot now."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection

T = TypeVar("T")


REPLY_TIMEOUT = 5.0
"""Seconds a single server may take for one answer."""
FAILOVER_REPLY_TIMEOUT = 2.5
"""The same where another one may have taken its part: half of a producer's patience, so that the other is still asked."""


class EndpointUnresolved(ConnectionError):
    """Nobody could say where to connect to, or who is there is not who we look for; it may be otherwise soon."""


class Endpoint(Protocol):
    """Something to connect to, again and again; each time it finds out anew where that is. Equal ones may share a connection."""

    @property
    def reply_timeout(self) -> float:
        """Seconds after which a connection that owes an answer is given up: short where another server may take over."""
        ...

    def open(self, *, read_timeout: float | None) -> Connection:
        """Return a connected blocking connection whose reads wait *read_timeout* seconds (None: for ever)."""
        ...

    async def aopen(self) -> AsyncConnection:
        """Return a connected connection of asyncio."""
        ...

    def note_moved(self, reply: str) -> None:
        """Take note of an error reply that says the keys are elsewhere. Raises ConfigurationError (E33) where that cannot be."""
        ...

    def ask_redirect(self, reply: str) -> Endpoint:
        """Return where a reply of ASK sends this one command: the node that takes the slot over."""
        ...

    def __str__(self) -> str: ...
    def __hash__(self) -> int: ...


class Topology(Protocol):
    """What a URL names: a server, a master watched by sentinels, or a cluster."""

    @property
    def single(self) -> bool:
        """One place for all keys."""
        ...

    @property
    def url(self) -> str: ...

    def endpoint(self, key: str) -> Endpoint:
        """Return where the commands for *key* go; "" is any key."""
        ...

    def __str__(self) -> str: ...


async def in_thread(function: Callable[[], T]) -> T:
    """Return what a blocking *function* returns. A thread of its own: the loop's pool may be full of a user's work."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: BaseException | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)  # type: ignore[arg-type]

    def work() -> None:
        value, failed = None, None
        try:
            value = function()
        except Exception as error:
            failed = error
        try:
            loop.call_soon_threadsafe(tell, value, failed)
        except RuntimeError:  # the loop is closed, so nobody waits any more
            pass

    threading.Thread(target=work, name="conveyor-resolve", daemon=True).start()
    return await future
