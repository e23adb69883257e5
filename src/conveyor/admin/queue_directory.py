"""Queues as people name them: which places, a queue of one piece or its partitions, lie behind a name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from conveyor import ids
from conveyor.errors import ConfigurationError, QueueNotFound
from conveyor.messaging.partitioned_queue import PartitionedQueue
from conveyor.messaging.partitions import likely_first, partition_count, partition_names
from conveyor.messaging.plain_list import PlainList
from conveyor.messaging.queue import Queue
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.inspection import QueueCounts
from conveyor.store.keys import QueueKeys
from conveyor.store.partitions import count

_LEASE_MS = 15_000  # administration leases nothing


class QueueDirectory:
    """The known queues of a client. *plain_lists* are those shared with other programs: Redis does not say that."""

    def __init__(self, client: Client, plain_lists: Collection[str] = ()) -> None:
        """Take the client and its plain lists."""
        self._client = client
        self._plain_lists = frozenset(plain_lists)

    def names(self) -> list[str]:
        """Return the names of all known queues, sorted."""
        return sorted(self._known())

    def places(self, name: str) -> list[str]:
        """Return the places of a queue; a partition, ``orders/3``, is one by itself. Raises QueueNotFound."""
        known = self._known()
        if name in known:
            return partition_names(name, known[name])
        queue = ids.logical(name)
        if queue != name and name in partition_names(queue, known.get(queue, 1)):
            return [name]
        names = sorted(known)
        listed = f"Known: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}." if names else "There is none."
        raise QueueNotFound(f"No queue {name!r} in namespace {self._client.namespace!r}. {listed}")

    def all_places(self, id: str) -> list[str]:  # noqa: A002
        """Return all places, those first in which a caller's own *id* would be."""
        known = self._known()
        return likely_first([place for name in sorted(known) for place in partition_names(name, known[name])], id)

    def keys(self, place: str) -> QueueKeys:
        """Return the keys of a place."""
        foreign = place if place in self._plain_lists else None
        return QueueKeys(self._client.namespace, place, foreign=foreign)

    def counts(self, name: str) -> QueueCounts:
        """Return what a queue, or one partition, holds."""
        return inspection.total([self._client.run(inspection.counts(self.keys(place))) for place in self.places(name)])

    def whole(self, name: str) -> Queue[Any]:
        """Return the queue to act on; raises QueueNotFound, and ConfigurationError for a partition."""
        if name in self._plain_lists:
            return PlainList(self._client, name, lease_ms=_LEASE_MS)
        if (queue := ids.logical(name)) != name and len(self.places(queue)) > 1:
            raise ConfigurationError(f"'{name}' is a partition, which can be looked at only. Name the queue: {queue}")
        number = len(self.places(name))
        if number == 1:
            return Queue(self._client, name, lease_ms=_LEASE_MS)
        return PartitionedQueue(self._client, name, lease_ms=_LEASE_MS, partitions=number)

    def is_shut(self, name: str) -> bool:
        """Tell whether a change of a queue's partitions is under way, or was not completed."""
        return self._client.run(count(self._client.keys(name)))[0] == 0

    def _known(self) -> dict[str, int]:
        """Return queue → in how many partitions it lies."""
        found = dict.fromkeys(self._plain_lists, 1)
        numbers: dict[str, int] = {}
        for place in self._client.queues():
            queue = place if place in self._plain_lists else ids.logical(place)
            if queue != place and queue not in numbers:
                numbers[queue] = partition_count(self._client, queue)
            number = numbers.get(queue, 1)
            # One that only looks like a partition is a plain list, which another program declares.
            found[queue if number > 1 else place] = number
        return found
