"""
Pushes that ask for more than being stored: an fsync, or replicas.

They travel on connections of their own, batched by what they ask. The wait (WAIT, WAITAOF) goes right behind the push, in
the same write on the same connection, because it covers only what that connection wrote.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from conveyor.errors import ConfigurationError, DurabilityNotReached
from conveyor.ids import new_identity, public
from conveyor.store import operations
from conveyor.store.client.batching import PendingPush, PushBatcher, chunks
from conveyor.store.client.durability import (
    Confirmation,
    Durability,
    FsyncMethod,
    FsyncWatch,
    WaitInterrupted,
    after_partial_push,
    decide_fsync_method,
)
from conveyor.store.fork_safety import on_fork
from conveyor.store.max_length import declared_length
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.script import Argument, Call
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection, is_error_reply
from conveyor.store.transport.replies import CallTimeout

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.endpoint import Endpoint

T = TypeVar("T")
PROBE_INTERVAL = 10.0
"""Seconds after which the server settings that a connection relies on are read again."""
MAX_CONNECTIONS = 8
"""Connections of one event loop and endpoint for confirmed pushes: one that waits for a dead replica delays an eighth."""
UNCONFIRMED = Confirmation(synced=False, replicas=0)


class ClientProtocol(Protocol):
    """The part of a client that confirmed pushes use."""

    @property
    def retry_for(self) -> float: ...
    @property
    def timeout(self) -> CallTimeout: ...
    def endpoint(self, keys: QueueKeys) -> Endpoint: ...
    def announce(self, keys: QueueKeys) -> None: ...
    async def aannounce(self, keys: QueueKeys) -> None: ...
    def announce_again(self, keys: QueueKeys) -> None: ...
    async def aannounce_again(self, keys: QueueKeys) -> None: ...


class ConfirmedTarget:
    """Pushes of a client that ask for the same durability: each returns when it is confirmed."""

    deferred = False

    def __init__(self, confirmer: ConfirmedConnections, durability: Durability) -> None:
        self._connections = confirmer
        self._durability = durability

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """
        Store *entries* and wait, once for each thousand.

        Raises DurabilityNotReached with the ids of all that this call stored: what follows the thousand that was not confirmed is
        not stored.
        """
        durability, ids = self._durability, list[str]()
        with self._connections.lend(keys) as (connection, sequence):
            for part in chunks(entries, whole):
                call = operations.push(keys, sequence, part, max_length=max_length)
                accepted, confirmation = connection.confirm(
                    call, durability, retry_for=self._connections.client.retry_for
                )
                if isinstance(accepted, operations.NewQueueIds):
                    self._connections.client.announce_again(keys)
                if not durability.is_reached_by(confirmation):
                    failure = durability.failure(keys.queue, accepted, confirmation)
                    raise after_partial_push(failure, _public(keys, ids)) if len(entries) > len(part) else failure
                ids += accepted
        return ids

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Store plain messages (id, envelope, id, envelope, …) and wait."""
        self.push(keys, operations.plain_entries(pairs), max_length=max_length)

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Awaitable form of `push`; pushes of one tick with the same durability share a call."""
        await self._connections.client.aannounce(keys)
        sequence = self._connections.batcher(keys, max_length, self._durability)
        ids: list[str] = []
        for part in chunks(entries, whole):
            try:
                ids += await sequence.push(part, max_length)
            except DurabilityNotReached as error:
                if len(part) == len(entries):
                    raise
                raise after_partial_push(error, _public(keys, ids)) from None
        return ids


def _public(keys: QueueKeys, ids: Sequence[str]) -> list[str]:
    return [public(keys.queue, id_) for id_ in ids]


class ConfirmedConnections:
    """
    The connections of one app for confirmed pushes, each opened on first use.

    `refuse_in_loop` raises where blocking calls are not allowed.
    """

    def __init__(self, client: ClientProtocol, refuse_in_loop: Callable[[], None]) -> None:
        self.client = client
        self._refuse_in_loop = refuse_in_loop
        self._reset()
        on_fork(self)

    def _reset(self) -> None:
        self._free: dict[Endpoint, deque[tuple[ConfirmedConnection, ProducerSequence]]] = {}
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()

    @contextmanager
    def lend(self, keys: QueueKeys) -> Iterator[tuple[ConfirmedConnection, ProducerSequence]]:
        """Lend a connection and its sequence, after the queue was announced."""
        self._refuse_in_loop()
        self.client.announce(keys)
        endpoint = self.client.endpoint(keys)
        free = self._free.setdefault(endpoint, deque())
        try:
            pair = free.pop()
        except IndexError:
            pair = ConfirmedConnection(endpoint, self.client.timeout), ProducerSequence(new_identity())
        try:
            yield pair
        finally:
            free.append(pair)

    def batcher(self, keys: QueueKeys, max_length: int, durability: Durability) -> ConfirmedBatcher:
        """Return this event loop's batcher for pushes to a queue with the same durability."""
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            state = self._loops[loop] = _LoopState()
        max_length = declared_length(max_length)
        batcher = state.batchers.get((keys.prefix, max_length, durability))
        if batcher is None:
            endpoint = self.client.endpoint(keys)
            connections = state.connections.setdefault(endpoint, [])
            if len(connections) < MAX_CONNECTIONS:
                connections.append(AsyncConfirmedConnection(endpoint, self.client.timeout))
            connection = connections[len(state.batchers) % len(connections)]
            batcher = ConfirmedBatcher(
                connection, keys, max_length, self.client.retry_for, durability, self.client.aannounce_again
            )
            state.batchers[keys.prefix, max_length, durability] = batcher
        return batcher

    async def confirm(self, keys: QueueKeys, call: Call[T], durability: Durability) -> tuple[T, Confirmation]:
        """Carry out one call on a connection of this event loop, after the queue was announced; return what was confirmed, too."""
        await self.client.aannounce(keys)
        connection = self.batcher(keys, 0, durability).confirmed_connection
        return await connection.confirm(call, durability, retry_for=self.client.retry_for)

    def close(self) -> None:
        """Close the blocking connections."""
        for free in self._free.values():
            while free:
                free.pop()[0].close()

    def aclose(self) -> None:
        """Close this event loop's connections."""
        state = self._loops.pop(asyncio.get_running_loop(), None)
        for connections in state.connections.values() if state is not None else ():
            for connection in connections:
                connection.close()

    def forked(self) -> None:
        """Start anew in a forked child: the parent keeps its sockets and sequences."""
        self._reset()


class _LoopState:
    """The connections and batchers for the confirmed pushes of one event loop."""

    def __init__(self) -> None:
        self.connections: dict[Endpoint, list[AsyncConfirmedConnection]] = {}
        self.batchers: dict[tuple[str, int, Durability], ConfirmedBatcher] = {}


class ConfirmedBatcher(PushBatcher):
    """Batches the pushes of one queue with the same durability."""

    def __init__(
        self,
        connection: AsyncConfirmedConnection,
        keys: QueueKeys,
        max_length: int,
        retry_for: float,
        durability: Durability,
        on_new_queue: Callable[[QueueKeys], Awaitable[None]],
    ) -> None:
        super().__init__(
            connection, keys, max_length, retry_for, on_new_queue=on_new_queue, own_wait=durability.seconds
        )
        self.confirmed_connection, self._durability, self._confirmation = connection, durability, UNCONFIRMED

    async def run(self, call: Call[T]) -> T:
        """Carry out one push."""
        reply, self._confirmation = await self.confirmed_connection.confirm(
            call, self._durability, retry_for=self._retry_for
        )
        return reply

    def resolve(self, batch: list[PendingPush], ids: list[str]) -> None:
        """Give each waiting push its ids, or the error of a push that was not confirmed."""
        if self._durability.is_reached_by(self._confirmation):
            super().resolve(batch, ids)
            return
        at = 0
        for first, _, future, *_ in batch:
            own = ids[at : at + len(first)]
            at += len(first)
            if not future.done():
                future.set_exception(self._durability.failure(self._keys.queue, own, self._confirmation))


class ConfirmedConnection(Connection):
    """A blocking connection whose pushes are followed by a wait."""

    def __init__(self, endpoint: Endpoint, timeout: CallTimeout) -> None:
        super().__init__(endpoint, timeout)
        self._pending_call: _ConfirmedCall | None = None
        self._probed_at = 0.0
        self._methods: dict[bool, FsyncMethod] = {}
        self._probed_socket: object = None

    def confirm(self, call: Call[T], durability: Durability, *, retry_for: float) -> tuple[T, Confirmation]:
        """Carry out *call* as `run` does; return its reply and what was confirmed."""
        pending = self._pending_call = _ConfirmedCall(durability, call.keys[0])
        try:
            return self.run(call, retry_for=retry_for), pending.confirmation
        finally:
            self._pending_call = None

    def execute(self, *command: Argument, block: float = 0.0) -> Any:
        """Send one command, followed by the commands that confirm it."""
        pending = self._pending_call
        if pending is None or command[0] not in {"EVALSHA", "EVAL"}:
            return super().execute(*command, block=block)
        try:
            self._probe(pending)
            reply = pending.read_replies(self._exchange(pending.commands(command), pending.durability.seconds))
        except WaitInterrupted:
            self.close()
            raise
        if isinstance(reply, Exception):
            raise reply
        if (watch := pending.fsync_watch()) is not None:
            while (
                pause := watch.next_pause(self._exchange([FsyncWatch.COMMAND], 0.0)[0], time.monotonic())
            ) is not None:
                time.sleep(pause)
            pending.confirmation = Confirmation(watch.synced, pending.confirmation.replicas)
        return reply

    def _probe(self, pending: _ConfirmedCall) -> None:
        """Ask a new connection what it can confirm, and every `PROBE_INTERVAL` seconds again."""
        connection = self._open()
        if connection is not self._probed_socket:
            self._methods, self._probed_socket = {}, connection
        now = time.monotonic()
        if now - self._probed_at > PROBE_INTERVAL:
            self._methods = {}
        method = self._methods.get(pending.durability.fsync)
        if method is None:
            pending.decide_method(self._exchange(pending.durability.probe_commands(), 0.0), str(self.endpoint))
            self._methods[pending.durability.fsync] = pending.method
            self._probed_at = now
        else:
            pending.method = method

    def _exchange(self, commands: Sequence[tuple[Argument, ...]], block: float) -> list[Any]:
        """Send *commands* in one write; return all replies, error replies as exceptions."""
        first = self._send(commands)
        replies: list[Any] = []
        for number in range(first, first + len(commands)):
            try:
                replies.append(self._receive(number, block))
            except Exception as error:
                if not is_error_reply(error):
                    raise
                replies.append(error)
        return replies


class AsyncConfirmedConnection(AsyncConnection):
    """The same on asyncio; one call at a time, since a wait delays whatever follows it."""

    def __init__(self, endpoint: Endpoint, timeout: CallTimeout) -> None:
        super().__init__(endpoint, timeout)
        self._call_lock = asyncio.Lock()
        self._pending_call: _ConfirmedCall | None = None
        self._probed_at = 0.0
        self._methods: dict[bool, FsyncMethod] = {}
        self._probed_stream: object = None

    async def confirm(
        self, call: Call[T], durability: Durability, *, retry_for: float | None
    ) -> tuple[T, Confirmation]:
        """Awaitable form of `ConfirmedConnection.confirm`."""
        async with self._call_lock:
            pending = self._pending_call = _ConfirmedCall(durability, call.keys[0])
            try:
                return await self.run(call, retry_for=retry_for), pending.confirmation
            finally:
                self._pending_call = None

    async def execute(self, *command: Argument, block: float = 0.0, within: float | None = None) -> Any:
        """Awaitable form of `ConfirmedConnection.execute`."""
        pending = self._pending_call
        if pending is None or command[0] not in {"EVALSHA", "EVAL"}:
            return await super().execute(*command, block=block, within=within)
        try:
            pending.within = await self.open_within(within)
            await self._probe(pending)
            reply = pending.read_replies(await self._exchange(pending.commands(command), pending.durability.seconds))
        except WaitInterrupted as error:
            self.drop(ConnectionLost(str(error)))
            raise
        if not isinstance(reply, Exception) and (watch := pending.fsync_watch()) is not None:
            while True:
                [facts] = await self._exchange([FsyncWatch.COMMAND], 0.0)
                if (pause := watch.next_pause(facts, time.monotonic())) is None:
                    break
                await asyncio.sleep(pause)
            pending.confirmation = Confirmation(watch.synced, pending.confirmation.replicas)
        return reply

    async def _probe(self, pending: _ConfirmedCall) -> None:
        now = time.monotonic()
        if self._probed_stream is not self._stream or now - self._probed_at > PROBE_INTERVAL:
            self._methods, self._probed_stream = {}, self._stream
        method = self._methods.get(pending.durability.fsync)
        if method is None:
            pending.decide_method(await self._exchange(pending.durability.probe_commands(), 0.0), str(self.endpoint))
            self._methods[pending.durability.fsync] = pending.method
            self._probed_at = now
        else:
            pending.method = method

    async def _exchange(self, commands: Sequence[tuple[Argument, ...]], block: float) -> list[Any]:
        """Send *commands* in one write; return all replies, error replies as exceptions."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        for command, future in zip(commands, futures, strict=True):
            within = None if self._pending_call is None else self._pending_call.within
            self.send(command, partial(_answer, future), block=block, within=within)
        return await asyncio.gather(*futures)


def _answer(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, OSError):
        future.set_exception(reply)
    else:
        future.set_result(reply)


class _ConfirmedCall:
    """One confirmed call: the durability, whether it was sent already, and what was confirmed."""

    __slots__ = ("began", "confirmation", "durability", "method", "sent", "sequence_key", "within")

    def __init__(self, durability: Durability, sequence: str) -> None:
        self.durability = durability
        self.sequence_key = sequence
        self.sent = False
        self.began = time.monotonic()
        self.within: float | None = None
        self.method = FsyncMethod.NONE
        self.confirmation = UNCONFIRMED

    def commands(self, command: tuple[Argument, ...]) -> list[tuple[Argument, ...]]:
        """
        Return the push and the commands that follow it.

        A repeat may be answered from its `lane:` key without a write, and a wait covers only what its connection wrote: a wait on
        a new connection would confirm nothing, at once. So a repeat touches that key. Every earlier write is before this one in
        the stream of replication and in the file.
        """
        touch = [("PEXPIRE", self.sequence_key, str(operations.LANE_MS))] if self.sent else []
        self.sent = True
        return [command, *touch, *self.durability.wait_commands(self.method)]

    def read_replies(self, replies: list[Any]) -> Any:
        """Note what was confirmed; return the first reply, that of the push."""
        waits = len(self.durability.wait_commands(self.method))
        if not isinstance(replies[0], Exception):
            self.confirmation = self.durability.read_replies(self.method, replies[len(replies) - waits :])
        return replies[0]

    def fsync_watch(self) -> FsyncWatch | None:
        """Return the watch for an fsync that is not confirmed yet, None if there is none."""
        if self.method is not FsyncMethod.WATCH or not self.confirmation.synced:
            return None
        return FsyncWatch(time.monotonic(), self.durability.timeout_ms)

    def decide_method(self, replies: Sequence[Any], where: str) -> None:
        """
        Note how syncs are confirmed, by the replies to `probe_commands`.

        A request that can never be met is refused, unless the push may be stored already.
        """
        try:
            self.method = decide_fsync_method(self.durability, replies, where)
        except ConfigurationError:
            if not self.sent:
                raise
            self.method = FsyncMethod.NONE
