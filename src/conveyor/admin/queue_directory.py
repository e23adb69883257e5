"""Queues by the names that people use: a queue with all partitions, or one partition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from conveyor import ids
from conveyor.errors import ConfigurationError, QueueNotFound, StoreUnavailable
from conveyor.messaging.partitions import likely_first, partition_count, partition_names
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.inspection import CountedPart, Ended, QueueCounts
from conveyor.store.keys import QueueKeys, queue_key
from conveyor.store.script import Call

if TYPE_CHECKING:
    from conveyor.messaging.queue import Queue

_LEASE_MS = 15_000  # administration leases nothing
_AT_A_TIME = 100
"""Queues that one step counts, in a millisecond or two."""


class QueueDirectory:
    """
    The known queues of a client.

    *plain_lists* are the names of lists that are shared with other programs; Redis does not record which ones are. *known*: all
    queues with their partitions, as `everything` returned them; None: they are read for each question.
    """

    def __init__(
        self, client: Client, plain_lists: Collection[str] = (), known: Mapping[str, list[str]] | None = None
    ) -> None:
        self._client = client
        self._plain_lists = frozenset(plain_lists)
        self._known = known

    def names(self) -> list[str]:
        """Return the names of all known queues, sorted."""
        return list(self.everything())

    def knowing(self, known: Mapping[str, list[str]]) -> QueueDirectory:
        """Return the same directory, which takes *known* for all queues there are and reads none."""
        return QueueDirectory(self._client, self._plain_lists, known)

    def everything(self) -> Mapping[str, list[str]]:
        """Return the names of all known queues, sorted, each with the names of its partitions; one read of them all."""
        if self._known is not None:
            return self._known
        known = self._partition_counts()
        return {
            name: [name] if (number := known[name]) == 1 else partition_names(name, number) for name in sorted(known)
        }

    def partition_names(self, name: str) -> list[str]:
        """
        Return the names of a queue's partitions; a partition (``orders/3``) names itself alone.

        Raises QueueNotFound.
        """
        known = self.everything()
        if _checked(name) in known:
            return known[name]
        if name in known.get(ids.logical(name), ()):
            return [name]
        names = list(known)
        listed = (
            f"Known: {', '.join(names[:10])}{', …' if len(names) > 10 else '.'}" if names else "There are no queues."
        )
        raise QueueNotFound(f"No queue {name!r} in namespace {self._client.namespace!r}. {listed}")

    def all_partition_names(self, id: str) -> list[str]:  # noqa: A002
        """
        Return the partitions of all queues.

        Those come first in which a caller's own *id* would be stored.
        """
        return likely_first([part for parts in self.everything().values() for part in parts], id)

    def keys(self, name: str) -> QueueKeys:
        """Return the keys of a partition."""
        foreign = name if name in self._plain_lists else None
        return QueueKeys(self._client.namespace, name, foreign=foreign)

    def key(self, name: str, key: Literal["jobs", "workers", "conf"]) -> str:
        """Return one key of a partition, which costs less than all of its keys."""
        if name in self._plain_lists:
            found: str = getattr(self.keys(name), key)
            return found
        return queue_key(self._client.namespace, name, key)

    def steps(self, parts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
        """Yield queues and partitions as a script may read them in one step: *size* at one server, each alone in a cluster."""
        size = size if self._client.has_one_endpoint else 1
        for first in range(0, len(parts), size):
            yield parts[first : first + size]

    def counts_and_ended(
        self, parts: Sequence[str], minutes: int, ask: Callable[[str, Call[Any]], Any] | None = None, *, workers: bool = False
    ) -> dict[str, CountedPart]:  # fmt: skip
        """
        Return the counts of queues and partitions, with what ended in each of the last whole minutes, and with *workers*.

        *ask* makes each step, and returns None where a server does not answer; without it that raises StoreUnavailable.
        """
        found: dict[str, CountedPart] = {}
        ask = ask or (lambda _, call: self._client.run(call))
        for part in self._plain_lists.intersection(parts):  # their entries are in the list itself
            keys = self.keys(part)
            if (counts := ask(part, inspection.counts(keys))) is not None:
                beside = None
                if minutes or workers:
                    beside = ask(part, inspection.count_queues([keys.jobs], minutes, workers=workers))
                found[part] = beside[0]._replace(counts=counts) if beside else CountedPart(counts)
        size = _AT_A_TIME if self._client.has_one_endpoint else 1
        rest = [part for part in parts if part not in self._plain_lists]
        at = 0
        while at < len(rest):
            some = rest[at : at + size]
            jobs_of = [self.key(part, "jobs") for part in some]
            counted = ask(some[0], inspection.count_queues(jobs_of, minutes, workers=workers))
            found.update(zip(some, counted or (), strict=False))
            at += len(some if counted is None else counted)
        return found

    def counts(self, name: str) -> QueueCounts:
        """Count the jobs and workers of a queue, or of one partition."""
        return inspection.total(
            [self._client.run(inspection.counts(self.keys(part))) for part in self.partition_names(name)]
        )

    def queue(self, name: str) -> Queue[Any]:
        """Return the queue to act on. Raises QueueNotFound, and ConfigurationError for a partition."""
        # A command that only reads loads none of them.
        from conveyor.messaging.partitioned_queue import PartitionedQueue
        from conveyor.messaging.plain_list import PlainList
        from conveyor.messaging.queue import Queue

        if _checked(name) in self._plain_lists:
            return PlainList(self._client, name, lease_ms=_LEASE_MS)
        if (queue := ids.logical(name)) != name and len(self.partition_names(queue)) > 1:
            raise ConfigurationError(f"'{name}' is a partition, which can only be read. Name the queue: {queue}")
        number = len(self.partition_names(name))
        if number == 1:
            return Queue(self._client, name, lease_ms=_LEASE_MS)
        return PartitionedQueue(self._client, name, lease_ms=_LEASE_MS, partitions=number)

    def _count_partitions(self, queue: str, names: Collection[str]) -> int:
        """Return the recorded number of partitions; while the server that records it is away, what the known *names* say."""
        keys = self._client.keys(queue)
        if not self._client.is_away(keys):
            try:
                return partition_count(self._client, queue)
            except StoreUnavailable:
                if not self._client.note_away(keys):
                    raise
        return max(int(name.rpartition("/")[2]) for name in names if name != queue and ids.logical(name) == queue) + 1

    def _partition_counts(self) -> dict[str, int]:
        """Return queue → number of partitions."""
        counted: dict[str, int] = {}
        names = self._client.queues()
        partitions = dict.fromkeys([*self._plain_lists, *[name for name in names if "/" not in name]], 1)
        for name in [name for name in names if "/" in name]:
            queue = name if name in self._plain_lists else ids.logical(name)
            if queue != name and queue not in counted:
                counted[queue] = self._count_partitions(queue, names)
            number = counted.get(queue, 1)
            # A name that only looks like a partition belongs to a plain list that another program declares.
            partitions[queue if number > 1 else name] = number
        return partitions


def ended_in(parts: Sequence[str], counted: Mapping[str, CountedPart]) -> Sequence[Ended]:
    """Return what ended in a queue with these partitions, of those that answered; nothing where none did."""
    answers = [counted[part].ended for part in parts if part in counted]
    found = answers[0] if answers else ()
    for ended in answers[1:]:
        found = [_sum(*both) for both in zip(found, ended, strict=True)]
    return found


def _sum(one: Ended, other: Ended) -> Ended:
    return Ended(*(-1 if -1 in both else sum(both) for both in zip(one, other, strict=True)))


def _checked(name: object) -> str:
    if not isinstance(name, str):
        raise ConfigurationError(f"The name of a queue is a text, not {name!r}. Nothing was done.")
    return name
