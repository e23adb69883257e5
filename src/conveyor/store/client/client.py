"""
One app's access to Redis: blocking calls, awaitable calls, and pushes.

Blocking calls take a connection from a free list and put it back, so threads never share one. Awaitable calls share one
connection per event loop and endpoint; pushes of one tick share one call.
"""

from __future__ import annotations

import asyncio
import inspect
import linecache
import logging
import re
import sys
import threading
import time
import weakref
from asyncio import _get_running_loop  # the C function; get_running_loop raises instead
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from conveyor.errors import ConfigurationError, ConveyorError, QueueFull, StoreUnavailable
from conveyor.ids import new_identity
from conveyor.payload.redaction import Redaction
from conveyor.store import operations
from conveyor.store.client.batching import LoopConnections, PushBatcher, chunks, partly_full, refuse_undroppable
from conveyor.store.client.confirmed import ConfirmedConnections, ConfirmedTarget
from conveyor.store.client.durability import Confirmation, Durability, DurabilityRequest
from conveyor.store.client.outages import ServerOutages
from conveyor.store.client.queue_index import QueueIndex, removing_expired
from conveyor.store.fork_safety import on_fork
from conveyor.store.keys import QueueKeys, check_namespace, known_queues
from conveyor.store.max_length import MaxLength
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.script import Argument, Call, adrive, drive
from conveyor.store.transport.async_connection import AsyncConnection
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.credentials import LoginProvider
from conveyor.store.transport.endpoint import in_thread
from conveyor.store.transport.replies import CallTimeout
from conveyor.store.transport.topology import embedded_directory, topology_of
from conveyor.store.transport.url import StandaloneServer, configured_url

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from conveyor.store.client.batching import PushTarget, PushTargetResolver
    from conveyor.store.client.buffer import Buffer
    from conveyor.store.client.room import RoomLine
    from conveyor.store.embedded.server import ServerHandle
    from conveyor.store.transport.endpoint import Endpoint, Topology

T = TypeVar("T")
log = logging.getLogger("conveyor.store")
TIMEOUT = 5.0
"""Seconds that a call may take, repeated while Redis is away, before StoreUnavailable is raised."""
_MOST_SCANNED = 1_000_000
"""Keys of a server that are looked at when the set of known queues is lost."""


class Client:
    """The connections of one app; each is opened on first use. *url* None: ``CONVEYOR_URL``, else the embedded server."""

    deferred = False

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str = "conveyor",
        timeout: float | None = None,
        retry_for: float | None = None,
        allow_in_loop: bool = False,
        login: LoginProvider | None = None,
    ) -> None:
        """
        Make a client; nothing is opened. Raises ConfigurationError.

        *timeout*: seconds that one call may take (None: `TIMEOUT`), *retry_for*: those for which it is repeated (None: all of
        them). *allow_in_loop*: blocking calls may block a running event loop. *login*: asked for user and
        password at each connection; the embedded server has none.
        """
        self.namespace = check_namespace(namespace)
        self.retry_for = retry_for if retry_for is not None else TIMEOUT if timeout is None else timeout
        self.allow_in_loop = allow_in_loop
        self._url, self.login = configured_url(url), login
        self._single = self._standalone = True  # one endpoint for all keys, and always the same
        if self._url is not None and self._url.startswith("embedded:"):
            embedded_directory(self._url)  # a wrong URL is refused here, not at the first push
        elif self._url is not None:
            topology = topology_of(self._url, login=login)
            self._single, self._standalone = topology.single, isinstance(topology, StandaloneServer)
        # Only a cluster has slots that move, and whoever sets a timeout means it for them too.
        self.timeout = CallTimeout(TIMEOUT if timeout is None else timeout, firm=self._single or timeout is not None)
        self._topology: Topology | None = None
        self._server_handle: ServerHandle | None = None
        self._lock = threading.Lock()
        self._free: deque[PushConnection] = deque()
        self._free_at: dict[Endpoint, deque[PushConnection]] = {}
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopConnections] = weakref.WeakKeyDictionary()
        self._last_loop: LoopConnections | None = None
        self.redaction = Redaction()
        """The fields of payloads that the app of this client shows to nobody; Redis is told before the first push."""
        self._announced = QueueIndex(self.namespace, self.redaction)
        self.outages = ServerOutages()
        self._confirmed_connections: ConfirmedConnections | None = None
        self._room: RoomLine | None = None
        self.queue_of_job: Callable[[], str | None] = _no_job
        """Returns the queue of the job that runs here, None outside; set by the app."""
        self.push_target_resolver: PushTargetResolver | None = None
        self.buffer: Buffer | None = None  # a client with a buffer replaces these three
        self.new_sequence: Callable[[], ProducerSequence] = _new_sequence
        self.make_batcher: Callable[[AsyncConnection, QueueKeys, int, float], PushBatcher] = partial(
            PushBatcher, on_new_queue=self.aannounce_again
        )
        on_fork(self)

    @property
    def address(self) -> Topology:
        """The topology of the URL; starts the embedded server when no URL is configured."""
        if self._topology is None:
            with self._lock:
                if self._topology is None:
                    self._topology = self._resolve()
        return self._topology

    def _resolve(self) -> Topology:
        if self._url is not None and not self._url.startswith("embedded:"):
            # A short retry time means a short wait for a host that drops packets.
            return topology_of(self._url, min(TIMEOUT, max(self.retry_for, 0.5)), self.login)
        from conveyor.store.embedded import server

        directory: Path | None = None
        if self._url is not None:
            from pathlib import Path

            place = embedded_directory(self._url)
            directory = Path(place) if place else None
        self._server_handle = server.attach(directory)
        return StandaloneServer(self._server_handle.url)

    @property
    def server_handle(self) -> ServerHandle | None:
        """The handle of the embedded server, if it is used and was needed already."""
        return self._server_handle

    @property
    def has_one_endpoint(self) -> bool:
        """True when one server serves all keys."""
        return self._single

    def is_away(self, keys: QueueKeys) -> bool:
        """Tell whether the server of *keys* is away and others are not to wait for it; never where one serves all keys."""
        return not self._single and self.outages.is_away(self.endpoint(keys))

    def note_away(self, keys: QueueKeys) -> bool:
        """Note that the server of *keys* did not answer; return False where one server serves all keys."""
        if self._single:
            return False
        if self.outages.note(self.endpoint(keys)):
            log.warning(
                "The server of queue '%s' does not answer; queues on other servers are not affected.", keys.queue
            )
        return True

    @property
    def has_idle_connection(self) -> bool:
        """True when a blocking connection is open and free: a call costs a round trip and no new connection."""
        return bool(self._free) or any(self._free_at.values())

    @property
    def configured_url(self) -> str | None:
        """The URL as configured, None for the embedded server. It may hold a password."""
        return self._url

    def keys(self, queue: str) -> QueueKeys:
        """Return the keys of *queue*."""
        return QueueKeys(self.namespace, queue)

    def endpoint(self, keys: QueueKeys | str) -> Endpoint:
        """Return the endpoint for these keys."""
        return self.address.endpoint(keys if isinstance(keys, str) else keys.jobs)

    # -- blocking -------------------------------------------------------------------------------------------------

    def run(self, call: Call[T], *, retry_for: float | None = None, deadline: float | None = None) -> T:
        """
        Carry out one step; raises ConfigurationError inside a running event loop.

        It is repeated for *retry_for* seconds and ends at *deadline* (monotonic; None: both as the client says).
        """
        self.refuse_in_loop()
        producer = self._take_connection(call.keys[0])
        try:
            return producer.connection.run(
                call, retry_for=self.retry_for if retry_for is None else retry_for, deadline=deadline
            )
        finally:
            producer.free_list.append(producer)

    def run_each(self, calls: Sequence[Call[T]]) -> list[T]:
        """
        Carry out steps that only read; where one server has all of them, in one round trip.

        It carries them out one behind the other and serves nobody else meanwhile, so together they must not take long.
        """
        self.refuse_in_loop()
        if not calls or not self.has_one_endpoint:  # in a cluster each may be elsewhere
            return [self.run(call) for call in calls]
        producer = self._take_connection(calls[0].keys[0])
        try:
            return producer.connection.run_each(calls, retry_for=self.retry_for)
        finally:
            producer.free_list.append(producer)

    def run_once(self, call: Call[T], *, retry_for: float | None = None, deadline: float | None = None) -> T:
        """Carry out one step as `run` does, repeated only when that is harmless."""
        return self.run(call, retry_for=self._once(call, retry_for), deadline=deadline)

    def _once(self, call: Call[Any], most: float | None) -> float | None:
        """Return the seconds for which *call* is repeated, *most* at most."""
        # An intake is never repeated: it would store new entries over old ones.
        return 0.0 if call.script is operations.LIST_INTAKE else most

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """Store *entries* in order, all or none (per thousand, unless *whole*); return an id for each."""
        self.refuse_in_loop()
        if keys.queue not in self._announced:
            self.announce(keys)
        ids: list[str] = []
        is_new = False
        producer = self._take_connection(keys.jobs)
        try:
            for part in chunks(entries, whole):
                call = operations.push(keys, producer.sequence, part, max_length=max_length)
                accepted = producer.connection.run(call, retry_for=self.retry_for)
                ids += accepted
                is_new = is_new or isinstance(accepted, operations.NewQueueIds)
        finally:
            producer.free_list.append(producer)
        if is_new:
            self.announce_again(keys)
        return ids

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Store plain messages (id, envelope, id, envelope, …): the cheapest push."""
        if not self.allow_in_loop and _get_running_loop() is not None:
            refuse_in_loop()
        if keys.queue not in self._announced:
            self.announce(keys)
        producer = self._take_connection(keys.jobs)
        try:
            call = operations.push_plain(keys, producer.sequence, pairs, max_length=max_length)
            is_new = producer.connection.run(call, retry_for=self.retry_for)
        finally:
            producer.free_list.append(producer)
        if is_new:
            self.announce_again(keys)

    def push_with_room(
        self,
        target: PushTarget,
        keys: QueueKeys,
        entries: Sequence[Entry],
        max_length: MaxLength,
        *,
        whole: bool = False,
    ) -> list[str]:
        """
        Push to *target*; wait for room in a full queue where its maximum length says so, as long as the entries do.

        All are stored or none, more than the queue ever takes in parts. A push that is stored elsewhere meanwhile does not wait.
        """
        if max_length.full == "drop-oldest":
            refuse_undroppable(keys, entries)
        if target.deferred or max_length.full != "block":
            return target.push(keys, entries, max_length=max_length, whole=whole or max_length.full == "drop-oldest")
        ids: list[str] = []
        for part in max_length.parts(entries):
            try:
                ids += self.room.push(keys, max_length, part, partial(target.push, keys, part, whole=True))
            except QueueFull as full:
                raise partly_full(full, len(ids)) from None
        return ids

    @property
    def room(self) -> RoomLine:
        """The producers of this client that wait for room in full queues."""
        if self._room is None:
            from conveyor.store.client.room import RoomLine

            with self._lock:
                self._room = self._room or RoomLine(self)
        return self._room

    def start_push_plain(self, keys: QueueKeys, pairs: Sequence[Argument]) -> Callable[[], None]:
        """
        Send a push of plain messages; return a function that completes it.

        So the caller prepares the next push while Redis works on this one.
        """
        self.refuse_in_loop()
        self.announce(keys)
        producer = self._take_connection(keys.jobs)
        collect = producer.connection.start(operations.push_plain(keys, producer.sequence, pairs))

        def finish() -> None:
            try:
                is_new = collect(self.retry_for)
            finally:
                producer.free_list.append(producer)
            if is_new:
                self.announce_again(keys)

        return finish

    def execute(self, *command: Argument, key: str | None = None, retry_for: float | None = None) -> object:
        """
        Send one plain command to the endpoint of *key* (None: any server), for reads that need no script (INFO, PING, SMEMBERS).

        It is retried for *retry_for* seconds; by default not at all on a single server, elsewhere as long as any step.
        """
        self.refuse_in_loop()
        producer = self._take_connection(key)
        try:
            return producer.connection.run_command(*command, retry_for=self._retry_time(retry_for))
        finally:
            producer.free_list.append(producer)

    def _retry_time(self, retry_for: float | None) -> float:
        # The master or the node may have just changed, which is not worth an error.
        return retry_for if retry_for is not None else 0.0 if self._standalone else self.retry_for

    def deadline(self, wait: float | None) -> float | None:
        """Return when a call must end (monotonic) that waits for *wait* seconds by itself; None: without limit."""
        longest = self.timeout.longest
        return None if wait is None or longest is None else time.monotonic() + wait + max(longest, self.retry_for)

    def ping(self, seconds: float | None) -> float:
        """Return the seconds until a server has answered; raises StoreUnavailable after *seconds* (None: the timeout)."""
        self.refuse_in_loop()
        began, most = time.monotonic(), self.timeout.seconds if seconds is None else seconds
        assert most is not None
        producer = self._take_connection(None)
        try:
            producer.connection.run_command("PING", retry_for=most, deadline=began + most)
        finally:
            producer.free_list.append(producer)
        return time.monotonic() - began

    def queues(self) -> list[str]:
        """
        Return the names of all known queues, sorted.

        Where Redis has lost the set of them, or its node is away, look at the keys.
        """
        known = known_queues(self.namespace)
        try:
            names = _names(self.execute("SMEMBERS", known, key=known))
        except StoreUnavailable:
            if self._single or not (names := self._find_queues()):
                raise
        return self._without_expired(names) or self._find_queues()

    def _without_expired(self, names: list[str]) -> list[str]:
        """Return the *names* of queues without those that nobody used and that are gone, which leave the set of known ones."""
        if operations.SOME_EXPIRE not in names:
            return names
        gone = {operations.SOME_EXPIRE}
        with suppress(ConveyorError):  # a user that only reads may not write the set
            gone |= drive(removing_expired(self.namespace), self.run)
        return [name for name in names if name not in gone]

    def _find_queues(self) -> list[str]:
        from conveyor.store.client.queue_scan import find_queues

        with suppress(ConveyorError):  # a user with the rights of a producer may not look at keys
            if found := find_queues(self, most=_MOST_SCANNED):
                known = known_queues(self.namespace)
                with suppress(ConveyorError):  # a user that only reads may not write it
                    self.run(operations.announce(known, *found))
                return found
        return []

    def to_node(self, url: str) -> Client:
        """Return a client for one node of a cluster."""
        return Client(
            url, namespace=self.namespace, timeout=self.timeout.seconds, retry_for=self.retry_for,
            allow_in_loop=self.allow_in_loop, login=self.login,
        )  # fmt: skip

    def refuse_in_loop(self) -> None:
        """Raise ConfigurationError (E06) when an event loop runs in this thread, unless the app allows to block it."""
        if not self.allow_in_loop:
            refuse_in_loop()

    def announce(self, *queues: QueueKeys, retry_for: float | None = None) -> None:
        """
        Make queues known before their first push: the set has no hash tag, so it cannot be part of the push.

        A queue that expires gets its time too.
        """
        if self._announced.is_due(queues):
            with self._announcing():
                drive(self._announced.announcing(queues), partial(self.run, retry_for=retry_for))

    @contextmanager
    def _announcing(self) -> Iterator[None]:
        """Enter the block that makes names known. On several nodes, that of the set may be away: then it is tried later."""
        try:
            yield
        except StoreUnavailable:
            if self._single:
                raise
            self._announced.pause()

    def announce_again(self, *queues: QueueKeys) -> None:
        """Make queues known that a push or a registration found new in Redis; where that fails, the next push does it."""
        for keys in queues:
            self._announced.discard(keys.queue)
        with suppress(ConveyorError):
            self.announce(*queues)

    def note_forgotten(self, *queues: QueueKeys) -> None:
        """Note that queues were deleted: the next push makes each known again."""
        for keys in queues:
            self._announced.discard(keys.queue)

    def _take_connection(self, key: str | None) -> PushConnection:
        free = self._free if self._single else self._free_at.setdefault(self.endpoint(key or ""), deque())
        try:
            return free.pop()
        except IndexError:
            pass  # what connecting raises has no IndexError as its context then
        return PushConnection(Connection(self.endpoint(key or ""), self.timeout), self.new_sequence(), free)

    # -- awaitable ------------------------------------------------------------------------------------------------

    async def arun(self, call: Call[T], *, retry_for: float | None = None, deadline: float | None = None) -> T:
        """Awaitable form of `run`, on this event loop's connection."""
        shared = self.loop_connections()
        connection = shared.connection if self._single else shared.connection_to(self.endpoint(call.keys[0]))
        return await connection.run(
            call, retry_for=self.retry_for if retry_for is None else retry_for, deadline=deadline
        )

    async def arun_once(self, call: Call[T], *, retry_for: float | None = None, deadline: float | None = None) -> T:
        """Awaitable form of `run_once`."""
        return await self.arun(call, retry_for=self._once(call, retry_for), deadline=deadline)

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Store *entries* as `push` does; pushes of one tick share a call."""
        if keys.queue not in self._announced:
            await self.aannounce(keys)
        sequence = self.loop_connections().batcher(keys, max_length)
        ids: list[str] = []
        for part in chunks(entries, whole):
            ids += await sequence.push(part, max_length)
        return ids

    async def apush_with_room(
        self,
        target: PushTarget,
        keys: QueueKeys,
        entries: Sequence[Entry],
        max_length: MaxLength,
        *,
        whole: bool = False,
    ) -> list[str]:
        """Awaitable form of `push_with_room`."""
        if max_length.full == "drop-oldest":
            refuse_undroppable(keys, entries)
        if target.deferred or max_length.full != "block":
            whole = whole or max_length.full == "drop-oldest"
            return await target.apush(keys, entries, max_length=max_length, whole=whole)
        ids: list[str] = []
        for part in max_length.parts(entries):
            try:
                ids += await self.room.apush(keys, max_length, part, partial(target.apush, keys, part, whole=True))
            except QueueFull as full:
                raise partly_full(full, len(ids)) from None
        return ids

    def push_target(
        self, durability: Durability | None, durability_request: DurabilityRequest | None = None
    ) -> PushTarget:
        """Return where one push to a queue with *durability* goes."""
        if (
            self.push_target_resolver is not None
            and (elsewhere := self.push_target_resolver(durability_request)) is not None
        ):
            return elsewhere
        return self.redis_target(
            durability if durability_request is None else durability_request.applied_to(durability)
        )

    def redis_target(self, durability: Durability | None) -> PushTarget:
        """Return where pushes to a queue with *durability* go outside every transaction."""
        return self if durability is None else self.confirmed_target(durability)

    @property
    def deferring(self) -> bool:
        """True while pushes are stored elsewhere (an outbox) and reach Redis later."""
        return self.push_target_resolver is not None and self.push_target_resolver() is not None

    def confirmed_target(self, durability: Durability) -> ConfirmedTarget:
        """Return the target of pushes that ask for more than being stored."""
        return ConfirmedTarget(self._open_confirmed(), durability)

    def _open_confirmed(self) -> ConfirmedConnections:
        if self._confirmed_connections is None:
            self._confirmed_connections = ConfirmedConnections(self, self.refuse_in_loop)
        return self._confirmed_connections

    def push_unbuffered(self, keys: QueueKeys, call: Call[T], durability: Durability | None, *, retry_for: float) -> T:
        """Carry out a push in the caller's own sequence, confirmed as *durability* asks; it bypasses a buffer."""
        if durability is None:
            return self.run(call, retry_for=retry_for)
        reply, confirmation = self.confirm(keys, call, durability, retry_for=retry_for)
        if not durability.is_reached_by(confirmation):
            raise durability.failure(keys.queue, (), confirmation)
        return reply

    def confirm(
        self, keys: QueueKeys, call: Call[T], durability: Durability, *, retry_for: float | None = None
    ) -> tuple[T, Confirmation]:
        """Carry out a push in the caller's own sequence, and return besides what was confirmed of it."""
        with self._open_confirmed().lend(keys) as (connection, _):
            return connection.confirm(call, durability, retry_for=self.retry_for if retry_for is None else retry_for)

    async def aconfirm(self, keys: QueueKeys, call: Call[T], durability: Durability) -> tuple[T, Confirmation]:
        """Awaitable form of `confirm`."""
        return await self._open_confirmed().confirm(keys, call, durability)

    def put(self, keys: QueueKeys, id: str, envelope: bytes) -> Awaitable[None]:  # noqa: A002
        """Store one plain message: the cheapest push. The queue was announced before (`is_announced`, else `aannounce`)."""
        return self.loop_connections().batcher(keys, 0).put(id, envelope)

    def is_announced(self, keys: QueueKeys) -> bool:
        """Tell whether this process has announced the queue."""
        return keys.queue in self._announced

    async def aannounce(self, *queues: QueueKeys, retry_for: float | None = None) -> None:
        """Awaitable form of `announce`."""
        if self._announced.is_due(queues):
            with self._announcing():
                await adrive(self._announced.announcing(queues), partial(self.arun, retry_for=retry_for))

    async def aannounce_again(self, *queues: QueueKeys) -> None:
        """Awaitable form of `announce_again`."""
        for keys in queues:
            self._announced.discard(keys.queue)
        with suppress(ConveyorError):
            await self.aannounce(*queues)

    async def aqueues(self) -> list[str]:
        """Awaitable form of `queues`."""
        known = known_queues(self.namespace)
        try:
            names = _names(await self.aexecute("SMEMBERS", known, key=known))
        except StoreUnavailable:
            if self._single or not (names := await in_thread(self._find_queues)):
                raise
        if operations.SOME_EXPIRE in names:
            names = await in_thread(partial(self._without_expired, names))
        return names or await in_thread(self._find_queues)

    def async_connection(self, keys: QueueKeys | str) -> AsyncConnection:
        """Return this event loop's connection for these keys."""
        return self.loop_connections().connection_to(self.endpoint(keys))

    async def aexecute(self, *command: Argument, key: str | None = None, retry_for: float | None = None) -> object:
        """Awaitable form of `execute`."""
        return await self.async_connection(key or "").run_command(*command, retry_for=self._retry_time(retry_for))

    async def aping(self, seconds: float | None) -> float:
        """Awaitable form of `ping`."""
        began, most = time.monotonic(), self.timeout.seconds if seconds is None else seconds
        assert most is not None
        await self.async_connection("").run_command("PING", retry_for=most, deadline=began + most)
        return time.monotonic() - began

    def loop_connections(self) -> LoopConnections:
        """Return what the callers of this event loop share."""
        loop = asyncio.get_running_loop()
        # Most programs have one loop, and a lookup of a weak reference costs as much as all the rest.
        last = self._last_loop
        if last is not None and last.loop() is loop:
            return last
        connections = self._loops.get(loop)
        if connections is None:
            connections = self._loops[loop] = LoopConnections(
                loop, self.endpoint, self.retry_for, self.make_batcher, self.timeout
            )
        self._last_loop = connections
        return connections

    # -- end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all blocking connections and release the embedded server."""
        self.outages.close()
        if self._room is not None:
            self._room.close()
        if self._confirmed_connections is not None:
            self._confirmed_connections.close()
        for free in (self._free, *self._free_at.values()):
            while free:
                free.pop().connection.close()
        attachment, self._server_handle = self._server_handle, None
        if attachment is not None:
            self._topology = None
            attachment.close()

    def close_reopened(self, before: LoopConnections) -> None:
        """
        Close this event loop's connections if they are others than *before*, and idle: the app was closed, and they came after.

        For a loop over messages, which ends when its generator is collected, and that is often after the app was closed.
        """
        loop = asyncio.get_running_loop()
        now = self._loops.get(loop)
        if now is not None and now is not before and now.is_idle:
            del self._loops[loop]
            self._last_loop = None
            now.close()

    async def aclose(self) -> None:
        """Close this event loop's connections, then the rest."""
        shared = self._loops.pop(asyncio.get_running_loop(), None)
        self._last_loop = None
        if shared is not None:
            shared.close()
        if self._confirmed_connections is not None:
            self._confirmed_connections.aclose()
        self.close()

    def forked(self) -> None:
        """Start anew in a forked child."""
        # The parent keeps its sockets and sequences: a child must touch neither.
        self._free, self._free_at = deque(), {}
        self._loops = weakref.WeakKeyDictionary()
        self._last_loop = None
        self._lock = threading.Lock()


class PushConnection:
    """A connection, the sequence of the pushes that travel on it, and the free list it returns to."""

    __slots__ = ("connection", "free_list", "sequence")

    def __init__(self, connection: Connection, sequence: ProducerSequence, free_list: deque[PushConnection]) -> None:
        self.connection = connection
        self.sequence = sequence
        self.free_list = free_list


def _new_sequence() -> ProducerSequence:
    return ProducerSequence(new_identity())


def _no_job() -> None: ...


def _names(members: object) -> list[str]:
    assert isinstance(members, list | set)
    return sorted(name.decode() for name in members)


def refuse_in_loop() -> None:
    """Raise ConfigurationError (E06) when an event loop runs in this thread: a blocking call would stop all of it."""
    if _get_running_loop() is not None:
        blocked, instead = _blocking_call(sys._getframe(1))  # noqa: SLF001
        raise ConfigurationError(
            f"{blocked}. It would have blocked everything else on this loop for one round trip. Nothing was done.\n"
            f"    Write:  {instead}",
            code="E06",
        )


def _blocking_call(frame: FrameType | None) -> tuple[str, str]:
    """Return which public method was called and from where, and what to write instead; *frame* lies below both."""
    method = frame
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "conveyor":
        method, frame = frame, frame.f_back
    running = "was called while an event loop is running in this thread"
    name = "" if method is None else method.f_code.co_name
    owner = None if method is None else method.f_locals.get("self")
    if name == "__len__":
        return f"len(queue) {running}", "await queue.alen()"
    if frame is None or not hasattr(owner, f"a{name}"):
        return (
            f"A blocking method {running}",
            "await and the same method with an a in front: apush, aenqueue, aresult, …",
        )
    path, line = frame.f_code.co_filename, frame.f_lineno
    written = re.search(rf"([\w.]+)\.{name}\(", linecache.getline(path, line))
    text = written[1] if written is not None else type(owner).__name__.lower()
    where = f"{path.replace(chr(92), '/').rpartition('/')[2]}:{line} in {frame.f_code.co_name}"
    awaits = inspect.iscoroutinefunction(getattr(owner, f"a{name}"))
    return f"{text}.{name}() {running} (from {where})", f"{'await' if awaits else 'async for … in'} {text}.a{name}(…)"
