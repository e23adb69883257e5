"""
Where pushes go, and how those of one event loop are batched.

A `PushTarget` is a client, one whose pushes are confirmed, or one that stores them for later. A `PushBatcher` puts into
one call what is pushed in one tick of the loop, or while the call before it is in flight.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from conveyor.errors import ConfigurationError, ConveyorError, Duplicate, QueueFull, StoreUnavailable
from conveyor.ids import new_identity
from conveyor.store import operations
from conveyor.store.max_length import MaxLength, declared_length
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.script import Call
from conveyor.store.transport.async_connection import AsyncConnection
from conveyor.store.transport.replies import NO_TIMEOUT, CallTimeout, unavailable
from conveyor.units import span

if TYPE_CHECKING:
    from conveyor.store.client.durability import DurabilityRequest
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Entry
    from conveyor.store.script import Argument
    from conveyor.store.transport.endpoint import Endpoint

T = TypeVar("T")
BULK = 1000
"""Jobs per call of a bulk push: enough to share the round trip, short enough not to delay other clients."""


class PushTarget(Protocol):
    """Where pushes go."""

    @property
    def deferred(self) -> bool:
        """True when pushes reach Redis later, so it cannot be asked for anything now."""
        ...

    def push(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]: ...
    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None: ...
    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]: ...


class PushTargetResolver(Protocol):
    """Decides whether pushes go somewhere else right now."""

    def __call__(self, durability_request: DurabilityRequest | None = None) -> PushTarget | None:
        """Return that target, None for Redis; raises ConfigurationError where it cannot give what one push asks for."""
        ...


ResultFuture = asyncio.Future[Any]
PendingPush = (
    tuple[str, bytes, ResultFuture, float, None] | tuple[Sequence[Entry], None, ResultFuture, float, MaxLength | None]
)
"""
A plain message (id, envelope), or entries; the future of its caller; since when it waits (the loop's time); and the maximum
length with its place in the line of those that wait for room, None without one: it is pushed from there when it is sent alone.
"""


class LoopConnections:
    """
    The connections of one event loop and, per queue, the batcher of its pushes.

    The loop is held weakly. `endpoint_of` returns the endpoint of keys; pushes are retried for `retry_for` seconds.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: Callable[[QueueKeys | str], Endpoint],
        retry_for: float,
        make: Callable[[AsyncConnection, QueueKeys, int, float], PushBatcher] | None = None,
        timeout: CallTimeout = NO_TIMEOUT,
    ) -> None:
        self.loop = weakref.ref(loop)
        self._endpoint_of, self._timeout = endpoint, timeout
        self._connections: dict[Endpoint, AsyncConnection] = {}
        self.connection = self.connection_to(endpoint(""))
        self._retry_for = retry_for
        self._make_batcher = make or PushBatcher
        self._batchers: dict[tuple[str, int, int], PushBatcher] = {}

    def batcher(self, keys: QueueKeys, max_length: int) -> PushBatcher:
        """Return the batcher for *keys*."""
        if isinstance(max_length, MaxLength):
            max_length = declared_length(max_length)
        key = (keys.prefix, max_length, keys.partitions)
        batcher = self._batchers.get(key)
        if batcher is None:
            connection = self.connection_to(self._endpoint_of(keys))
            batcher = self._batchers[key] = self._make_batcher(connection, keys, max_length, self._retry_for)
        return batcher

    def connection_to(self, endpoint: Endpoint) -> AsyncConnection:
        """Return the connection to *endpoint*."""
        connection = self._connections.get(endpoint)
        if connection is None:
            connection = self._connections[endpoint] = AsyncConnection(endpoint, self._timeout)
        return connection

    @property
    def is_idle(self) -> bool:
        """True when nothing waits for an answer, and no push to be sent."""
        connections, batchers = self._connections.values(), self._batchers.values()
        return not (any(one.is_busy for one in connections) or any(one.is_busy for one in batchers))

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()


class PushBatcher:
    """
    Batches the pushes of one queue; *max_length* 0: no limit.

    Cancelling a future leaves its push in flight: whether it was stored is then unknown, as with any lost reply.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        keys: QueueKeys,
        max_length: int,
        retry_for: float,
        *,
        on_new_queue: Callable[[QueueKeys], Awaitable[None]] | None = None,
        own_wait: float = 0.0,
    ) -> None:
        """
        *on_new_queue* is awaited after a push that found the queue new in Redis; *own_wait*: seconds that a push may wait
        for what it asks for, beside the connection's timeout.
        """
        self._connection, self._keys, self._max_length, self._retry_for = connection, keys, max_length, retry_for
        self._on_new_queue = on_new_queue
        self._sequence = ProducerSequence(new_identity())
        self._waiting: deque[PendingPush] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        longest = connection.timeout.longest
        self._longest_wait = None if longest is None else max(longest, retry_for) + own_wait
        self._in_flight: list[PendingPush] = []
        self._answered_at = 0.0
        self._overdue_timer: asyncio.TimerHandle | None = None

    def put(self, id: str, envelope: bytes) -> asyncio.Future[None]:  # noqa: A002
        """Push one plain message."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((id, envelope, future, self._loop.time(), None))
        if self._sender is None:
            self._start()
        return future

    def push(self, entries: Sequence[Entry], max_length: int = 0) -> asyncio.Future[list[str]]:
        """Push *entries*; the future yields an id for each. *max_length* may have a place in the line for room."""
        future: asyncio.Future[list[str]] = self._loop.create_future()
        place = max_length if isinstance(max_length, MaxLength) and max_length.place else None
        self._waiting.append((entries, None, future, self._loop.time(), place))
        if self._sender is None:
            self._start()
        return future

    @property
    def is_busy(self) -> bool:
        """True while pushes wait, or are under way."""
        return self._sender is not None

    def _start(self) -> None:
        self._sender = self._loop.create_task(self._send())
        if self._overdue_timer is None and self._longest_wait is not None:
            self._overdue_timer = self._loop.call_later(self._longest_wait, self._check_overdue)

    def _check_overdue(self) -> None:
        """Fail what has waited too long since it came, or since Redis answered: one timer for all pushes."""
        self._overdue_timer = None
        assert self._longest_wait is not None
        begun = self._loop.time() - self._longest_wait
        for batch in (self._in_flight, self._waiting):
            for one in batch:  # the oldest first
                since = max(one[3], self._answered_at)
                if since > begun:
                    self._overdue_timer = self._loop.call_at(since + self._longest_wait, self._check_overdue)
                    return
                if not one[2].done():
                    why = f"no answer to a push within {span(self._longest_wait)}"
                    one[2].set_exception(unavailable(str(self._connection.endpoint), why))

    async def _send(self) -> None:
        try:
            while self._waiting:
                batch: list[PendingPush] = []
                plain, size = True, 0
                while self._waiting and size < BULK:
                    one = self._waiting.popleft()
                    if one[2].done():
                        continue  # nobody waits for it and nothing was sent
                    batch.append(one)
                    size += 1 if one[1] is not None else len(one[0])
                    plain = plain and one[1] is not None
                if batch:
                    self._in_flight = batch
                    await self._deliver(batch, plain)
                    self._in_flight = []
        finally:
            self._sender, self._in_flight = None, []

    async def send_batch(self, batch: list[PendingPush], plain: bool) -> list[str]:
        """Send one call; return an id for each entry, none for plain messages."""
        if plain:
            pairs = [part for one in batch for part in one[:2]]
            call = operations.push_plain(self._keys, self._sequence, pairs, max_length=self._max_length)  # type: ignore[arg-type]
            if await self.run(call) and self._on_new_queue is not None:
                await self._on_new_queue(self._keys)
            return []
        entries = entries_of(batch)
        max_length = batch[0][4] or self._max_length if len(batch) == 1 else self._max_length
        ids = await self.run(operations.push(self._keys, self._sequence, entries, max_length=max_length))
        if isinstance(ids, operations.NewQueueIds) and self._on_new_queue is not None:
            await self._on_new_queue(self._keys)
        return ids

    def new_sequence(self) -> ProducerSequence:
        """Return a fresh sequence."""
        return ProducerSequence(new_identity())

    async def _deliver(self, batch: list[PendingPush], plain: bool) -> None:
        try:
            ids = await self.send_batch(batch, plain)
        except (QueueFull, Duplicate) as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for one in batch:  # they are refused together; some may be accepted alone
                await self._deliver([one], one[1] is not None)
        except (ConveyorError, operations.StalePush) as error:
            # The repeats may still arrive. With a new sequence their number is not taken for that of a later push.
            self._sequence = self.new_sequence()
            _fail(batch, error)
        except BaseException as error:
            _fail(batch, error)
            raise
        else:
            self._answered_at = self._loop.time()
            self.resolve(batch, ids)

    async def run(self, call: Call[T]) -> T:
        """Carry out one push."""
        return await self._connection.run(call, retry_for=self._retry_for)

    def resolve(self, batch: list[PendingPush], ids: list[str]) -> None:
        """Give each waiting push its ids."""
        _answer(batch, ids)


def chunks(entries: Sequence[Entry], whole: bool) -> list[Sequence[Entry]]:
    """Return *entries* in parts of `BULK`, one call each; as one part when *whole*."""
    step = len(entries) or 1 if whole else BULK
    return [entries[first : first + step] for first in range(0, len(entries), step)]


def partly_full(full: QueueFull, stored: int) -> QueueFull:
    """Return the error of a push in parts of which *stored* jobs were stored before."""
    if not stored:
        return full
    return QueueFull(
        f"{str(full).replace('Nothing was enqueued. ', '')}\nThe first {stored:,} jobs were stored, the rest was not."
    )


def refuse_undroppable(keys: QueueKeys, entries: Sequence[Entry]) -> None:
    """Raise ConfigurationError for jobs that a queue with full="drop-oldest" does not take: their keys outlive no drop."""
    for entry in entries:
        found = [
            name
            for name, given in (("unique key", entry.placing_key), ("group", entry.group), ("limit", entry.limits))
            if given
        ]
        if found:
            raise ConfigurationError(
                f"Queue '{keys.queue}' drops the oldest when it is full (full='drop-oldest'), and a job with a {found[0]} cannot "
                f"be dropped for a newer one. Leave the {found[0]} out, or declare the queue with full='raise' or full='block'. "
                "Nothing was stored."
            )


def entries_of(batch: list[PendingPush]) -> list[Entry]:
    """Return all entries of a batch, in order."""
    return [entry for one in batch for entry in _entries(one)]


def _entries(one: PendingPush) -> Sequence[Entry]:
    return one[0] if one[1] is None else (Entry(one[0], one[1]),)


def _answer(batch: list[PendingPush], ids: list[str]) -> None:
    at = 0
    for first, envelope, future, *_ in batch:
        if envelope is not None:
            at += 1
            if not future.done():
                future.set_result(None)
            continue
        if not future.done():
            future.set_result(ids[at : at + len(first)])
        at += len(first)


def _fail(batch: list[PendingPush], error: BaseException) -> None:
    cause = StoreUnavailable(str(error)) if not isinstance(error, Exception) else error
    for _, _, future, *_ in batch:
        if not future.done():
            future.set_exception(cause)
