"""
The queues and plain lists that an app declares: each once, and always the same object.

The part of an app that pushes prepared jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.jobs.job_options import positive_ms
from conveyor.jobs.task import Task
from conveyor.payload.formats import Choice, FormatRegistry
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability, DurabilityOptions, DurabilityRequest, requested_durability
from conveyor.store.operations import Entry
from conveyor.units import Duration

if TYPE_CHECKING:
    from conveyor.messaging.partitions import Partitions
    from conveyor.messaging.plain_list import PlainList
    from conveyor.messaging.queue import Queue
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.keys import QueueKeys


class Sending:
    """Pushes entries to queues, as each of them is declared."""

    client: Client
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
            found = self._keys[queue] = self.client.keys(queue)
        return found

    def placed(self, queue: str, entry: Entry) -> str:
        """Return where a job of *queue* goes: the queue, or one of its partitions."""
        found = self.partitioned.get(queue)
        return queue if found is None else found.placed(entry)

    def send(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]:
        """Push prepared entries, placed, and return the id of each: its own, or that of a job that existed."""
        way = self.client.push_target(self._asks(queue), durability_request)
        if self.partitioned and not way.deferred and (found := self.partitioned.get(ids.logical(queue))):
            return found.send(queue, entries, way)
        return way.push(self.keys(queue), entries, max_length=self._max_length(queue))

    async def asend(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]:
        """Do the same without blocking the event loop."""
        way = self.client.push_target(self._asks(queue), durability_request)
        if self.partitioned and not way.deferred and (found := self.partitioned.get(ids.logical(queue))):
            return await found.asend(queue, entries, way)
        return await way.apush(self.keys(queue), entries, max_length=self._max_length(queue))

    def _asks(self, queue: str) -> Durability | None:
        found = self.bounded.get(ids.logical(queue) if self.partitioned else queue)
        return None if found is None else found.asks

    def _max_length(self, queue: str) -> int:
        found = self.bounded.get(queue)
        return 0 if found is None else found.max_length or 0


T = TypeVar("T")
Full = Literal["raise", "block", "drop-oldest"]
Step = Callable[[int, Any], Any]
"""From a version and a message of it to the message as the next version has it."""


class QueueRegistry(Sending):
    """What an app knows of its queues."""

    sealing: PayloadPipeline | None
    lease_ms: int
    max_payload: int
    max_whole: int
    formats: FormatRegistry

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.queues: dict[str, Queue[Any]] = {}
        self.plain_lists: dict[str, PlainList[Any]] = {}
        self.bounded: dict[str, Queue[Any]] = {}
        self.partitioned: dict[str, Partitions] = {}
        self._declared: dict[str, dict[str, object]] = {}
        self._keys: dict[str, QueueKeys] = {}

    @overload
    def queue(
        self, name: str, *, partitions: int = 1, lease: Duration | None = None, max_attempts: int = 5,
        max_length: int | None = None, full: Full = "raise", version: int = 1, upcast: Step | None = None,
        format: Choice | None = None, **durable: Unpack[DurabilityOptions],
    ) -> Queue[Any]: ...  # fmt: skip
    @overload
    def queue(
        self, name: str, type: type[T], *, partitions: int = 1, lease: Duration | None = None, max_attempts: int = 5,
        max_length: int | None = None, full: Full = "raise", version: int = 1, upcast: Step | None = None,
        format: Choice | None = None, **durable: Unpack[DurabilityOptions],
    ) -> Queue[T]: ...  # fmt: skip
    @overload
    def queue(
        self, name: str, type: Any, *, partitions: int = 1, lease: Duration | None = None, max_attempts: int = 5,
        max_length: int | None = None, full: Full = "raise", version: int = 1, upcast: Step | None = None,
        format: Choice | None = None, **durable: Unpack[DurabilityOptions],
    ) -> Queue[Any]: ...  # fmt: skip

    def queue(
        self,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        partitions: int = 1,
        lease: Duration | None = None,
        max_attempts: int = 5,
        max_length: int | None = None,
        full: Full = "raise",
        version: int = 1,
        upcast: Step | None = None,
        format: Choice | None = None,  # noqa: A002
        **durable: Unpack[DurabilityOptions],
    ) -> Queue[Any]:
        """
        Declare a queue of messages of *type* (any JSON value when left out), or set up one that tasks use.

        `lease` as for the app, `max_attempts` how often a message is tried, `max_length` how many may be unfinished,
        `full` what a push beyond that does, `version`, `upcast(version, value)` and `format` as of a task. With `partitions` it
        is spread over so many, which may lie on several nodes: order holds within each, and all programs must say the
        same number. `fsync` and `wait_replicas` make each push, of jobs too, wait until it is on disk and that many
        replicas have it, each for `wait_timeout`; then DurabilityNotReached. Declared again with the same options it is
        the same object; with others it raises ConfigurationError.
        """
        ids.queue_name(name)
        lease_ms = self.lease_ms if lease is None else positive_ms(lease, "lease")
        asks = requested_durability(durable)
        facts = {
            "kind": "queue", "type": type, "lease_ms": lease_ms, "max_attempts": max_attempts, "max_length": max_length,
            "full": full, "partitions": partitions, "version": version, "upcast": upcast, "durability": asks, "format": format,
        }  # fmt: skip
        if self._is_declared(name, facts):
            return self.queues[name]
        queue = self._made(
            name, type, partitions, lease_ms=lease_ms, max_attempts=max_attempts, max_length=max_length, full=full,
            asks=asks, max_payload=self.max_whole, sealing=self.sealing, version=version, upcast=upcast,
            formats=self.formats.writing(format),
        )  # fmt: skip
        self.queues[name], self._declared[name] = queue, facts
        if max_length is not None or asks is not None or name in self.partitioned:
            self.bounded[name] = queue
        return queue

    def _made(self, name: str, type: Any, partitions: int, **options: Any) -> Queue[Any]:  # noqa: A002
        from conveyor.messaging.queue import Queue

        if partitions == 1 and isinstance(partitions, int) and not isinstance(partitions, bool):
            return Queue(self.client, name, type, **options)
        from conveyor.messaging.partitioned_queue import PartitionedQueue

        queue: PartitionedQueue[Any] = PartitionedQueue(self.client, name, type, partitions=partitions, **options)
        self.partitioned[name] = queue.partitions
        self._keys.update((keys.queue, keys) for keys in queue.partitions.keys)
        return queue

    def plain_list(
        self,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        task: Task[..., Any] | str | None = None,
        lease: Duration | None = None,
        max_attempts: int = 5,
        sealed: bool = True,
    ) -> PlainList[Any]:
        """
        Declare a plain Redis list of JSON documents, shared with programs that know nothing of us.

        With *task* its entries run as jobs of that task. The rest is as in `queue`. Nobody can seal them, so an app
        with keys takes them only when told so: ``sealed=False``.
        """
        if sealed and self.sealing is not None and self.sealing.seal is not None:
            raise ConfigurationError(
                f"plain_list({name!r}): programs that know nothing of us cannot seal, and this app takes only sealed "
                "payloads. If whoever can write to that list may be trusted, say so: plain_list(…, sealed=False)."
            )
        fed = task.name if isinstance(task, Task) else task
        lease_ms = self.lease_ms if lease is None else positive_ms(lease, "lease")
        facts = {
            "kind": "plain list", "type": type, "task": fed, "lease_ms": lease_ms, "max_attempts": max_attempts,
        }  # fmt: skip
        if self._is_declared(name, facts):
            return self.plain_lists[name]
        from conveyor.messaging.plain_list import PlainList

        found: PlainList[Any] = PlainList(
            self.client, name, type, task=fed, lease_ms=lease_ms, max_attempts=max_attempts,
            max_payload=self.max_payload,
        )  # fmt: skip
        self.plain_lists[name], self._declared[name] = found, facts
        self._keys[name] = found.keys  # they lie where the list lies
        return found

    def _is_declared(self, name: str, facts: dict[str, object]) -> bool:
        if name not in self._declared:
            return False
        if self._declared[name] != facts:
            raise ConfigurationError(
                f"{name!r} is declared twice, with different options: {_difference(self._declared[name], facts)}. "
                "Declare it once and import it where it is used."
            )
        return True

    def queue_lease_ms(self, queue: str) -> int:
        """Return the lease of *queue* in ms."""
        found = self.queues.get(queue, self.plain_lists.get(queue))
        return self.lease_ms if found is None else found.lease_ms


def _difference(one: dict[str, object], other: dict[str, object]) -> str:
    """Return what two declarations say otherwise, in the words of the options."""
    differing = [name for name in one if one[name] != other.get(name)]
    return " and ".join(", ".join(f"{name}={_shown(facts.get(name))}" for name in differing) for facts in (one, other))


def _shown(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("typing.")
