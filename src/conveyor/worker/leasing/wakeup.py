"""
The connections of a worker, and how it waits for work without polling.

At each endpoint, one connection carries the turns of its queues, and others block on the wake-up lists of those queues
that would take work and have none. A blocking call names at most 32 queues, so that a token costs the same however many
queues the worker has: the server walks through all lists of a call when it begins and when it ends. A token holds no
job, so a lost one costs seconds and nothing else. Each queue's own list (`wake:<worker>`) is always listened to while
jobs run: a cancellation puts a token there, and a person's command to this worker comes the same way.
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
from conveyor.worker.leasing.idle_turns import IdleTurns
from conveyor.worker.logs import log_repeated_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.endpoint import Endpoint
    from conveyor.worker.leasing.capacity import Capacity, LeasingQueue
    from conveyor.worker.leasing.queue_consumer import QueueConsumer
    from conveyor.worker.lifecycle import Lifecycle

log = logging.getLogger("conveyor.worker")
BLOCK = 30.0
"""Seconds of one blocking call. Due instants and lost tokens are the turns' business, so it may be long."""
BUSY = 0.1
"""Seconds of uninterrupted work after which the worker's own lists are listened to as well."""
MOST_QUEUES = 32
"""Queues of one blocking call, at most."""
QUIET = 1.0
"""Seconds that Redis may be away without a word in the log: a restart or a cut connection."""


class WakeupListener:
    """Blocks on the wake-up lists of up to 32 queues at one endpoint, and tells the consumer whose token it took."""

    def __init__(
        self, lifecycle: Lifecycle, connection: AsyncConnection, waiting: dict[WakeupListener, None],
        capacity: Capacity,
    ) -> None:  # fmt: skip
        """
        Args:
            lifecycle: that of the worker.
            connection: one that nothing else uses.
            waiting: this one is there while it listens to no queue, because the worker has no room.
            capacity: that of the worker.
        """
        self._lifecycle, self._connection = lifecycle, connection
        self._waiting, self._capacity = waiting, capacity
        self.consumers: list[QueueConsumer] = []
        """Those it listens for; more may be added."""
        self._woken: QueueConsumer | None = None
        self._listening: dict[bytes, QueueConsumer] | None = None  # list → its consumer, while a call blocks
        self._heard: set[QueueConsumer] = set()  # those whose common list is part of the blocked call
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
            if len(self._heard) == len(self.consumers):
                return
            unheard = [one for one in self._with_capacity() if one not in self._heard]
            if unheard:
                self._heard.update(unheard)  # one call is enough
                unheard[0].wake_self()
            return
        if self._woken is not None and self._woken.is_turning:
            return  # it calls again when its turn is over
        has_capacity = self._with_capacity()
        if has_capacity:
            self._block(has_capacity)
        else:
            self._waiting[self] = None
            self._listen_later()

    def _listen_later(self) -> None:
        if self._later is None and not self._lifecycle.stopped:
            self._later = asyncio.get_running_loop().call_later(BUSY, self._listen_while_busy)

    def _listen_while_busy(self) -> None:
        self._later = None
        if self._listening is None and self._retry is None and not self._lifecycle.stopped:
            self._block(self._with_capacity())

    def _with_capacity(self) -> list[QueueConsumer]:
        """Return the queues that would take work and have none."""
        return [one for one in self.consumers if one.would_take] if self._capacity.has_room else []

    def _block(self, has_capacity: list[QueueConsumer]) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._woken = None
        if has_capacity:
            self._waiting.pop(self, None)
        names = {consumer.wake_list: consumer for consumer in has_capacity}
        names |= {consumer.own_wake_list: consumer for consumer in self.consumers if consumer.identity}
        if not names:
            return
        self._listening = names
        self._heard = set(has_capacity)
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
            consumer = names[reply[0]]
            if consumer.on_element(reply[1]):
                self._woken = consumer
                self._listen_later()
            else:
                self.listen()
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
        for consumer in self.consumers:
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
    The connections to one endpoint, and the consumers that use them.

    One endpoint serves all queues, except in a cluster, where a call covers one slot.
    """

    def __init__(
        self, worker: str, lifecycle: Lifecycle, endpoint: Endpoint, waiting: dict[WakeupListener, None],
        capacity: Capacity, after_turn: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        self._worker, self._lifecycle, self._endpoint = worker, lifecycle, endpoint
        self._waiting, self._capacity = waiting, capacity
        self.consumers: list[QueueConsumer] = []
        self.connection = AsyncConnection(endpoint)
        self.listeners: list[WakeupListener] = []
        self.idle_turns = IdleTurns(self.connection, self.consumers, after_turn)
        self.connection.on_reopened, self.connection.on_lost = self._on_reopened, self._on_lost
        self._since = 0.0
        self._warning: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    def add(self, consumer: QueueConsumer) -> WakeupListener:
        """Add a consumer; return what listens to its wake-up lists."""
        self.consumers.append(consumer)
        if not self.listeners or len(self.listeners[-1].consumers) == MOST_QUEUES:
            connection = AsyncConnection(self._endpoint)
            self.listeners.append(WakeupListener(self._lifecycle, connection, self._waiting, self._capacity))
        self.listeners[-1].consumers.append(consumer)
        return self.listeners[-1]

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
        for listener in self.listeners:
            listener.renew()

    async def close(self) -> None:
        """Close all connections."""
        self.idle_turns.close()
        if self._warning is not None:
            self._warning.cancel()
        if self._opening is not None:
            self._opening.cancel()
        for listener in self.listeners:
            await listener.close()
        self.connection.close()


class WorkerConnections:
    """The connections of one worker to the endpoints of all its queues."""

    def __init__(
        self, worker: str, lifecycle: Lifecycle, client: Client, capacity: Capacity,
        after_turn: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        """
        Args:
            worker: its name.
            lifecycle: that of the worker.
            client: knows the endpoints.
            capacity: that of the worker.
            after_turn: called after each idle turn, if anything.
        """
        self._worker, self._lifecycle, self._client = worker, lifecycle, client
        self._capacity, self._after_turn = capacity, after_turn
        self._asked: dict[LeasingQueue, None] = {}
        self._by_endpoint: dict[Endpoint, EndpointConnections] = {}
        self._listeners: dict[LeasingQueue, WakeupListener] = {}
        self._waiting: dict[WakeupListener, None] = {}

    def of(self, keys: QueueKeys) -> EndpointConnections:
        """Return the connections to the endpoint of a queue."""
        endpoint = self._client.endpoint(keys)
        connections = self._by_endpoint.get(endpoint)
        if connections is None:
            connections = EndpointConnections(
                self._worker, self._lifecycle, endpoint, self._waiting, self._capacity, self._after_turn
            )
            self._by_endpoint[endpoint] = connections
        return connections

    def add(self, consumer: QueueConsumer) -> None:
        """Renew a consumer, and listen for it."""
        self._listeners[consumer] = self.of(consumer.keys).add(consumer)

    def listen(self, consumer: LeasingQueue) -> None:
        """
        Wait for work of a consumer, and of those that nothing waited for: room that came free counts for every queue.

        At the next pass of the event loop, since jobs that were just leased begin first.
        """
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._listen)
        self._asked[consumer] = None

    def _listen(self) -> None:
        asked, self._asked = self._asked, {}
        for consumer in asked:
            self._listeners[consumer].listen()
            consumer.prepare()
        if self._waiting and self._capacity.has_room:
            for listener in [*self._waiting]:
                listener.listen()

    def tick(self) -> None:
        """Renew the leases that were not renewed lately. Called a few times a second."""
        for connections in self._by_endpoint.values():
            connections.idle_turns.tick()

    @property
    def blocked(self) -> int:
        """The number of blocking calls made."""
        return sum(listener.blocked for one in self._by_endpoint.values() for listener in one.listeners)

    async def close(self) -> None:
        """Close all connections."""
        for connections in self._by_endpoint.values():
            await connections.close()
