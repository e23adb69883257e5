"""Where the commands for some keys go: one server, the current master, or the owner of a slot."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable
from contextvars import copy_context
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection

T = TypeVar("T")


REPLY_TIMEOUT = 5.0
"""Seconds a single server may take for one reply."""
FAILOVER_REPLY_TIMEOUT = 2.5
"""The same where another server may have taken over: half the retry time of a producer, so that the other is still asked."""
FAILOVER_CONNECT_TIMEOUT = 2.0
"""Seconds for connecting there, so that a server that drops packets does not use up a caller's retry time."""
FAILOVER_HANDSHAKE_TIMEOUT = 2.0
"""Seconds that the first exchange on a connection may take there."""
QUERY_TIMEOUT = 0.5
"""Seconds for connecting to a sentinel or a node to ask where to go, and for its reply: another one may know."""


def time_left(deadline: float, most: float) -> float:
    """Return the seconds until *deadline* (monotonic), between a moment and *most*; 0 would mean no limit."""
    return max(min(most, deadline - time.monotonic()), 0.001)


def half_left(deadline: float) -> float:
    """Return the instant until which one of several servers is asked, so that another can be asked before *deadline*."""
    now = time.monotonic()
    return now + (deadline - now) / 2


class EndpointUnresolved(ConnectionError):
    """No server could be found to connect to, or the one found is not the right one; a later try may succeed."""


class Endpoint(Protocol):
    """
    A place to connect to, again and again; each `open` finds out anew which server that is.

    Equal endpoints may share a connection.
    """

    @property
    def reply_timeout(self) -> float:
        """Seconds after which a connection that owes a reply is given up: short where another server may take over."""
        ...

    def open(self, *, read_timeout: float | None, deadline: float = math.inf) -> Connection:
        """
        Return a connected blocking connection whose reads wait *read_timeout* seconds (None: no limit).

        *deadline* (monotonic) is when it must be there. Looking up a host's name is not bounded by it.
        """
        ...

    async def aopen(self) -> AsyncConnection:
        """Return a connected asyncio connection."""
        ...

    def current_server(self) -> Hashable:
        """Return what stands for the server that serves this endpoint now, as far as is known: the same for its other endpoints."""
        ...

    def note_moved(self, reply: str) -> None:
        """Note an error reply that says the keys are elsewhere. Raises ConfigurationError (E33) where that cannot be."""
        ...

    def ask_redirect(self, reply: str) -> Endpoint:
        """Return the node named in an ASK redirect. Only the next command goes there."""
        ...

    def __str__(self) -> str: ...
    def __hash__(self) -> int: ...


class Topology(Protocol):
    """The target that a URL names: a server, a master watched by sentinels, or a cluster."""

    @property
    def single(self) -> bool:
        """True: one endpoint serves all keys."""
        ...

    @property
    def url(self) -> str: ...

    def endpoint(self, key: str) -> Endpoint:
        """Return the endpoint for *key*; "" is any key."""
        ...

    def __str__(self) -> str: ...


async def in_thread(function: Callable[[], T]) -> T:
    """
    Return what a blocking *function* returns.

    It runs in a thread of its own, because the loop's pool may be full of a user's work, and in the context of the caller.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
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
            value = context.run(function)
        except Exception as error:
            failed = error
        try:
            loop.call_soon_threadsafe(tell, value, failed)
        except RuntimeError:  # the loop is closed, so nothing waits any more
            pass

    threading.Thread(target=work, name="conveyor-resolve", daemon=True).start()
    return await future
