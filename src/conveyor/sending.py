"""The part of an app that pushes prepared jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conveyor import ident
from conveyor.store.backend import Backend
from conveyor.store.durability import Durability, Wish
from conveyor.store.operations import Entry

if TYPE_CHECKING:
    from conveyor.partition import Partitions
    from conveyor.queue import Queue
    from conveyor.store.keys import QueueKeys


class Sending:
    """Pushes entries to queues, as each of them is declared."""

    backend: Backend
    bounded: dict[str, Queue[Any]]
    """
    The queues with a maximum length, a durability of their own, or partitions: jobs for them do not take the shortest
    way.
    """
    partitioned: dict[str, Partitions]

    _keys: dict[str, QueueKeys]

    def keys(self, queue: str) -> QueueKeys:
        """Return the keys of *queue*."""
        found = self._keys.get(queue)
        if found is None:
            found = self._keys[queue] = self.backend.keys(queue)
        return found

    def placed(self, queue: str, entry: Entry) -> str:
        """Return where a job of *queue* goes: the queue, or one of its partitions."""
        found = self.partitioned.get(queue)
        return queue if found is None else found.placed(entry)

    def send(self, queue: str, entries: Sequence[Entry], wish: Wish | None = None) -> list[str]:
        """Push prepared entries, placed, and return the id of each: its own, or that of a job that existed."""
        way = self.backend.way(self._asks(queue), wish)
        if self.partitioned and not way.deferred and (found := self.partitioned.get(ident.logical(queue))):
            return found.send(queue, entries, way)
        return way.push(self.keys(queue), entries, max_length=self._max_length(queue))

    async def asend(self, queue: str, entries: Sequence[Entry], wish: Wish | None = None) -> list[str]:
        """Do the same without blocking the event loop."""
        way = self.backend.way(self._asks(queue), wish)
        if self.partitioned and not way.deferred and (found := self.partitioned.get(ident.logical(queue))):
            return await found.asend(queue, entries, way)
        return await way.apush(self.keys(queue), entries, max_length=self._max_length(queue))

    def _asks(self, queue: str) -> Durability | None:
        found = self.bounded.get(ident.logical(queue) if self.partitioned else queue)
        return None if found is None else found.asks

    def _max_length(self, queue: str) -> int:
        found = self.bounded.get(queue)
        return 0 if found is None else found.max_length or 0
