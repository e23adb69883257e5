"""The places a worker serves: at each, one wire for the turns of its queues and one listener that waits for their tokens."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from conveyor.duration import span
from conveyor.errors import ConveyorError
from conveyor.store.wire import Wire
from conveyor.worker.listener import Listener

if TYPE_CHECKING:
    from conveyor.store.backend import Backend
    from conveyor.store.keys import QueueKeys
    from conveyor.store.place import Place
    from conveyor.worker.role import Sleeper, Tenant


log = logging.getLogger("conveyor.worker")
QUIET = 1.0
"""Seconds that Redis may be away without a word in the log: a restart or a cut connection."""


class Berth:
    """One place: a single one for all queues, but in a cluster, where a blocked call covers one slot."""

    def __init__(self, worker: Tenant, place: Place) -> None:
        """Take the worker, and the place."""
        self._worker = worker
        self.sleepers: list[Sleeper] = []
        self.wire = Wire(place)
        self.listener = Listener(self, Wire(place))
        self.wire.reopened, self.wire.lost = self._found, self._lost
        self._since = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def stopped(self) -> bool:
        """True when nothing is to be waited for any more."""
        return self._worker.stopped

    def _lost(self, error: OSError) -> None:
        if self._telling is None:
            loop, self._since = asyncio.get_running_loop(), monotonic()
            self._telling = loop.call_later(QUIET, self._tell, str(error))
            loop.call_soon(self._reopen)

    def _reopen(self) -> None:
        """Connect at once: an idle worker's next turn may be seconds away, and until then it would say that Redis is."""
        if not self.stopped:
            self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        with suppress(OSError, ConveyorError):  # turns and the listener go on trying
            await self.wire.open()

    def _tell(self, why: str) -> None:
        log.warning("worker %s: Redis is away, trying again: %s", self._worker.name, why)

    def _found(self) -> None:
        if self._telling is not None:
            if monotonic() - self._since > QUIET:
                log.info("worker %s: Redis is back after %s", self._worker.name, span(monotonic() - self._since))
            self._telling.cancel()
            self._telling = None
        self.listener.renew()

    async def close(self) -> None:
        """Close its connections."""
        if self._telling is not None:
            self._telling.cancel()
        if self._opening is not None:
            self._opening.cancel()
        await self.listener.close()
        self.wire.close()


class Harbour:
    """All places of one worker."""

    def __init__(self, worker: Tenant, backend: Backend) -> None:
        """Take the worker, and what knows the places of its queues."""
        self._worker, self._backend = worker, backend
        self._berths: dict[Place, Berth] = {}

    def berth(self, keys: QueueKeys) -> Berth:
        """Return the berth of a queue."""
        place = self._backend.place(keys)
        found = self._berths.get(place)
        if found is None:
            found = self._berths[place] = Berth(self._worker, place)
        return found

    def listen(self) -> None:
        """Wait for work wherever nobody does: room that came free counts for every queue."""
        for berth in self._berths.values():
            berth.listener.listen()

    @property
    def blocked(self) -> int:
        """How many blocking calls were made."""
        return sum(berth.listener.blocked for berth in self._berths.values())

    async def close(self) -> None:
        """Close all connections."""
        for berth in self._berths.values():
            await berth.close()
