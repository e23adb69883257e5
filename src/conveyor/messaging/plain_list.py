"""A plain Redis list of JSON documents, shared with programs that do not use Conveyor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from conveyor.errors import ConfigurationError
from conveyor.messaging.consumer.list_mover import intake
from conveyor.messaging.publisher import Plan, PlannedPush, Publisher
from conveyor.messaging.push_options import PLAIN_PUSH, PreparedPush, PushMiddleware
from conveyor.messaging.queue import Queue
from conveyor.messaging.retry import Retry
from conveyor.payload.codec import MAX_PAYLOAD, ValueCodec
from conveyor.store import inspection, plain_list
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, CallProgram

T = TypeVar("T")
BARE = PreparedPush(b"")
"""An entry of a list has no envelope."""


class PlainList(Queue[T]):
    """
    A queue on a plain Redis list. Any program that does ``RPUSH`` is a producer, any that does ``BLPOP`` a consumer.

    Entries taken through Conveyor get leases, retries and dead letters. A pushed entry is the bare JSON document, so it
    has no id (`push` returns an empty text) and takes none of the options of a queue. An entry that is not JSON, or not
    of the declared type, becomes a dead letter with its bytes kept.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        lease_ms: int,
        task: str | None = None,
        max_attempts: int | None = None,
        retry: Retry | None = None,
        max_payload: int = MAX_PAYLOAD,
        middlewares: Sequence[PushMiddleware] = (),
    ) -> None:
        """Declare the list; *task* is the name of the task that runs its entries."""
        super().__init__(
            client, name, type, lease_ms=lease_ms, max_attempts=max_attempts, retry=retry, max_payload=max_payload,
            middlewares=middlewares,
        )  # fmt: skip
        self.task = task

    def _checked_name(self, name: str) -> str:
        if not isinstance(name, str) or not 1 <= len(name) <= 512 or not name.isprintable():
            raise ConfigurationError(f"The name of a plain list is 1 to 512 printable characters, not {name!r}.")
        return name

    def _keys(self) -> QueueKeys:
        return QueueKeys(self.client.namespace, self.name, foreign=self.name)

    def _make_publisher(self) -> Publisher[T]:
        return ListPublisher(self.client, self.keys, self.codec, self._middlewares)

    def _publisher_for(self, options: PreparedPush) -> Publisher[T]:
        if self.client.deferring:
            raise ConfigurationError(
                f"A plain list holds bare documents, so '{self.name}' cannot be delivered exactly once from an outbox. "
                "Nothing was stored. Push to it after the commit, or use a queue.",
                code="E46",
            )
        return self._publisher

    def _intake(self) -> Callable[[int], Call[int]] | None:
        return partial(intake, self.keys)

    def _purge(self, dead: bool) -> CallProgram[int]:
        if not dead:
            yield from self._move_in()
        return (yield from super()._purge(dead))

    def repartition(self, partitions: int) -> int:
        """Raise ConfigurationError: a plain list is one key."""
        raise ConfigurationError(f"The plain list '{self.name}' is one key and cannot lie in {partitions} partitions.")

    async def arepartition(self, partitions: int) -> int:
        """Awaitable form of `repartition`."""
        return self.repartition(partitions)

    def _move_in(self) -> CallProgram[int]:
        """Move the entries that are on the list now into the queue, where they can be purged."""
        counts = yield inspection.counts(self.keys)
        moved = 0
        while moved < counts.ready:
            count = yield intake(self.keys, min(500, counts.ready - moved))
            if count == 0:
                break
            moved += count
        return moved


class ListPublisher(Publisher[T]):
    """Appends values to a plain list."""

    def __init__(
        self, client: Client, keys: QueueKeys, codec: ValueCodec[T], middlewares: Sequence[PushMiddleware]
    ) -> None:
        super().__init__(client, client, keys, codec, None, middlewares)
        self._sequences = plain_list.SequencePool()

    def push(self, value: T, options: PreparedPush) -> str:
        """Append one document; it has no id."""
        self._send(self._entry(value, options))
        return ""

    async def apush(self, value: T, options: PreparedPush) -> str:
        """Awaitable form of `push`."""
        await self._asend(self._entry(value, options))
        return ""

    def plan(self, values: Iterable[T], options: PreparedPush) -> Plan:
        """Plan to append documents in their order; return an empty text for each."""
        _refuse(options)
        ids = yield from super().plan(values, BARE)
        return [""] * len(ids)

    def _entry(self, value: T, options: PreparedPush) -> PlannedPush:
        _refuse(options)
        if self._middlewares:
            value, _ = self._passed(value, BARE)
        return PlannedPush(self._keys, (), (self._codec.encode(value),), BARE)

    def _passed(self, value: Any, options: PreparedPush) -> tuple[Any, PreparedPush]:
        """Return a value as the middlewares leave it. Their headers are left out: a bare document has no place for them."""
        passed, changed = super()._passed(value, PLAIN_PUSH)
        _refuse(replace(changed, head=PLAIN_PUSH.head))
        return passed, options

    def _send(self, push: PlannedPush) -> Sequence[str]:
        self._client.announce(self._keys)
        with self._sequences.lend() as sequence:
            self._client.run(plain_list.push(self._keys, sequence, push.envelopes))
        return push.ids

    async def _asend(self, push: PlannedPush) -> Sequence[str]:
        await self._client.aannounce(self._keys)
        with self._sequences.lend() as sequence:
            await self._client.arun(plain_list.push(self._keys, sequence, push.envelopes))
        return push.ids


def _refuse(options: PreparedPush) -> None:
    if options != PLAIN_PUSH or options.durability_request is not None:
        raise ConfigurationError(
            "A plain list holds bare documents, so a push takes no delay, at, priority, id, unique, expires, headers, "
            "tags, front, fsync or wait_replicas. Nothing was stored. Use a queue for these."
        )
