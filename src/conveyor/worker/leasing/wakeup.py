"""
Waiting without polling: one connection blocks on the wake-up lists of all hungry queues.

A token holds no job, so a lost one costs seconds and nothing else. Each queue's own list
(`wake:<worker>`) is always listened to while jobs run: a cancellation rings there.

The places a worker serves: at each, one wire for the turns of its queues and one listener that waits for their tokens.
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
from conveyor.worker.logs import complain

if TYPE_CHECKING:
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.endpoint import Endpoint
    from conveyor.worker.protocols import Dormitory, Tenant, WakeupTarget


BLOCK = 30.0
"""Seconds of one blocking call. Due instants and lost tokens are the turns' business, so it may be long."""
BUSY = 0.1
"""Seconds of uninterrupted work after which the worker's own lists are listened to as well."""


class WakeupListener:
    """Blocks on wake-up lists, and tells the consumer whose token it took."""

    def __init__(self, worker: Dormitory, wire: AsyncConnection) -> None:
        """Take the worker whose consumers it serves, and a connection of its own."""
        self._worker, self._wire = worker, wire
        self._listening: dict[bytes, WakeupTarget] | None = None
        self._heard: frozenset[str] = frozenset()  # queues whose common list is part of the blocked call
        self._later: asyncio.TimerHandle | None = None
        self._retry: asyncio.Task[None] | None = None
        self._attempt = 0
        self.blocked = 0  # calls made, for tests and the curious

    def listen(self) -> None:
        """Block if nothing is blocked yet; if a hungry queue is not heard, call ourselves and block anew."""
        if self._worker.stopped or self._retry is not None:
            return
        has_capacity = [consumer for consumer in self._worker.sleepers if consumer.has_capacity]
        if self._listening is not None:
            unheard = [consumer for consumer in has_capacity if consumer.queue not in self._heard]
            if unheard:
                self._heard = self._heard | {consumer.queue for consumer in unheard}  # one call is enough
                unheard[0].wake_self()
            return
        if has_capacity:
            self._block(has_capacity)
        else:
            self._wait_a_little()

    def _wait_a_little(self) -> None:
        if self._later is None and not self._worker.stopped:
            self._later = asyncio.get_running_loop().call_later(BUSY, self._busy)

    def _busy(self) -> None:
        self._later = None
        if self._listening is None and self._retry is None and not self._worker.stopped:
            self._block([consumer for consumer in self._worker.sleepers if consumer.has_capacity])

    def _block(self, has_capacity: list[WakeupTarget]) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        names: dict[bytes, WakeupTarget] = {consumer.keys.wake.encode(): consumer for consumer in has_capacity}
        for consumer in self._worker.sleepers:
            if consumer.identity:
                names[consumer.keys.wake_of(consumer.identity).encode()] = consumer
        if not names:
            return
        self._listening = names
        self._heard = frozenset(consumer.queue for consumer in has_capacity)
        if not self._wire.is_open:
            self._reconnect()
            return
        self.blocked += 1
        self._wire.send(("BLPOP", *names, BLOCK), self._answered, block=BLOCK)

    def _answered(self, reply: Any) -> None:
        names, self._listening = self._listening, None
        if isinstance(reply, Exception):
            if not self._worker.stopped:
                self._refused(reply)
                self._reconnect()
            return
        self._attempt = 0
        if reply is not None and names is not None:
            # Not at once: it makes a turn now, so it would not be among the hungry, and would call us again as soon as
            # it is. Its turn ends in `listen`; one that leads to work is not waited for longer than this.
            names[reply[0]].woken()
            self._wait_a_little()
        else:
            self.listen()

    def _refused(self, reply: Exception) -> None:
        if isinstance(reply, OSError):
            return
        try:
            if self._wire.handle_error_reply(reply) is replies.ErrorAction.RAISE:
                complain("waiting for work was refused: %s", reply)
        except ConveyorError as error:
            complain("waiting for work was refused: %s", error)

    def renew(self) -> None:
        """
        Connect anew: the turns' connection had to, so ours may lead to a server that is not the right one any more.

        Without this, workers live on but idle after a failover, blocked at a server nobody pushes to.
        """
        if self._wire.is_open:
            self._wire.drop(ConnectionLost("connected elsewhere now"))

    def _reconnect(self) -> None:
        self._listening = {}
        if self._retry is None:
            self._retry = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        while not self._worker.stopped:
            await asyncio.sleep(replies.backoff(self._attempt))
            self._attempt += 1
            try:
                await self._wire.open()
            except OSError:
                continue
            except ConveyorError as error:  # its password is refused: for a while, we hope
                complain("waiting for work was refused: %s", error)
                continue
            break
        self._retry = self._listening = None
        # Whatever was announced meanwhile was not heard: ask each queue once.
        for consumer in self._worker.sleepers:
            consumer.woken()
        self.listen()

    async def close(self) -> None:
        """Stop waiting."""
        if self._later is not None:
            self._later.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._wire.close()


log = logging.getLogger("conveyor.worker")
QUIET = 1.0
"""Seconds that Redis may be away without a word in the log: a restart or a cut connection."""


class EndpointConnections:
    """One place: a single one for all queues, but in a cluster, where a blocked call covers one slot."""

    def __init__(self, worker: Tenant, place: Endpoint) -> None:
        """Take the worker, and the place."""
        self._worker = worker
        self.sleepers: list[WakeupTarget] = []
        self.wire = AsyncConnection(place)
        self.listener = WakeupListener(self, AsyncConnection(place))
        self.wire.on_reopened, self.wire.on_lost = self._found, self._lost
        self._since = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def stopped(self) -> bool:
        """True when nothing is to be waited for any more."""
        return self._worker.stopped

    def _lost(self, error: OSError) -> None:
        if self._telling is None:
            loop, self._since = asyncio.get_running_loop(), monotonic()
            self._telling = loop.call_later(QUIET, self._tell, str(error))
            loop.call_soon(self._reopen)

    def _reopen(self) -> None:
        """Connect at once: an idle worker's next turn may be seconds away, and until then it would say that Redis is."""
        if not self.stopped:
            self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        with suppress(OSError, ConveyorError):  # turns and the listener go on trying
            await self.wire.open()

    def _tell(self, why: str) -> None:
        log.warning("worker %s: Redis is away, trying again: %s", self._worker.name, why)

    def _found(self) -> None:
        if self._telling is not None:
            if monotonic() - self._since > QUIET:
                log.info("worker %s: Redis is back after %s", self._worker.name, span(monotonic() - self._since))
            self._telling.cancel()
            self._telling = None
        self.listener.renew()

    async def close(self) -> None:
        """Close its connections."""
        if self._telling is not None:
            self._telling.cancel()
        if self._opening is not None:
            self._opening.cancel()
        await self.listener.close()
        self.wire.close()


class WorkerConnections:
    """All places of one worker."""

    def __init__(self, worker: Tenant, client: Client) -> None:
        """Take the worker, and what knows the places of its queues."""
        self._worker, self._client = worker, client
        self._berths: dict[Endpoint, EndpointConnections] = {}

    def berth(self, keys: QueueKeys) -> EndpointConnections:
        """Return the berth of a queue."""
        place = self._client.endpoint(keys)
        found = self._berths.get(place)
        if found is None:
            found = self._berths[place] = EndpointConnections(self._worker, place)
        return found

    def listen(self) -> None:
        """Wait for work wherever nobody does: room that came free counts for every queue."""
        for berth in self._berths.values():
            berth.listener.listen()

    @property
    def blocked(self) -> int:
        """How many blocking calls were made."""
        return sum(berth.listener.blocked for berth in self._berths.values())

    async def close(self) -> None:
        """Close all connections."""
        for berth in self._berths.values():
            await berth.close()
