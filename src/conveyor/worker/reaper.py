"""Finding the dead among the other workers of a queue, and returning what they held."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError
from conveyor.lessee import Suspects
from conveyor.store import operations

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Turn
    from conveyor.store.wire import Wire

NEARLY = 0.3
"""A look that is due so soon, in seconds, goes with the turn that is made anyway."""
log = logging.getLogger("conveyor.worker")


class Reaper:
    """Looks a few times a lease, and reaps by two looks (`lessee.Suspects`), never by the clock alone."""

    def __init__(self, keys: QueueKeys, wire: Wire, lease_ms: int) -> None:
        """Take the queue, the wire, and the lease in ms."""
        self._keys, self._wire = keys, wire
        self._suspects = Suspects(lease_ms)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_due(self) -> bool:
        """True when the next turn should look."""
        return self._suspects.next_look(monotonic()) <= NEARLY

    def look(self, turn: Turn, me: str) -> None:
        """Take what a turn with the flag ``l`` saw."""
        for worker, end in self._suspects.look(turn.now, turn.overdue, monotonic()):
            if worker != me:
                task = asyncio.get_running_loop().create_task(self._reap(worker, end))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _reap(self, worker: str, end: int) -> None:
        try:
            count = await self._wire.run(operations.reap(self._keys, worker, end=end), patience=5.0)
        except ConveyorError as error:
            log.warning("could not reap a dead worker of queue %s: %s", self._keys.queue, error)
            return
        if count >= 0:
            log.warning("queue %s: worker %s is dead; returned %d jobs", self._keys.queue, worker[:8], count)
