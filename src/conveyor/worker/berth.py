"""The places a worker serves: at each, one wire for the turns of its queues and one listener that waits for their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conveyor.store.wire import Wire
from conveyor.worker.listener import Listener

if TYPE_CHECKING:
    from conveyor.store.backend import Backend
    from conveyor.store.keys import QueueKeys
    from conveyor.store.place import Place
    from conveyor.worker.role import Mortal, Sleeper


class Berth:
    """One place: a single one for all queues, but in a cluster, where a blocked call covers one slot."""

    def __init__(self, worker: Mortal, place: Place) -> None:
        """Take the worker, and the place."""
        self._worker = worker
        self.sleepers: list[Sleeper] = []
        self.wire = Wire(place)
        self.listener = Listener(self, Wire(place))
        self.wire.reopened = self.listener.renew

    @property
    def stopped(self) -> bool:
        """True when nothing is to be waited for any more."""
        return self._worker.stopped


class Harbour:
    """All places of one worker."""

    def __init__(self, worker: Mortal, backend: Backend) -> None:
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
            await berth.listener.close()
            berth.wire.close()
