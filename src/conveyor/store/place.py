"""Where the commands for some keys go: one server, the master of the moment, or whoever owns a slot now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection


class Place(Protocol):
    """Something to connect to, again and again; each time it finds out anew where that is. Equal ones may share a connection."""

    def open(self, *, read_timeout: float | None) -> Connection:
        """Return a connected blocking connection whose reads wait *read_timeout* seconds (None: for ever)."""
        ...

    async def aopen(self) -> AsyncConnection:
        """Return a connected connection of asyncio."""
        ...

    def __str__(self) -> str: ...
    def __hash__(self) -> int: ...
