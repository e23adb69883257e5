"""
The connections of a worker, and how it waits for work without polling.

At each endpoint, one connection carries the turns of its queues, and another blocks on the wake-up lists of all queues
that would take work and have none. A token holds no job, so a lost one costs seconds and nothing else. Each queue's own
list (`wake:<worker>`) is always listened to while jobs run: a cancellation puts a token there.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError
from conveyor.store.transport import replies
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.units import span
from conveyor.worker.logs import log_repeated_error

if TYPE_CHECKING:
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.endpoint import Endpoint
    from conveyor.worker.leasing.queue_consumer import QueueConsumer
    from conveyor.worker.lifecycle import Lifecycle

log = logging.getLogger("conveyor.worker")
BLOCK = 30.0
"""Seconds of one blocking call. Due instants and lost tokens are the turns' business, so it may be long."""
BUSY = 0.1
"""Seconds of uninterrupted work after which the worker's own lists are listened to as well."""
QUIET = 1.0
"""Seconds that Redis may be away without a word in the log: a restart or a cut connection."""


class WakeupListener:
    """Blocks on the wake-up lists of the queues at one endpoint, and tells the consumer whose token it took."""

    def __init__(self, lifecycle: Lifecycle, connection: AsyncConnection, consumers: list[QueueConsumer]) -> None:
        """
        Args:
            lifecycle: that of the worker.
            connection: one that nothing else uses.
            consumers: those at this endpoint; more may be added.
        """
        self._lifecycle, self._connection, self._consumers = lifecycle, connection, consumers
        self._listening: dict[bytes, QueueConsumer] | None = None  # list → its consumer, while a call blocks
        self._heard: frozenset[str] = frozenset()  # queues whose common list is part of the blocked call
        self._later: asyncio.TimerHandle | None = None
        self._retry: asyncio.Task[None] | None = None
        self._attempt = 0
        self.blocked = 0
        """The number of blocking calls made, for tests."""

    def listen(self) -> None:
        """Block if nothing is blocked yet; if a queue that would take work is not heard, wake ourselves and block anew."""
        if self._lifecycle.stopped or self._retry is not None:
            return
        if self._listening is not None:
            unheard = [one for one in self._consumers if one.queue not in self._heard and one.has_capacity]
            if unheard:
                self._heard = self._heard | {consumer.queue for consumer in unheard}  # one call is enough
                unheard[0].wake_self()
            return
        has_capacity = [consumer for consumer in self._consumers if consumer.has_capacity]
        if has_capacity:
            self._block(has_capacity)
        else:
            self._listen_later()

    def _listen_later(self) -> None:
        if self._later is None and not self._lifecycle.stopped:
            self._later = asyncio.get_running_loop().call_later(BUSY, self._listen_while_busy)

    def _listen_while_busy(self) -> None:
        self._later = None
        if self._listening is None and self._retry is None and not self._lifecycle.stopped:
            self._block([consumer for consumer in self._consumers if consumer.has_capacity])

    def _block(self, has_capacity: list[QueueConsumer]) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        names = {consumer.keys.wake.encode(): consumer for consumer in has_capacity}
        for consumer in self._consumers:
            if consumer.identity:
                names[consumer.keys.wake_of(consumer.identity).encode()] = consumer
        if not names:
            return
        self._listening = names
        self._heard = frozenset([consumer.queue for consumer in has_capacity])
        if not self._connection.is_open:
            self._reconnect()
            return
        self.blocked += 1
        self._connection.send(("BLPOP", *names, str(BLOCK)), self._on_reply, block=BLOCK)

    def _on_reply(self, reply: Any) -> None:
        names, self._listening = self._listening, None
        if isinstance(reply, Exception):
            if not self._lifecycle.stopped:
                self._note_refusal(reply)
                self._reconnect()
            return
        self._attempt = 0
        if reply is not None and names is not None:
            # Not at once: it makes a turn now, so it would not be among those with capacity, and would wake this one again as
            # soon as it is. Its turn ends in `listen`; one that leads to work is not waited for longer than this.
            names[reply[0]].on_token()
            self._listen_later()
        else:
            self.listen()

    def _note_refusal(self, reply: Exception) -> None:
        if isinstance(reply, OSError):
            return
        try:
            if self._connection.handle_error_reply(reply) is replies.ErrorAction.RAISE:
                log_repeated_error("waiting for work was refused: %s", reply)
        except ConveyorError as error:
            log_repeated_error("waiting for work was refused: %s", error)

    def renew(self) -> None:
        """
        Connect anew: the connection of the turns had to, so this one may lead to a server that is no longer the right one.

        Without this, workers live on but idle after a failover, blocked at a server that gets no pushes.
        """
        if self._connection.is_open:
            self._connection.drop(ConnectionLost("connected elsewhere now"))

    def _reconnect(self) -> None:
        self._listening = {}
        if self._retry is None:
            self._retry = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        while not self._lifecycle.stopped:
            await asyncio.sleep(replies.backoff(self._attempt))
            self._attempt += 1
            try:
                await self._connection.open()
            except OSError:
                continue
            except ConveyorError as error:  # its password is refused, perhaps for a while
                log_repeated_error("waiting for work was refused: %s", error)
                continue
            break
        self._retry = self._listening = None
        # Whatever was announced meanwhile was not heard: ask each queue once.
        for consumer in self._consumers:
            consumer.on_token()
        self.listen()

    async def close(self) -> None:
        """Stop waiting."""
        if self._later is not None:
            self._later.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._connection.close()


class EndpointConnections:
    """
    The two connections to one endpoint, and the consumers that use them.

    One endpoint serves all queues, except in a cluster, where a blocked call covers one slot.
    """

    def __init__(self, worker: str, lifecycle: Lifecycle, endpoint: Endpoint) -> None:
        self._worker, self._lifecycle = worker, lifecycle
        self.consumers: list[QueueConsumer] = []
        self.connection = AsyncConnection(endpoint)
        self.listener = WakeupListener(lifecycle, AsyncConnection(endpoint), self.consumers)
        self.connection.on_reopened, self.connection.on_lost = self._on_reopened, self._on_lost
        self._since = 0.0
        self._warning: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    def _on_lost(self, error: OSError) -> None:
        if self._warning is None:
            loop, self._since = asyncio.get_running_loop(), monotonic()
            self._warning = loop.call_later(QUIET, self._warn, str(error))
            loop.call_soon(self._reopen)

    def _reopen(self) -> None:
        """Connect at once: an idle worker's next turn may be seconds away, and until then it would say that Redis is away."""
        if not self._lifecycle.stopped:
            self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        with suppress(OSError, ConveyorError):  # turns and the listener go on trying
            await self.connection.open()

    def _warn(self, why: str) -> None:
        log.warning("worker %s: Redis is away, trying again: %s", self._worker, why)

    def _on_reopened(self) -> None:
        if self._warning is not None:
            if monotonic() - self._since > QUIET:
                log.info("worker %s: Redis is back after %s", self._worker, span(monotonic() - self._since))
            self._warning.cancel()
            self._warning = None
        self.listener.renew()

    async def close(self) -> None:
        """Close both connections."""
        if self._warning is not None:
            self._warning.cancel()
        if self._opening is not None:
            self._opening.cancel()
        await self.listener.close()
        self.connection.close()


class WorkerConnections:
    """The connections of one worker to the endpoints of all its queues."""

    def __init__(self, worker: str, lifecycle: Lifecycle, client: Client) -> None:
        self._worker, self._lifecycle, self._client = worker, lifecycle, client
        self._by_endpoint: dict[Endpoint, EndpointConnections] = {}

    def of(self, keys: QueueKeys) -> EndpointConnections:
        """Return the connections to the endpoint of a queue."""
        endpoint = self._client.endpoint(keys)
        connections = self._by_endpoint.get(endpoint)
        if connections is None:
            connections = EndpointConnections(self._worker, self._lifecycle, endpoint)
            self._by_endpoint[endpoint] = connections
        return connections

    def listen(self) -> None:
        """Wait for work at each endpoint where nothing waits: room that came free counts for every queue."""
        for connections in self._by_endpoint.values():
            connections.listener.listen()

    @property
    def blocked(self) -> int:
        """The number of blocking calls made."""
        return sum(connections.listener.blocked for connections in self._by_endpoint.values())

    async def close(self) -> None:
        """Close all connections."""
        for connections in self._by_endpoint.values():
            await connections.close()
