"""
Plain lists in a worker: raw entries are moved into our structure before anyone works on them.

Each turn that asks for work is preceded, in the same write, by a move of up to as many raw
entries. Idle, a connection of its own blocks in `BLMOVE` to the intake list, which any turn
empties, so no death orphans an entry (a cancelled `BLMOVE` does; a cancelled `BLPOP` loses one).
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
    from conveyor.worker.protocols import WakeupTarget

log = logging.getLogger("conveyor.worker")
BLOCK = 5.0


class ListIntake:
    """Moves what others push on the foreign list."""

    def __init__(self, consumer: WakeupTarget, task: str) -> None:
        """Take the consumer of the list, and the name of the task that gets the entries."""
        self._consumer = consumer
        self._name = task
        self._task: asyncio.Task[None] | None = None
        self._wire: AsyncConnection | None = None
        self.loading = False  # the server did not know the script: entries are still to come

    def send(self, wire: AsyncConnection, want: int) -> None:
        """Move up to *want* raw entries, on the wire the turn follows on."""
        call = operations.list_intake(self._consumer.keys, want, new_id()[:18], self._name)
        wire.send(call.command(), self._moved)

    def _moved(self, reply: Any) -> None:
        if isinstance(reply, Exception) and not isinstance(reply, OSError):
            if replies.remedy(str(reply)) is replies.ErrorAction.LOAD:
                self.loading = True
                asyncio.get_running_loop().create_task(self._load())
            else:
                log.warning("could not take from the list %s: %s", self._consumer.keys.foreign, reply)

    async def _load(self) -> None:
        call = operations.list_intake(self._consumer.keys, 1, new_id()[:18], self._name)
        try:
            await self._consumer.wire.run(call, patience=30.0)
        except ConveyorError as error:
            log.warning("could not take from the list %s: %s", self._consumer.keys.foreign, error)
        self.loading = False
        self._consumer.woken()

    def start(self, wire: AsyncConnection) -> None:
        """Wait for entries while the worker lives."""
        self._wire = wire
        self._task = asyncio.get_running_loop().create_task(self._wait(wire))

    async def _wait(self, wire: AsyncConnection) -> None:
        keys, attempt = self._consumer.keys, 0
        assert keys.foreign is not None
        while True:
            await self._consumer.until_has_capacity()
            try:
                reply = await wire.execute(
                    "BLMOVE", keys.foreign, keys.intake, "LEFT", "RIGHT", int(BLOCK), block=BLOCK
                )
                if isinstance(reply, Exception):
                    wire.handle_error_reply(reply)
            except (OSError, ConveyorError) as error:
                log.debug("cannot wait at the list %s: %s", keys.foreign, error)
                await asyncio.sleep(replies.pause(attempt))
                attempt += 1
                continue
            attempt = 0
            if isinstance(reply, Exception):
                # A full Redis refuses BLMOVE, and UNBLOCKED is passing: ask once a second until it is over.
                await asyncio.sleep(1.0)
                self._consumer.woken()
            elif reply is not None:
                self._consumer.woken()

    async def close(self) -> None:
        """Stop waiting. An entry that is on its way lands in the intake list, for any turn to take."""
        if self._task is not None:
            self._task.cancel()
        if self._wire is not None:
            self._wire.close()
