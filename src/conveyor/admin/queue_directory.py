"""Queues as people name them: which places, a queue of one piece or its partitions, lie behind a name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from conveyor import ids
from conveyor.errors import ConfigurationError, QueueNotFound
from conveyor.messaging.partitioned_queue import PartitionedQueue
from conveyor.messaging.partitions import likely_first, number_of, partition_names
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
        return sorted(self._partition_counts())

    def partition_names(self, name: str) -> list[str]:
        """Return the places of a queue; a partition, ``orders/3``, is one by itself. Raises QueueNotFound."""
        known = self._partition_counts()
        if name in known:
            return partition_names(name, known[name])
        queue = ids.logical(name)
        if queue != name and name in partition_names(queue, known.get(queue, 1)):
            return [name]
        names = sorted(known)
        listed = f"Known: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}." if names else "There is none."
        raise QueueNotFound(f"No queue {name!r} in namespace {self._client.namespace!r}. {listed}")

    def all_partition_names(self, id: str) -> list[str]:  # noqa: A002
        """Return all places, those first in which a caller's own *id* would be."""
        known = self._partition_counts()
        return likely_first([part for name in sorted(known) for part in partition_names(name, known[name])], id)

    def keys(self, name: str) -> QueueKeys:
        """Return the keys of a place."""
        foreign = name if name in self._plain_lists else None
        return QueueKeys(self._client.namespace, name, foreign=foreign)

    def counts(self, name: str) -> QueueCounts:
        """Return what a queue, or one partition, holds."""
        return inspection.total(
            [self._client.run(inspection.counts(self.keys(part))) for part in self.partition_names(name)]
        )

    def queue(self, name: str) -> Queue[Any]:
        """Return the queue to act on; raises QueueNotFound, and ConfigurationError for a partition."""
        if name in self._plain_lists:
            return PlainList(self._client, name, lease_ms=_LEASE_MS)
        if (queue := ids.logical(name)) != name and len(self.partition_names(queue)) > 1:
            raise ConfigurationError(f"'{name}' is a partition, which can be looked at only. Name the queue: {queue}")
        number = len(self.partition_names(name))
        if number == 1:
            return Queue(self._client, name, lease_ms=_LEASE_MS)
        return PartitionedQueue(self._client, name, lease_ms=_LEASE_MS, partitions=number)

    def is_being_repartitioned(self, name: str) -> bool:
        """Tell whether a change of a queue's partitions is under way, or was not completed."""
        return self._client.run(count(self._client.keys(name)))[0] == 0

    def _partition_counts(self) -> dict[str, int]:
        """Return queue → in how many partitions it lies."""
        partitions = dict.fromkeys(self._plain_lists, 1)
        counted: dict[str, int] = {}
        for name in self._client.queues():
            queue = name if name in self._plain_lists else ids.logical(name)
            if queue != name and queue not in counted:
                counted[queue] = number_of(self._client, queue)
            number = counted.get(queue, 1)
            # One that only looks like a partition is a plain list, which another program declares.
            partitions[queue if number > 1 else name] = number
        return partitions
