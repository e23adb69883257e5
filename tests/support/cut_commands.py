"""Connections of a program that break at its n-th command, and processes that end there."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection


class Dies(BaseException):
    """The process ended here."""


class Cut:
    """
    Breaks a blocking connection at the n-th command of a program, 0: at none.

    `sent` tells whether the server still carries it out. Questions about the nodes of a cluster do not count.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, sent: bool, error: type[BaseException]) -> None:
        self.count, real, cut = 0, Connection.execute, self

        def execute(connection: Connection, *command: Any, block: float = 0.0) -> Any:
            if command[0] == "CLUSTER":
                return real(connection, *command, block=block)
            cut.count += 1
            if cut.count != at:
                return real(connection, *command, block=block)
            if sent:
                real(connection, *command, block=block)
            connection.close()
            raise error("cut")

        patch.setattr(Connection, "execute", execute)


class AsyncCut:
    """The same for the connections of an event loop."""

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int, *, sent: bool = True, error: type[BaseException] = ConnectionLost
    ) -> None:
        self.count, real, cut = 0, AsyncConnection.execute, self

        async def execute(wire: AsyncConnection, *command: Any, **times: Any) -> Any:
            cut.count += 1
            if cut.count != at:
                return await real(wire, *command, **times)
            if sent:
                await real(wire, *command, **times)
            wire.drop(ConnectionLost("cut"))
            raise error("cut")

        patch.setattr(AsyncConnection, "execute", execute)
