"""
Moves the raw entries of a plain list into a queue of the worker, before any of them is leased.

Before each turn that asks for work, in the same write, up to as many raw entries are moved. While the worker is idle, a
connection of its own blocks in `BLMOVE` to the intake list, which any turn empties. So no entry is left behind by a
worker that dies (a cancelled `BLMOVE` leaves one in the intake list; a cancelled `BLPOP` would lose it).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError
from conveyor.ids import new_id
from conveyor.store import operations
from conveyor.store.transport import replies
from conveyor.store.transport.async_connection import AsyncConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    from conveyor.store.keys import QueueKeys

log = logging.getLogger("conveyor.worker")
BLOCK = 5.0
"""Seconds of one blocking call."""


class ListIntake:
    """Moves what other programs push on a plain list into a queue of the worker."""

    def __init__(self, keys: QueueKeys, task: str, connection: AsyncConnection, on_entries: Callable[[], None]) -> None:
        """
        Args:
            keys: those of the list.
            task: the name of the task that gets the entries.
            connection: the one that the turns of the queue use.
            on_entries: called when entries may have come.
        """
        self._keys, self._name, self._connection, self._on_entries = keys, task, connection, on_entries
        self._task: asyncio.Task[None] | None = None
        self._blocking: AsyncConnection | None = None
        self.loading = False
        """True while the server did not know the script: entries are still to come."""
        self.has_capacity = asyncio.Event()
        """Set while the queue would take entries and has none: only then they are waited for."""

    def send(self, want: int) -> None:
        """Move up to *want* raw entries, on the connection that the turn follows on."""
        call = operations.list_intake(self._keys, want, new_id()[:18], self._name)
        self._connection.send(call.command(), self._moved)

    def _moved(self, reply: Any) -> None:
        if isinstance(reply, Exception) and not isinstance(reply, OSError):
            if replies.action_for(str(reply)) is replies.ErrorAction.LOAD:
                self.loading = True
                asyncio.get_running_loop().create_task(self._load())
            else:
                log.warning("list %s: entries could not be taken: %s", self._keys.foreign, reply)

    async def _load(self) -> None:
        call = operations.list_intake(self._keys, 1, new_id()[:18], self._name)
        try:
            await self._connection.run(call, retry_for=30.0)
        except ConveyorError as error:
            log.warning("list %s: entries could not be taken: %s", self._keys.foreign, error)
        self.loading = False
        self._on_entries()

    def start(self) -> None:
        """Wait for entries while the worker lives."""
        self._blocking = AsyncConnection(self._connection.endpoint)
        self._task = asyncio.get_running_loop().create_task(self._wait(self._blocking))

    async def _wait(self, connection: AsyncConnection) -> None:
        keys, attempt = self._keys, 0
        assert keys.foreign is not None
        while True:
            await self.has_capacity.wait()
            try:
                reply = await connection.execute(
                    "BLMOVE", keys.foreign, keys.intake, "LEFT", "RIGHT", str(int(BLOCK)), block=BLOCK
                )
                if isinstance(reply, Exception):
                    connection.handle_error_reply(reply)
            except (OSError, ConveyorError) as error:
                log.debug("list %s: waiting for entries was refused: %s", keys.foreign, error)
                await asyncio.sleep(replies.backoff(attempt))
                attempt += 1
                continue
            attempt = 0
            if isinstance(reply, Exception):
                # A full Redis refuses BLMOVE, and UNBLOCKED is passing: ask once a second until it is over.
                await asyncio.sleep(1.0)
                self._on_entries()
            elif reply is not None:
                self._on_entries()

    async def close(self) -> None:
        """Stop waiting. An entry that is on its way lands in the intake list, for any turn to take."""
        if self._task is not None:
            self._task.cancel()
        if self._blocking is not None:
            self._blocking.close()
